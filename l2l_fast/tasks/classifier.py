"""Small networks that classify images: the optimizees of the paper, the deck and more."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from l2l_fast.data import HALVES, Dataset, digits, halves, mnist
from l2l_fast.modes import plain
from l2l_fast.tasks.base import Resident, look_up

ACTIVATIONS = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "elu": F.elu,
}  # fmt: skip
DATASETS = ("digits", "mnist")
KINDS = ("mlp", "conv")


class Classifier:
    r"""Training a small network with softmax cross-entropy on minibatches.

    f(theta) = -1/n sum_i log softmax(net_theta(x_i))[y_i],   i drawn with replacement from one half of the training set

    ``mlp``: flattened pixels, a linear layer and the activation per entry of ``hidden``, a last linear layer.
    ``conv``: a 3x3 convolution of stride 2 and the activation per entry of ``hidden`` (its channels), a linear layer.
    The stride stands in for pooling: many networks at once then cost a fraction of what pooled ones do on a CPU.

    Args:
        dataset: "digits", "mnist", or a :class:`~l2l_fast.data.Dataset` of your own, for "conv" with images
            [M, height, width] or [M, channels, height, width]. Named ones are read at first use, not before.
        hidden: units of the hidden layers, or channels of the convolutions; () is logistic regression.
        activation: "sigmoid", "tanh", "relu", "gelu", "silu" or "elu".
        kind: "mlp" or "conv".
        batch_size: n, the examples of a minibatch.
        init_scale: how a trajectory starts. "default": as ``torch.nn.Linear`` and ``Conv2d`` do, weights and biases
            U(-a, a) with a = 1/sqrt(fan_in). A number s: weights N(0, s^2), biases 0 (the paper's and the deck's MNIST
            networks have 0.01 or 0.001). A pair (low, high): the same, s drawn log-uniformly for each trajectory.
        pool: images are averaged over squares of this side first: MNIST in 14x14 (pool=2) costs a quarter.
        half: "meta-train", what optimizers may learn on, or "meta-test", what they are judged on.
        folder: where MNIST's files are looked for first, see :func:`l2l_fast.data.mnist`.
        name: what tables call it; None describes it.

    Raises:
        ValueError: if an option is none of these, naming it and what is allowed.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> task, generator = l2l.tasks.Classifier("digits"), torch.Generator().manual_seed(0)
        >>> task.loss(task.init(generator), task.sample(generator)).shape
        torch.Size([])
        >>> sum(param.numel() for param in task.init(generator).values())
        1510

    References:
        Andrychowicz et al. 2016, section 3.2, https://arxiv.org/abs/1606.04474
    """

    resample = True

    def __init__(
        self,
        dataset: str | Dataset,
        hidden: Sequence[int] = (20,),
        activation: str = "sigmoid",
        *,
        kind: str = "mlp",
        batch_size: int = 128,
        init_scale: float | tuple[float, float] | str = "default",
        pool: int = 1,
        half: str = "meta-train",
        folder: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            _one_of("dataset", dataset, DATASETS)
        _one_of("activation", activation, ACTIVATIONS)
        _one_of("kind", kind, KINDS)
        _one_of("half", half, HALVES)
        hidden = tuple(hidden)
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden must hold positive widths, got {hidden}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        self.dataset, self.hidden, self.activation, self.kind = dataset, hidden, activation, kind
        self.batch_size, self.pool, self.half, self.folder = batch_size, pool, half, folder
        self.init_scale = _checked_scale(init_scale)
        label = dataset.name if isinstance(dataset, Dataset) else dataset
        self.name = name or "-".join([label if pool == 1 else f"{label}/{pool}", kind, *map(str, hidden), activation])

    def with_half(self, half: str) -> Classifier:
        """The same task on ``half`` ("meta-train" or "meta-test") of the training set."""
        _one_of("half", half, HALVES)
        other = copy.copy(self)
        other.half = half
        for kept in ("_half", "_data", "_shapes"):
            other.__dict__.pop(kept, None)
        return other

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A freshly drawn network, as ``init_scale`` says; reads the data at first, whose shapes decide its own.

        Args:
            generator: of the CPU; all randomness comes from it.

        Returns:
            float32 ``{layer}.weight`` and ``{layer}.bias``, layers counted from 0: [units, inputs] or [channels out,
            channels in, 3, 3], and [units].

        Raises:
            ValueError: if ``kind`` or ``pool`` needs images and the data set has none, or its files are not the
                published ones.
            FileNotFoundError, RuntimeError, ImportError: as :func:`l2l_fast.data.digits` and
                :func:`l2l_fast.data.mnist`.
        """
        params = {}
        std = self._draw_std(generator)
        for layer, shape in self._shapes.items():
            weight = torch.empty(shape, dtype=torch.float32, device="cpu")
            bias = torch.zeros(shape[0], dtype=torch.float32, device="cpu")
            if std is None:
                bound = 1 / math.sqrt(math.prod(shape[1:]))
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)
            else:
                weight.normal_(0, std, generator=generator)
            params |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
        return params

    def sample(self, generator: torch.Generator) -> Tensor:
        """Rows [n] of the task's half, int64, on the CPU; :meth:`examples` has what stands there."""
        size = (self.batch_size,)
        return torch.randint(len(self._half), size, generator=generator, dtype=torch.int64, device="cpu")

    def examples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [n, ...], float32 as the network takes them, and targets [n], int64, on the device of ``rows``."""
        inputs, targets = self._data.on(rows.device)
        return look_up(inputs, rows), targets[rows]

    def loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        """Mean cross-entropy of one minibatch, in nats.

        -1/n sum_i log softmax(net(x_i))[y_i]

        Args:
            params: those of :meth:`init`, of any floating-point dtype.
            batch: rows [n] of :meth:`sample`, on the device of ``params``.

        Returns:
            0-dim, of the dtype of ``params``.
        """
        x, targets = self.examples(batch)
        x = x.to(params["0.weight"].dtype)
        activation = ACTIVATIONS[self.activation]
        for layer in range(len(self.hidden)):
            weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
            x = F.conv2d(x, weight, bias, stride=2, padding=1) if self.kind == "conv" else F.linear(x, weight, bias)
            x = activation(x)
        last = len(self.hidden)
        logits = F.linear(x.flatten(1), params[f"{last}.weight"], params[f"{last}.bias"])
        # Under vmap cross_entropy itself costs a little more than this gather, which is the same.
        return -F.log_softmax(logits, dim=1).gather(1, targets.unsqueeze(1)).mean()

    @functools.cached_property
    @plain()
    def _half(self) -> Dataset:
        """This task's half, with inputs as the network takes them."""
        dataset = self.dataset
        if dataset == "digits":
            dataset = digits()
        elif dataset == "mnist":
            dataset = mnist(self.folder)
        half = _pooled(halves(dataset)[self.half], self.pool)
        if self.kind == "mlp":
            inputs = half.inputs.flatten(1)
        elif half.inputs.ndim == 3:
            inputs = half.inputs.unsqueeze(1)
        elif half.inputs.ndim == 4:
            inputs = half.inputs
        else:
            raise ValueError(
                f'kind="conv" needs images [M, height, width] or [M, channels, height, width]; {half.name} has '
                f"{list(half.inputs.shape)}"
            )
        return Dataset(half.name, inputs.contiguous(), half.targets, half.classes)

    @functools.cached_property
    def _data(self) -> Resident:
        return Resident((self._half.inputs, self._half.targets))

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each layer's weight."""
        inputs, classes = self._half.inputs, self._half.classes
        shapes: list[tuple[int, ...]] = []
        width, image = inputs.shape[1], inputs.shape[2:]
        for units in self.hidden:
            shapes.append((units, width, 3, 3) if self.kind == "conv" else (units, width))
            width, image = units, [(side + 1) // 2 for side in image]
        shapes.append((classes, width * math.prod(image)))  # an mlp has no image, and the product over nothing is 1
        return {str(layer): shape for layer, shape in enumerate(shapes)}

    def _draw_std(self, generator: torch.Generator) -> float | None:
        if self.init_scale == "default":
            return None
        if isinstance(self.init_scale, float):
            return self.init_scale
        low, high = map(math.log, self.init_scale)
        drawn = torch.rand((), generator=generator, dtype=torch.float64, device="cpu").item()
        return math.exp(low + (high - low) * drawn)


def _pooled(dataset: Dataset, side: int) -> Dataset:
    """Images in averages over squares; what is left over at an edge is dropped."""
    if side == 1:
        return dataset
    images = dataset.inputs
    if images.ndim not in (3, 4) or min(images.shape[-2:]) < side:
        raise ValueError(f"pool={side} needs images of at least that size; {dataset.name} has {list(images.shape)}")
    squares = F.avg_pool2d(images.unsqueeze(1) if images.ndim == 3 else images, side)
    return Dataset(dataset.name, squares.squeeze(1) if images.ndim == 3 else squares, dataset.targets, dataset.classes)


def _one_of(option: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{option} must be one of {', '.join(allowed)}; got {value!r}")


def _checked_scale(scale) -> float | tuple[float, float] | str:
    if isinstance(scale, str):
        if scale == "default":
            return scale
    elif isinstance(scale, (int, float)):
        if 0 <= scale < math.inf:
            return float(scale)
    elif isinstance(scale, Sequence) and len(scale) == 2 and 0 < scale[0] <= scale[1] < math.inf:
        return float(scale[0]), float(scale[1])
    raise ValueError(
        f'init_scale must be "default", a standard deviation >= 0, or a pair 0 < low <= high; got {scale!r}'
    )
