"""A meta-optimizer for networks of a few thousand weights: Adam in the eigenbasis of the meta-gradients' covariance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from l2l_fast.checks import is_number, is_whole, require
from l2l_fast.modes import plain

MAX_WEIGHTS = 8192  # an eigendecomposition of that size takes minutes, and the matrices a quarter of a gigabyte each


class Soap(torch.optim.Optimizer):
    r"""Adam in the eigenbasis of the gradients' covariance, with all parameters as one vector.

    C <- b C + (1 - b) g g^T / ||g||^2,   C = Q diag(...) Q^T,   phi <- phi - lr Q Adam(Q^T g)

    SOAP keeps a basis for each side of each weight matrix; a coordinatewise LSTM is so small that it can have the one
    basis that all of them stand for. A meta-gradient costs thousands of times as much as this update.

    Args:
        params: floating-point parameters on one device, at most 8192 numbers in all.
        lr: step size of Adam in that basis.
        betas: decay rates of the gradient's mean and of its square in that basis.
        covariance_beta: decay rate b of the covariance.
        every: steps between two bases.
        eps: added to the root of the mean square.

    Raises:
        ValueError: an option out of its range, or too many parameters.

    Example:
        >>> import torch
        >>> from l2l_fast.meta.soap import Soap
        >>> x = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Soap([x], lr=0.1)
        >>> (x * torch.tensor([1.0, 10.0, 100.0])).square().sum().backward()
        >>> optimizer.step()
        >>> x.data
        tensor([0.9000, 0.9000, 0.9000])

    References:
        Vyas et al. 2024, *SOAP: improving and stabilizing Shampoo using Adam*, https://arxiv.org/abs/2409.11321
    """

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        covariance_beta: float = 0.99,
        every: int = 25,
        eps: float = 1e-10,
    ) -> None:
        require(is_number(lr) and lr >= 0, "lr", lr, "a number of at least 0")
        require(len(betas) == 2, "betas", betas, "two numbers in [0, 1)")
        for name, value in {"betas[0]": betas[0], "betas[1]": betas[1], "covariance_beta": covariance_beta}.items():
            require(is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")
        require(is_whole(every, 1), "every", every, "an int of at least 1")
        require(is_number(eps) and eps > 0, "eps", eps, "a positive number")
        defaults = {"lr": lr, "betas": betas, "covariance_beta": covariance_beta, "every": every, "eps": eps}
        super().__init__(params, defaults)
        if len(self.param_groups) > 1:
            raise ValueError(f"params must be one group, got {len(self.param_groups)}: they share one basis")
        size = sum(param.numel() for param in self.param_groups[0]["params"])
        if size > MAX_WEIGHTS:
            raise ValueError(f"params must hold at most {MAX_WEIGHTS} numbers in all, got {size}; use torch.optim.Adam")

    def step(self, closure=None):
        """One update; a parameter without a gradient stays, and counts as one whose gradient is 0."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with plain(self.param_groups[0]["params"][0].device), torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        (group,) = self.param_groups
        params = group["params"]
        gradient = parameters_to_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        state = self.state[params[0]]  # of all of them
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["covariance"] = gradient.new_zeros(len(gradient), len(gradient))
            state["basis"] = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
        state["step"] += 1
        step, (beta1, beta2), blend = int(state["step"]), group["betas"], 1 - group["covariance_beta"]
        direction = gradient / gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
        state["covariance"].mul_(1 - blend).addr_(direction, direction, alpha=blend)
        if step % group["every"] == 0:
            _turn(state)
        rotated = state["basis"].T @ gradient
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        mean = state["basis"].T @ state["mean"] / (1 - beta1**step)
        root = (state["square"] / (1 - beta2**step)).sqrt()
        update = state["basis"] @ (mean / (root + group["eps"]))
        for param, piece in zip(params, update.split([param.numel() for param in params]), strict=True):
            if param.grad is not None:
                param.sub_(group["lr"] * piece.view_as(param))


def _turn(state: dict[str, Tensor]) -> None:
    """To the covariance's eigenbasis; the mean square is carried over as if its old coordinates were uncorrelated."""
    basis = torch.linalg.eigh(state["covariance"]).eigenvectors
    state["square"] = (basis.T @ state["basis"]).square() @ state["square"]
    state["basis"] = basis
