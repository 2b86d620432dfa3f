"""An MLP of the gradient as an ordinary ``torch.optim.Optimizer``, and what changes its weights on the way."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from l2l_fast import mlp
from l2l_fast.adaptive import AdaptiveMLP, CoordinatewiseMLP
from l2l_fast.checks import is_number, require
from l2l_fast.networks import digest
from l2l_fast.normalize import is_sharded
from l2l_fast.optim import LSTMOptimizer

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOMENTS = ("exp_avg", "exp_avg_sq")
ONLINE = "online"  # the entry of a state_dict that says where phi stands


class _Run(NamedTuple):
    """Parameters that have made as many steps, on one device: their coordinates lie one after another in a row."""

    params: list[Tensor]
    step: int

    def row(self, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])[None]

    def cut(self, row: Tensor) -> list[Tensor]:
        pieces = row[0].split([param.numel() for param in self.params])
        return [piece.view(param.shape) for piece, param in zip(pieces, self.params, strict=True)]


class MLPOptimizer(Optimizer):
    r"""An update rule that is a small MLP, with weights phi that stay, or that are changed at every step.

    h = (du/dphi)^T grad f(theta),   phi <- phi + LSTM_psi(h)
    theta <- theta - lr * weight_decay * theta + lr * u(z; phi)

    u(z; phi) is that of :class:`CoordinatewiseMLP`, z what it sees of the gradient. h is the one-step hypergradient: of
    the loss where the last update led, with respect to the weights that made it, so from the second step on. With an
    :class:`AdaptiveMLP` its LSTM changes phi; with ``phi_optimizer`` any optimizer does, such as
    ``functools.partial(torch.optim.SGD, lr=0.1)``, which is hypergradient descent; with neither phi stays.

    A coordinate whose gradient is not finite keeps its value and its moments, and one that has never had a gradient but
    0 keeps its value. The network is copied when the optimizer is made, and phi starts from its phi_0.

    Args:
        params: parameters, or param groups, each with its own ``lr``, ``weight_decay`` or ``maximize``.
        network: a :class:`CoordinatewiseMLP` or an :class:`AdaptiveMLP`; arithmetic and state are of its dtype.
        lr: multiplier of the update; the networks are trained for 1.
        weight_decay: decoupled weight decay, per unit of lr.
        maximize: ascend instead of descend.
        phi_optimizer: makes, from a list that holds phi, what changes it in place of the network's LSTM.

    Attributes:
        phi: the MLP's weights as they are by now, [P].

    Raises:
        ValueError: an option out of its range, or a state_dict that belongs to another network.
        TypeError: a ``network`` that is none, or a parameter that is complex, sharded or no floating-point tensor.
        RuntimeError: a sparse gradient; nothing is changed then.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = l2l.MLPOptimizer(model.parameters(), l2l.AdaptiveMLP())
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.phi.shape
        torch.Size([49])
    """

    def __init__(
        self,
        params,
        network: CoordinatewiseMLP | AdaptiveMLP,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        phi_optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    ) -> None:
        if not isinstance(network, CoordinatewiseMLP | AdaptiveMLP):
            raise TypeError(
                "network must be a CoordinatewiseMLP or an AdaptiveMLP, such as their from_pretrained gives, got "
                f"{torch.typename(network)}; LSTMOptimizer steps a CoordinatewiseLSTM"
            )
        require(phi_optimizer is None or callable(phi_optimizer), "phi_optimizer", phi_optimizer,
                "a function that makes an optimizer, or None")  # fmt: skip
        second = network.mlp if isinstance(network, AdaptiveMLP) else network
        self._scale, self._digest = second.output_scale, digest(network)[:16]
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})
        with torch.inference_mode(False), torch.no_grad():
            device = self.param_groups[0]["params"][0].device
            self.phi = second.flat_weights().detach().to(device, copy=True)
            self._phi_optimizer: Optimizer | None = None
            if phi_optimizer is not None:
                self._phi_optimizer = phi_optimizer([self.phi])
            elif isinstance(network, AdaptiveMLP):
                state = torch.float64 if self.phi.dtype == torch.float64 else torch.float32
                self._phi_optimizer = LSTMOptimizer([self.phi], copy.deepcopy(network.lstm), 1.0, state_dtype=state)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of parameters, with its own ``lr``, ``weight_decay`` or ``maximize`` if it names any."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        _check_options({**self.defaults, **group})
        for number, entry in enumerate(group["params"]):
            label, param = entry if isinstance(entry, tuple) else (f"number {number} of its group", entry)
            if isinstance(param, Tensor) and (param.dtype not in PARAM_DTYPES or is_sharded(param)):
                what = "sharded" if is_sharded(param) else str(param.dtype)
                raise TypeError(
                    f"parameter {label} is {what}; MLPOptimizer takes whole floating-point parameters, as phi follows "
                    "the gradients of all coordinates"
                )
        super().add_param_group(group)

    # ------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient, after one of phi.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            the closure's loss, or None.

        Raises:
            RuntimeError: a gradient that is sparse. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        signs = {}
        for number, group in enumerate(self.param_groups):
            for place, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"parameter {place} of param group {number} has a {param.grad.layout} gradient; MLPOptimizer "
                        "needs dense ones (for nn.Embedding: sparse=False)"
                    )
                signs[param] = -1 if group["maximize"] else 1
        gradients = {param: param.grad if sign > 0 else -param.grad for param, sign in signs.items()}
        if self._phi_optimizer is not None:
            self._move_phi(gradients, self._phi_optimizer)
        self._move(gradients)
        return loss

    def _move_phi(self, gradients: dict[Tensor, Tensor], optimizer: Optimizer) -> None:
        """Along what the gradients say of the updates before these."""
        seen = [param for param in gradients if "grad" in self.state[param]]
        if not seen:
            return
        total = torch.zeros_like(self.phi)
        for run in self._runs(seen):
            point = mlp.again(self._row(run, "grad"), *(self._row(run, name) for name in MOMENTS), run.step)
            phi = self.phi.to(point.features.device)[None]
            _, hidden = mlp.update(phi, point, self._scale)
            grads = run.row([gradients[param] for param in run.params], self.phi.dtype)
            total += mlp.pull_back(phi, point, hidden, grads, self._scale)[0].to(total.device)
        self.phi.grad = total
        optimizer.step()
        self.phi.grad = None

    def _move(self, gradients: dict[Tensor, Tensor]) -> None:
        for param in gradients:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                for name in MOMENTS:
                    state[name] = torch.zeros_like(param, dtype=self.phi.dtype, memory_format=torch.contiguous_format)
        options = {param: group for group in self.param_groups for param in group["params"]}
        for run in self._runs(list(gradients)):
            grads, moments = run.row([gradients[param] for param in run.params], self.phi.dtype), []
            moments = [self._row(run, name) for name in MOMENTS]
            point = mlp.observe_(grads, *moments, run.step + 1)
            updates, _ = mlp.update(self.phi.to(grads.device)[None], point, self._scale)
            for name, row in zip(MOMENTS, moments, strict=True):
                torch._foreach_copy_([self.state[param][name] for param in run.params], run.cut(row))
            pieces = zip(run.params, run.cut(updates), run.cut(grads.abs() < mlp.LIMIT), strict=True)
            for param, u, finite in pieces:
                lr, decay = options[param]["lr"], options[param]["weight_decay"]
                if decay:
                    param.sub_(torch.where(finite, lr * decay * param, 0.0))
                param.add_((lr * u).to(param.dtype))
                self.state[param]["step"] += 1
                if self._phi_optimizer is not None:
                    grad = gradients[param].detach().to(self.phi.dtype)
                    self.state[param]["grad"] = grad.clone(memory_format=torch.contiguous_format)

    def _runs(self, params: list[Tensor]) -> list[_Run]:
        found = defaultdict(list)
        for param in params:
            found[param.device, int(self.state[param]["step"])].append(param)
        return [_Run(held, step) for (_, step), held in found.items()]

    def _row(self, run: _Run, name: str) -> Tensor:
        return run.row([self.state[param][name] for param in run.params], self.phi.dtype)

    # ------------------------------------------------------------ state_dict, pickle

    def state_dict(self) -> dict:
        """As every optimizer's, with an entry more: phi, and the state of what changes it."""
        inner = self._phi_optimizer
        online = {"network": self._digest, "phi": self.phi, "phi_optimizer": inner and inner.state_dict()}
        return super().state_dict() | {ONLINE: online}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state_dict of the same network, on any device.

        Raises:
            ValueError: it belongs to another network, or lacks something; nothing is changed then.
        """
        online = state_dict.get(ONLINE)
        if not isinstance(online, dict) or {"network", "phi", "phi_optimizer"} - online.keys():
            raise ValueError(f"the state_dict has no whole entry {ONLINE!r}: it is not one of an MLPOptimizer")
        if online["network"] != self._digest:
            raise ValueError("the state_dict belongs to another network: make the optimizer with the one that it had")
        inner = self._phi_optimizer
        if (online["phi_optimizer"] is None) != (inner is None):
            raise ValueError("the state_dict's phi is changed by nothing, and this one's is, or the other way round: "
                             "make the optimizer with the phi_optimizer that it had")  # fmt: skip
        phi = online["phi"]
        shaped = isinstance(phi, Tensor) and phi.shape == self.phi.shape
        require(shaped, "phi of the state_dict", getattr(phi, "shape", phi), str(list(self.phi.shape)))
        self._require_state(state_dict)
        before = copy.deepcopy(inner.state_dict()) if inner is not None else {}
        try:
            if inner is not None:
                inner.load_state_dict(copy.deepcopy(online["phi_optimizer"]))
            super().load_state_dict({name: part for name, part in state_dict.items() if name != ONLINE})
        except Exception:
            if inner is not None:
                inner.load_state_dict(before)
            raise
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = {param: number for number, param in enumerate(params)}  # as state_dicts have them
        for param, state in self.state.items():  # torch casts to the parameter's dtype, and shares what it need not
            saved = state_dict["state"][numbers[param]]
            for name in (*MOMENTS, "grad"):
                if name in saved:
                    state[name] = saved[name].detach().to(param.device, self.phi.dtype, copy=True).contiguous()
            state["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu")
        with torch.no_grad():
            self.phi.copy_(phi)

    def _require_state(self, state_dict: dict) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        for param, number in zip(params, saved, strict=False):  # of another number of them torch says so itself
            state = state_dict["state"].get(number)
            if state is None:
                continue
            for name in (*MOMENTS, "grad"):
                value = state.get(name)
                if value is None and name == "grad":
                    continue
                good = isinstance(value, Tensor) and value.shape == param.shape
                require(good, f"{name} of the state_dict", getattr(value, "shape", value), f"of shape {param.shape}")
            require("step" in state, "step of the state_dict", None, "a number of steps")

    def __getstate__(self) -> dict:
        own = {name: getattr(self, name) for name in ("phi", "_phi_optimizer", "_scale", "_digest")}
        return {**super().__getstate__(), **own}


def _check_options(options: dict) -> None:
    for name in ("lr", "weight_decay"):
        value = options[name]
        number = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        require(is_number(number) and 0 <= number < math.inf, name, value, "finite and not negative")
    require(options["maximize"] in (True, False), "maximize", options["maximize"], "True or False")
