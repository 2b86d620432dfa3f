"""Optimizers that are an MLP of the gradient: as it is, and with weights that an LSTM changes while it is used."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor, nn

from l2l_fast import checkpoint, mlp
from l2l_fast.checks import is_number, require, whole
from l2l_fast.networks import SURROUNDINGS, CoordinatewiseLSTM


class CoordinatewiseMLP(nn.Module):
    r"""An MLP shared by every parameter of the optimizee; its only memory is two running moments for each coordinate.

    u = s (w2 . tanh(W1 z + b1) + b2)

    z are the ``"both"`` features of :class:`CoordinatewiseLSTM`: m^/sqrt(v^), d/sqrt(v^), log|d|/p and sign d of a
    gradient coordinate d, with decay rates 0.95 and p = 10. The tensors have the names and the shapes of the parameters
    of :class:`~l2l_fast.tasks.MetaTraining`, on which it is trained; :class:`MLPOptimizer` is what steps it.

    Args:
        hidden_size: H, units of the hidden layer.
        output_scale: s.

    Raises:
        ValueError: an option out of its range; the message names it.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = l2l.MLPOptimizer(model.parameters(), l2l.CoordinatewiseMLP())
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()

    References:
        Metz et al. 2019, https://arxiv.org/abs/1810.10180.
    """

    KIND = "CoordinatewiseMLP"

    def __init__(self, hidden_size: int = 8, *, output_scale: float = 0.1) -> None:
        super().__init__()
        require(is_number(output_scale) and output_scale > 0, "output_scale", output_scale, "a positive number")
        self.hidden_size, self.output_scale = whole("hidden_size", hidden_size, 1), float(output_scale)
        self.hidden, self.head = nn.Module(), nn.Module()
        for name, shape in mlp.weight_shapes(self.hidden_size).items():
            layer, kind = name.split(".")
            parameter = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="cpu"))
            getattr(self, layer).register_parameter(kind, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s own initialisation, but for a zero head bias: no drift at the start."""
        for name, inputs in (
            ("hidden.weight", mlp.FEATURES),
            ("hidden.bias", mlp.FEATURES),
            ("head.weight", self.hidden_size),
        ):
            nn.init.uniform_(self.get_parameter(name), -(inputs**-0.5), inputs**-0.5)
        nn.init.zeros_(self.get_parameter("head.bias"))

    @property
    def options(self) -> dict:
        """The constructor's arguments."""
        return {"hidden_size": self.hidden_size, "output_scale": self.output_scale}

    @property
    def rule(self) -> str:
        """All but the weights, as a text that identifies it."""
        return f"{self.KIND} {self.options!r}"

    def flat_weights(self) -> Tensor:
        """phi, all weights as one vector [P], differentiable."""
        return torch.cat([self.get_parameter(name).reshape(-1) for name in mlp.weight_shapes(self.hidden_size)])

    @torch.no_grad()
    def load_flat_weights_(self, flat: Tensor) -> None:
        """Copy a vector [P] into the weights.

        Raises:
            ValueError: a tensor of another shape; nothing is changed then.
        """
        _require_flat(flat, mlp.num_weights(self.hidden_size))
        for name, piece in zip(mlp.weight_shapes(self.hidden_size), mlp.split(flat, self.hidden_size), strict=True):
            self.get_parameter(name).copy_(piece)

    def forward(
        self, grads: Tensor, moments: tuple[Tensor, Tensor] | None = None, step: int = 1
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Updates u of a sequence of gradients; differentiable in the weights.

        Args:
            grads: [T, N], T steps of N coordinates, of the dtype of the network.
            moments: m and v before the first step, [N] each; zero if not given.
            step: number of the first step, counted from 1.

        Returns:
            updates [T, N] and the moments after the last step.
        """
        m, v = (torch.zeros_like(grads[0]) for _ in range(2)) if moments is None else (x.clone() for x in moments)
        phi, updates = self.flat_weights()[None], []
        for t, grad in enumerate(grads):
            point = mlp.observe_(grad[None], m[None], v[None], step + t)
            updates.append(mlp.update(phi, point, self.output_scale)[0][0])
        return torch.stack(updates), (m, v)

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, made if it is not there.

        Raises:
            OSError: it cannot be written; the network that was there is there still.
        """
        checkpoint.write(folder, self.options, self.state_dict(), self.KIND)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | PathLike) -> CoordinatewiseMLP:
        """What :meth:`save_pretrained` wrote into a folder, or a network that is shipped.

        Raises:
            FileNotFoundError: nothing of that name.
            ValueError: the folder's files are damaged, or of a network of another kind.
        """
        saved = checkpoint.read(name_or_folder, kind=cls.KIND)
        return _loaded(cls(**saved.options), saved)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class AdaptiveMLP(nn.Module):
    r"""An MLP that optimizes, and an LSTM that changes the MLP's weights at every step: the deck's three networks.

    theta <- theta + lr u(z; phi)                                    the MLP moves the optimizee
    h = (du/dphi)^T grad f(theta)                                    the one-step hypergradient, df(theta)/dphi
    phi <- phi + LSTM_psi(h)                                         the LSTM moves the MLP

    All coordinates of the optimizee share phi, which starts at phi_0 in every training and follows the losses there;
    each number of phi has its own LSTM state. phi_0 and psi are what meta-training learns
    (:class:`~l2l_fast.meta.AdaptiveTrainer`); :class:`MLPOptimizer` is what steps the pair.

    Args:
        mlp: with phi_0; a fresh one if None.
        lstm: with psi; its ``output_scale`` is how far phi may go in a step. If None, one with ``"both"`` features, 16
            units, a tanh output of 0.01 and a head of zeros, with which phi stays phi_0 until it is trained.

    Raises:
        ValueError: not these modules, or an ``lstm`` with ``update_rms``, ``input_rms`` or what goes with them.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> network = l2l.AdaptiveMLP()
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = l2l.MLPOptimizer(model.parameters(), network)
        >>> network.flat_weights().shape == (network.mlp_weights + network.lstm.flat_weights().numel(),)
        True

    References:
        Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474 (the LSTM); gradient descent on an optimizer's own
        hyperparameters: Chandra et al. 2022, https://arxiv.org/abs/1909.13371.
    """

    KIND = "AdaptiveMLP"
    mlp: CoordinatewiseMLP
    lstm: CoordinatewiseLSTM

    def __init__(self, mlp: CoordinatewiseMLP | None = None, lstm: CoordinatewiseLSTM | None = None) -> None:
        super().__init__()
        if lstm is None:
            lstm = CoordinatewiseLSTM("both", 16, 1, output="tanh", output_scale=0.01)
            nn.init.zeros_(lstm.head.weight)
        mlp = CoordinatewiseMLP() if mlp is None else mlp
        require(isinstance(mlp, CoordinatewiseMLP), "mlp", type(mlp).__name__, "a CoordinatewiseMLP or None")
        require(isinstance(lstm, CoordinatewiseLSTM), "lstm", type(lstm).__name__, "a CoordinatewiseLSTM or None")
        for name in SURROUNDINGS:
            require(not getattr(lstm, name), f"{name} of lstm", getattr(lstm, name), "off: phi is one small vector")
        self.mlp, self.lstm = mlp, lstm

    @property
    def mlp_weights(self) -> int:
        """P, the first numbers of :meth:`flat_weights`: phi_0."""
        return mlp.num_weights(self.mlp.hidden_size)

    @property
    def options(self) -> dict:
        """The options of both networks."""
        return {"mlp": self.mlp.options, "lstm": self.lstm.options}

    @property
    def rule(self) -> str:
        """All but the weights, as a text that identifies it."""
        return f"{self.KIND} {self.mlp.rule} {self.lstm.rule}"

    def flat_weights(self) -> Tensor:
        """phi_0 and psi as one vector [P + W], differentiable."""
        return torch.cat([self.mlp.flat_weights(), self.lstm.flat_weights()])

    @torch.no_grad()
    def load_flat_weights_(self, flat: Tensor) -> None:
        """Copy a vector [P + W] into both.

        Raises:
            ValueError: a tensor of another shape; nothing is changed then.
        """
        _require_flat(flat, self.flat_weights().numel())
        self.mlp.load_flat_weights_(flat[: self.mlp_weights])
        self.lstm.load_flat_weights_(flat[self.mlp_weights :])

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write both networks, as one, into ``folder``: ``model.safetensors`` and ``config.json``.

        Raises:
            OSError: it cannot be written; the network that was there is there still.

        Example:
            >>> import tempfile, l2l_fast as l2l
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     l2l.AdaptiveMLP().save_pretrained(folder)
            ...     network = l2l.AdaptiveMLP.from_pretrained(folder)
        """
        checkpoint.write(folder, self.options, self.state_dict(), self.KIND)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | PathLike) -> AdaptiveMLP:
        """What :meth:`save_pretrained` wrote into a folder, or a network that is shipped.

        Raises:
            FileNotFoundError: nothing of that name.
            ValueError: the folder's files are damaged, or of a network of another kind.
        """
        saved = checkpoint.read(name_or_folder, kind=cls.KIND)
        options = saved.options
        return _loaded(cls(CoordinatewiseMLP(**options["mlp"]), CoordinatewiseLSTM(**options["lstm"])), saved)


def _require_flat(flat: Tensor, size: int) -> None:
    require(isinstance(flat, Tensor) and flat.shape == (size,), "flat", getattr(flat, "shape", flat), f"[{size}]")


def _loaded(network, saved: checkpoint.Saved):
    dtypes = {tensor.dtype for tensor in saved.tensors.values()}
    try:
        network.to(*dtypes).load_state_dict(saved.tensors)
    except (RuntimeError, TypeError) as error:
        raise checkpoint.unfit(saved.path, error) from None
    return network
