"""The learned optimizer as an ``nn.Module`` that holds the meta-parameters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from operator import attrgetter
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from l2l_fast import checkpoint, normalize, ops
from l2l_fast.checks import is_number, is_whole, require
from l2l_fast.config import (
    FEATURES,
    MAX_LAYERS,
    OUTPUTS,
    Config,
    has_moments,
    num_weights,
    split_weights,
    weight_shapes,
)

MAX_HIDDEN = 64  # units of a network that is made; the ops take more
# Options that are no part of the config, which is what the ops compute: they give u, and this is what is made of it.
SURROUNDINGS = ("update_rms", "max_update_rms", "input_rms", "orthogonalize")


class CoordinatewiseLSTM(nn.Module):
    r"""An LSTM shared by every parameter of the optimizee, with a state of its own for each coordinate.

    (u, state) <- head(LSTM(projection(features(grad)), state));   u = s * y   or   u = s * tanh(y)

    Args:
        features: what the LSTM sees of a gradient coordinate d. ``"identity"``: d itself. ``"log_sign"``: log|d|/p and
            sign d, or -1 and e^p d where \|d| < e^-p. ``"moments"``: m^/(sqrt(v^)+eps) and d/(sqrt(v^)+eps) with
            bias-corrected running moments m^, v^. ``"both"``: the moments, then log_sign.
        hidden_size: units of each LSTM layer, 1 to 64.
        num_layers: stacked LSTM layers, at least 1.
        projection: put ELU(Linear(features -> hidden_size)) before the first layer.
        linear_path: add a linear function of the features to y: y = head(h) + linear.weight . features. It begins at 0.
            With moments it begins at -m^/(sqrt(v^)+eps) and the head at 0, so training starts from Adam's direction
            (u = -s * m^/(sqrt(v^)+eps) with linear output) and learns what to add.
        output: ``"linear"`` or ``"tanh"``.
        output_scale: s; with ``"tanh"`` the largest possible update.
        preprocess_p: p of the ``log_sign`` features.
        betas: decay rates of m and v.
        eps: added to sqrt(v^).
        update_rms: None: an optimizer moves a parameter by lr * u. A number r: by lr * r * u / RMS(u), the root mean
            square being over the parameter's whole tensor, so that ``lr`` alone is the size of a step, as it is for
            AdamW. It belongs to the optimizer's step and to meta-training: :meth:`forward`, which knows no tensors,
            gives u.
        max_update_rms: None: every update has that size. A number: r is what gradients of pure noise get, and the more
            a tensor's gradients agree from step to step, the larger is its update, up to this; with five times r, as
            large as Adam's are (:func:`~l2l_fast.normalize.update_sizes_`). Needs moments and ``update_rms``.
        input_rms: None: the LSTM sees gradients as they are. A number c: c * d / sqrt(mean d^2), the mean being over
            the parameter's whole tensor and, with decay rate ``betas[1]``, over the steps so far. The loss may then be
            in any unit, and layers have gradients of any size. As ``update_rms`` it belongs to the step.
        orthogonalize: what an optimizer does whose own ``orthogonalize`` is None: whether u of a matrix is added to its
            orthogonalized momentum. Needs moments and ``update_rms``.

    Attributes:
        default_lr: the optimizer's and the meta-trainer's where none is given: 1, which u is trained for, and AdamW's
            0.001 with ``update_rms``.

    Raises:
        ValueError: an option out of its range; the message names the option and the values allowed.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> network = l2l.CoordinatewiseLSTM("moments", hidden_size=8, num_layers=1, output="tanh")
        >>> updates, state = network(torch.randn(20, 100))  # 20 steps of 100 coordinates
        >>> updates.shape, state.shape
        (torch.Size([20, 100]), torch.Size([100, 18]))

    References:
        Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474 (log_sign, linear output);
        Lv, Jiang and Li 2017, https://arxiv.org/abs/1703.03633 (moments, projection, tanh output).
    """

    max_update_rms: float | None = None  # of networks that an earlier version pickled

    def __init__(
        self,
        features: str = "log_sign",
        hidden_size: int = 20,
        num_layers: int = 2,
        *,
        projection: bool = False,
        linear_path: bool = False,
        output: str = "linear",
        output_scale: float = 0.1,
        preprocess_p: float = 10.0,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        update_rms: float | None = None,
        max_update_rms: float | None = None,
        input_rms: float | None = None,
        orthogonalize: bool = False,
    ) -> None:
        super().__init__()
        known = isinstance(features, str) and features in FEATURES
        require(known, "features", features, f"one of {', '.join(map(repr, FEATURES))}")
        for name, count, most in (("hidden_size", hidden_size, MAX_HIDDEN), ("num_layers", num_layers, MAX_LAYERS)):
            require(is_whole(count, 1) and count <= most, name, count, f"an int from 1 to {most}")
        require(isinstance(projection, bool), "projection", projection, "True or False")
        require(isinstance(linear_path, bool), "linear_path", linear_path, "True or False")
        require(
            isinstance(output, str) and output in OUTPUTS, "output", output, f"one of {', '.join(map(repr, OUTPUTS))}"
        )
        require(is_number(output_scale) and output_scale > 0, "output_scale", output_scale, "a positive number")
        good = is_number(preprocess_p) and 0 < preprocess_p <= 80
        require(good, "preprocess_p", preprocess_p, "a number in (0, 80]")
        pair = isinstance(betas, Sequence) and len(betas) == 2
        good = pair and all(is_number(beta) and 0 <= beta < 1 for beta in betas)
        require(good, "betas", betas, "two numbers in [0, 1)")
        require(is_number(eps) and eps > 0, "eps", eps, "a positive number")
        sizes = {"update_rms": update_rms, "max_update_rms": max_update_rms, "input_rms": input_rms}
        for name, value in sizes.items():
            require(value is None or (is_number(value) and value > 0), name, value, "a positive number or None")
        require(isinstance(orthogonalize, bool), "orthogonalize", orthogonalize, "True or False")
        self.config = Config(
            features, hidden_size, num_layers, projection, output, float(output_scale), float(preprocess_p),
            float(betas[0]), float(betas[1]), float(eps), linear_path,
        )  # fmt: skip
        self.update_rms = None if update_rms is None else float(update_rms)
        self.max_update_rms = None if max_update_rms is None else float(max_update_rms)
        self.input_rms = None if input_rms is None else float(input_rms)
        self.orthogonalize = orthogonalize
        reason = normalize.no_momentum(self.config, self.update_rms)
        if orthogonalize and reason:
            raise ValueError(f"orthogonalize must be False for a network {reason}")
        if max_update_rms is not None and reason:
            raise ValueError(f"max_update_rms must be None for a network {reason}")
        if max_update_rms is not None and update_rms is not None:
            text = f"update_rms, {update_rms}, or more"
            require(max_update_rms >= update_rms, "max_update_rms", max_update_rms, text)
        inputs = FEATURES[features]
        if projection:
            self.projection = nn.Linear(inputs, hidden_size)
        for name, shape in weight_shapes(self.config).items():
            if name.startswith(("weight_", "bias_")):
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.head = nn.Linear(hidden_size, 1)
        if linear_path:
            self.linear = nn.Linear(inputs, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.LSTM``'s and ``nn.Linear``'s own initialisation, but for a zero head bias: no drift at the start.

        A linear path begins at zero; with moments at -1 for m^/(sqrt(v^)+eps), and the head at zero: Adam's direction.
        """
        bound = 1 / math.sqrt(self.config.hidden_size)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
        if self.config.projection:
            self.projection.reset_parameters()
        self.head.reset_parameters()
        nn.init.zeros_(self.head.bias)
        if self.config.linear_path:
            nn.init.zeros_(self.linear.weight)
            if has_moments(self.config):
                nn.init.zeros_(self.head.weight)
                nn.init.constant_(self.linear.weight[:, :1], -1.0)

    def forward(self, grads: Tensor, state: Tensor | None = None, step: Tensor | int = 1) -> tuple[Tensor, Tensor]:
        """Updates u of a sequence of gradients, before ``update_rms``; differentiable once.

        Args:
            grads: [T, N], T steps of N coordinates, of the dtype of the network.
            state: [N, S] before the first step, float32, bfloat16 or float64; zero if not given.
            step: number of the first step, counted from 1 (the moments' bias correction).

        Returns:
            updates [T, N] and the state [N, S] after the last step, S numbers per coordinate.

        Raises:
            RuntimeError: a tensor of another shape, dtype or device.
        """
        state = self.init_state(grads.new_empty(grads.shape[1:])) if state is None else state
        return ops.lstm_unroll(grads, state, self.flat_weights(), self.config, step)

    def init_state(self, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Zero state ``(*param.shape, S)`` for a parameter; its dtype is the network's unless given."""
        return ops.new_state(param, self.config, dtype or self.head.weight.dtype)

    def flat_weights(self) -> Tensor:
        """All meta-parameters as one vector [W], differentiable, in the order the ops take."""
        # By attribute: torch.func's tensors and parametrized weights are no nn.Parameters.
        named = [attrgetter(name)(self) for name in weight_shapes(self.config)]
        return torch.cat([weight.reshape(-1) for weight in named])

    @torch.no_grad()
    def load_flat_weights_(self, flat: Tensor) -> None:
        """Copy a vector [W] into the meta-parameters.

        Raises:
            ValueError: a tensor of another shape; nothing is changed then.
            AttributeError: a weight is parametrized, so it is computed and cannot be written; nothing is changed then.
        """
        shape = (num_weights(self.config),)
        require(isinstance(flat, Tensor), "flat", flat, f"a tensor {list(shape)}")
        require(flat.shape == shape, "shape of flat", tuple(flat.shape), str(shape))
        named = split_weights(flat, self.config)
        parameters = [self.get_parameter(name) for name in named]
        for parameter, piece in zip(parameters, named.values(), strict=True):
            parameter.copy_(piece)

    @property
    def options(self) -> dict:
        """The constructor's arguments."""
        options = self.config._asdict()
        options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        return options | {name: getattr(self, name) for name in SURROUNDINGS}

    @property
    def rule(self) -> str:
        """All but the weights, as a text that identifies it: of networks with the same, equal weights step alike."""
        config = repr(self.config).replace(", linear_path=False", "")  # the text of before there was one
        sizes = {name: getattr(self, name) for name in SURROUNDINGS if name != "orthogonalize"}  # an optimizer's choice
        return config + "".join(f" {name}={size!r}" for name, size in sizes.items() if size is not None)

    @property
    def default_lr(self) -> float:
        return 1.0 if self.update_rms is None else 1e-3

    @classmethod
    def _blank(cls, **options) -> CoordinatewiseLSTM:
        """A network on the CPU whose weights are still to be loaded; draws no random numbers."""
        with torch.device("meta"):
            network = cls(**options)
        return network.to_empty(device="cpu")

    @classmethod
    def from_torch(cls, lstm: nn.LSTM, head: nn.Linear, **options) -> CoordinatewiseLSTM:
        """The same optimizer from weights made with ``nn.LSTM`` and ``nn.Linear``.

        Args:
            lstm: one direction, with biases, without ``proj_size`` and dropout; ``input_size`` = number of features.
            head: ``nn.Linear(hidden_size, 1)``.
            options: the remaining options of the constructor; ``hidden_size`` and ``num_layers`` are the LSTM's.

        Raises:
            ValueError: if the modules are not of that form; the message names what differs.

        Example:
            >>> from torch import nn
            >>> import l2l_fast as l2l
            >>> network = l2l.CoordinatewiseLSTM.from_torch(nn.LSTM(2, 20, 2), nn.Linear(20, 1))
        """
        require(not lstm.bidirectional, "lstm.bidirectional", True, "False")
        require(lstm.bias, "lstm.bias", False, "True")
        require(lstm.proj_size == 0, "lstm.proj_size", lstm.proj_size, "0")
        require(lstm.dropout == 0, "lstm.dropout", lstm.dropout, "0")
        require(head.bias is not None, "head.bias", None, "a bias")
        network = cls._blank(hidden_size=lstm.hidden_size, num_layers=lstm.num_layers, **options)
        tensors = lstm.state_dict() | {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
        for name, shape in weight_shapes(network.config).items():
            option = {"projection.weight": "projection", "linear.weight": "linear_path"}.get(name)
            if option:
                raise ValueError(f"{option} must be False: from_torch takes an nn.LSTM and a head alone")
            require(tuple(tensors[name].shape) == shape, f"shape of {name}", tuple(tensors[name].shape), str(shape))
        network.to(tensors["weight_ih_l0"].dtype).load_state_dict(tensors)
        return network

    def save_pretrained(self, folder: str | PathLike) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, made if it is not there.

        Args:
            folder: where; other files in it stay.

        Raises:
            OSError: it cannot be written; the network that was there is there still.

        Example:
            >>> import tempfile, l2l_fast as l2l
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     l2l.CoordinatewiseLSTM().save_pretrained(folder)
            ...     network = l2l.CoordinatewiseLSTM.from_pretrained(folder)
        """
        checkpoint.write(folder, self.options, self.state_dict())

    @classmethod
    def from_pretrained(cls, name_or_folder: str | PathLike, *, revision: str | None = None) -> CoordinatewiseLSTM:
        """A trained network.

        Args:
            name_or_folder: a shipped name (:func:`l2l_fast.checkpoint.shipped`), a folder written by
                :meth:`save_pretrained` (``./NAME`` where NAME is a shipped one), or a hub id ``owner/name``.
            revision: of the hub id: a branch, tag or commit.

        Raises:
            FileNotFoundError: nothing of that name; the message lists the shipped names.
            ImportError: a hub id without huggingface_hub; the message has the command that installs it.
            ValueError: the folder's files are damaged, or of a later format.
        """
        saved = checkpoint.read(name_or_folder, revision=revision)
        try:
            network = cls._blank(**saved.options)
        except TypeError as error:
            raise ValueError(f"{saved.path}: {error}; upgrade l2l_fast or save the network again") from None
        try:
            network.to(saved.tensors["head.weight"].dtype).load_state_dict(saved.tensors)
        except (RuntimeError, KeyError) as error:
            raise checkpoint.unfit(saved.path, error) from None
        return network

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


@torch.no_grad()
def digest(network: Any) -> str:
    """What tells a network, of any kind that has a ``rule`` and flat weights, from all others; hexadecimal."""
    weights = network.flat_weights().detach().double().cpu().numpy()
    return hashlib.sha256(network.rule.encode() + weights.tobytes()).hexdigest()
