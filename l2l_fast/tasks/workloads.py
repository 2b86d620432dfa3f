"""Small versions of what people train: language models, image models, regression. Each is a :class:`ModuleTask`.

Their data are MNIST, pooled to 14x14 (the digits of scikit-learn where ``data="digits"``), Friedman's function, and the
manual that comes with Python. Each holds data back ("meta-test") on which to judge a trained network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_fast.data import Dataset, digits, halves, mnist
from l2l_fast.tasks.module import ModuleTask

LENGTH = 48  # characters of a text that are seen at once


# ---------------------------------------------------------------- data


@functools.cache
def text(length: int = LENGTH) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], int]:
    """Python's manual (``pydoc_data``) by characters.

    Returns:
        (inputs, targets), int64 [M, length] each, to learn on; the same of the last tenth; the number of characters.
    """
    from pydoc_data.topics import topics

    whole = "".join(topics[name] for name in sorted(topics))[:300_000]
    alphabet = {character: place for place, character in enumerate(sorted(set(whole)))}
    ids = torch.tensor([alphabet[character] for character in whole], dtype=torch.int64, device="cpu")
    cut = len(ids) * 9 // 10
    halves = []
    for part in (ids[:cut], ids[cut:]):
        windows = part.unfold(0, length + 1, 7)
        halves.append((windows[:, :-1].contiguous(), windows[:, 1:].contiguous()))
    return *halves, len(alphabet)


def images(data: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Those that the workloads have: of the half that no shipped network was trained on, MNIST in 14x14."""
    return pooled(data, 2 if data == "mnist" else 1, "meta-test")


@functools.cache
def pooled(data: str, pool: int, half: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Images [M, 1, side, side] with mean 0 and variance 1 over all pixels, classes [M]; held-out ones; the side."""
    if data not in ("mnist", "digits"):
        raise ValueError(f"data must be 'mnist' or 'digits', got {data!r}")
    dataset: Dataset = halves(mnist() if data == "mnist" else digits())[half]
    pixels = dataset.inputs.reshape(len(dataset), 1, *dataset.inputs.shape[-2:])
    pixels = F.avg_pool2d(pixels, pool) if pool > 1 else pixels
    cut = len(dataset) * 5 // 6
    pixels = (pixels - pixels[:cut].mean()) / pixels[:cut].std()
    return (pixels[:cut], dataset.targets[:cut]), (pixels[cut:], dataset.targets[cut:]), pixels.shape[-1]


@functools.cache
def friedman(rows: int = 12_500) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Friedman's function of five of ten inputs, with noise, in its own standard deviations; [M, 10] and [M, 1].

    y = 10 sin(pi x0 x1) + 20 (x2 - 1/2)^2 + 10 x3 + 5 x4 + N(0, 1)
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 10, generator=generator, dtype=torch.float32, device="cpu")
    y = 10 * (math.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5).square() + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + torch.randn(rows, generator=generator, dtype=torch.float32, device="cpu")
    y = ((y - y.mean()) / y.std())[:, None]
    cut = rows * 4 // 5
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


# ---------------------------------------------------------------- modules


def places(count: int, width: int) -> nn.Parameter:
    """What is added to each place in a sequence."""
    return nn.Parameter(0.02 * torch.randn(count, width, dtype=torch.float32, device="cpu"))


class Attention(nn.Module):
    """A block of attention and two linear layers, each after a LayerNorm; [B, L, width] to the same."""

    def __init__(self, width: int, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        # Not scaled_dot_product_attention, which torch.vmap cannot batch and which has no second derivative on CPUs.
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if self.causal:
            scores = scores.masked_fill(scores.new_ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        mixed = scores.softmax(-1) @ value
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters [B, L] to logits [B, L, characters]."""

    def __init__(self, characters: int, width: int = 64, blocks: int = 2, length: int = LENGTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.place = places(length, width)
        self.blocks = nn.Sequential(*(Attention(width, causal=True) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.place)))


class VisionTransformer(nn.Module):
    """Images [B, 1, side, side] to ten logits, by patches of 2x2."""

    def __init__(self, side: int, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.place = places((side // 2) ** 2, width)
        self.blocks = nn.Sequential(*(Attention(width) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM over characters [B, L]; logits [B, L, characters]."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(characters, width // 2), nn.LSTM(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


def convolutions(side: int) -> nn.Module:
    """Two convolutions, each with BatchNorm and pooling, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24 * (side // 4) ** 2, 10),
    )  # fmt: skip


def perceptron(*widths: int, flat: bool = True) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()] if flat else []
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [nn.ReLU()] * (place > 0) + [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


# ---------------------------------------------------------------- tasks


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every place in a text: logits [B, L, characters], targets [B, L]."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _pixels(found: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(found, wanted.flatten(1))


def float32_task(make: Callable[[], nn.Module], train, loss_fn, batch_size: int, name: str, held_out) -> ModuleTask:
    """A task of modules that are float32 whatever torch's default is."""

    def in_float32() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return make()
        finally:
            torch.set_default_dtype(before)

    return ModuleTask(in_float32, train, loss_fn, batch_size=batch_size, name=name, test_data=held_out)


def _text_task(make: Callable[[int], nn.Module], name: str, batch_size: int = 16) -> ModuleTask:
    train, held_out, characters = text()
    return float32_task(lambda: make(characters), train, token_loss, batch_size, name, held_out)


def _image_task(make: Callable[[int], nn.Module], name: str, data: str, batch_size: int) -> ModuleTask:
    train, held_out, side = images(data)
    return float32_task(lambda: make(side), train, F.cross_entropy, batch_size, name, held_out)


def transformer_lm(name: str = "transformer-lm", batch_size: int = 8) -> ModuleTask:
    """A language model of characters: two blocks of width 64."""
    return _text_task(Transformer, name, batch_size)


def recurrent_lm(name: str = "recurrent-lm", batch_size: int = 16) -> ModuleTask:
    """A language model of characters: an LSTM of width 64."""
    return _text_task(Recurrent, name, batch_size)


def vision_transformer(name: str = "vision-transformer", data: str = "mnist", batch_size: int = 32) -> ModuleTask:
    """Two blocks of width 32 over patches of 2x2."""
    return _image_task(VisionTransformer, name, data, batch_size)


def cnn_batchnorm(name: str = "cnn-batchnorm", data: str = "mnist", batch_size: int = 64) -> ModuleTask:
    """Two convolutions with BatchNorm."""
    return _image_task(convolutions, name, data, batch_size)


def autoencoder(name: str = "autoencoder", data: str = "mnist", batch_size: int = 64) -> ModuleTask:
    """Images by way of 16 numbers; squared error."""
    (train, _), (held_out, _), side = images(data)
    make = functools.partial(perceptron, side**2, 128, 16, 128, side**2)
    return float32_task(make, (train, train), _pixels, batch_size, name, (held_out, held_out))


def tabular_regression(name: str = "tabular-regression", batch_size: int = 64) -> ModuleTask:
    """Friedman's function; squared error."""
    train, held_out = friedman()
    make = functools.partial(perceptron, 10, 64, 64, 1, flat=False)
    return float32_task(make, train, F.mse_loss, batch_size, name, held_out)


def wide_mlp(name: str = "wide-mlp", data: str = "mnist", batch_size: int = 64) -> ModuleTask:
    """One hidden layer of 512 ReLU units."""
    return _image_task(lambda side: perceptron(side**2, 512, 10), name, data, batch_size)


def deep_mlp(name: str = "deep-mlp", data: str = "mnist", batch_size: int = 64) -> ModuleTask:
    """Six hidden layers of 48 ReLU units."""
    return _image_task(lambda side: perceptron(side**2, *[48] * 6, 10), name, data, batch_size)


WORKLOADS: dict[str, Callable[..., ModuleTask]] = {
    "transformer-lm": transformer_lm,
    "vision-transformer": vision_transformer,
    "recurrent-lm": recurrent_lm,
    "cnn-batchnorm": cnn_batchnorm,
    "autoencoder": autoencoder,
    "tabular-regression": tabular_regression,
    "wide-mlp": wide_mlp,
    "deep-mlp": deep_mlp,
}
