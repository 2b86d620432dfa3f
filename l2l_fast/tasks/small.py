"""Small networks of many kinds, to meta-train a rule for any network on. Each is a :class:`ModuleTask`.

Their data are the half of the images that :mod:`~l2l_fast.tasks.workloads` does not use, random functions, and the
source code of Python's standard library, of which those see nothing.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_fast.checks import require
from l2l_fast.tasks.module import ModuleTask
from l2l_fast.tasks.workloads import Attention, float32_task, places, pooled, token_loss

LAYERS = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}


# ---------------------------------------------------------------- data


@functools.cache
def source() -> tuple[Tensor, int]:
    """Source code of the standard library by characters, int64 [characters], and how many there are of them."""
    import argparse
    import ast
    import calendar
    import configparser
    import datetime
    import difflib
    import fractions

    modules = argparse, ast, calendar, configparser, datetime, difflib, fractions
    whole = "".join(map(inspect.getsource, modules))
    alphabet = sorted(character for character in set(whole) if whole.count(character) > 20)
    place = {character: number for number, character in enumerate(alphabet)}
    ids = [place[character] for character in whole if character in place]
    return torch.tensor(ids, dtype=torch.int64, device="cpu"), len(alphabet)


def _windows(length: int, stride: int) -> tuple[Tensor, Tensor, int]:
    """Windows [M, length] to learn on, those of the last tenth, and the number of characters."""
    ids, characters = source()
    windows = ids.unfold(0, length, stride)
    cut = len(windows) * 9 // 10
    return windows[:cut], windows[cut:], characters


@functools.cache
def teacher(inputs: int, outputs: int, rows: int, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """A random sum of 24 random waves, with noise, each output with variance 1; [rows, inputs], [rows, outputs]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    x = normal(rows, inputs) * (0.5 * normal(inputs)).exp()  # columns of several scales
    y = torch.sin(1.5 * x @ normal(inputs, 24) / inputs**0.5 + normal(24)) @ normal(24, outputs)
    y = y + noise * y.std() * normal(rows, outputs)
    return x, (y - y.mean(0)) / y.std(0)


# ---------------------------------------------------------------- modules


def layers(widths: Sequence[int], activation: str, norm: bool) -> nn.Sequential:
    """Linear layers with the activation between them, after a LayerNorm where there is ``norm``."""
    parts: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        if place:
            parts += [nn.LayerNorm(inputs)] * norm + [LAYERS[activation]()]
        parts.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*parts)


class Context(nn.Module):
    """The next character's logits [B, characters] from those before it, [B, length]."""

    def __init__(self, characters: int, length: int, width: int, hidden: Sequence[int], activation: str, norm: bool):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.net = layers((length * width, *hidden, characters), activation, norm)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.embedding(ids).flatten(1))


class Block(nn.Module):
    """A transformer of one block; characters [B, L] to logits [B, L, characters]."""

    def __init__(self, characters: int, length: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(characters, width), places(length, width)
        self.block, self.norm = Attention(width, heads, causal=True), nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.embedding(ids) + self.place)))


# ---------------------------------------------------------------- tasks


def _known(activation: str) -> None:
    require(activation in LAYERS, "activation", activation, f"one of {tuple(LAYERS)}")


def image_mlp(
    name: str = "small-mlp",
    data: str = "mnist",
    pool: int = 4,
    hidden: Sequence[int] = (32,),
    activation: str = "relu",
    norm: bool = False,
    batch_size: int = 64,
) -> ModuleTask:
    """Classes of images, averaged over squares; cross-entropy."""
    _known(activation)
    train, held_out, side = pooled(data, pool, "meta-train")
    flat = [(pixels.flatten(1), classes) for pixels, classes in (train, held_out)]
    make = functools.partial(layers, (side**2, *hidden, 10), activation, norm)
    return float32_task(make, flat[0], F.cross_entropy, batch_size, name, flat[1])


def regression(
    name: str = "small-regression",
    inputs: int = 8,
    outputs: int = 1,
    hidden: Sequence[int] = (32, 32),
    activation: str = "relu",
    norm: bool = False,
    batch_size: int = 64,
    noise: float = 0.2,
    rows: int = 2000,
    seed: int = 0,
) -> ModuleTask:
    """A random function of a few numbers (:func:`teacher`); squared error."""
    _known(activation)
    x, y = teacher(inputs, outputs, rows, noise, seed)
    cut = rows * 4 // 5
    make = functools.partial(layers, (inputs, *hidden, outputs), activation, norm)
    return float32_task(make, (x[:cut], y[:cut]), F.mse_loss, batch_size, name, (x[cut:], y[cut:]))


def text_mlp(
    name: str = "small-text-mlp",
    length: int = 4,
    width: int = 16,
    hidden: Sequence[int] = (48,),
    activation: str = "relu",
    norm: bool = False,
    batch_size: int = 64,
) -> ModuleTask:
    """The next character of source code from a few before it."""
    _known(activation)
    train, held_out, characters = _windows(length + 1, 3)
    parts = [(part[:, :-1].contiguous(), part[:, -1].contiguous()) for part in (train, held_out)]
    make: Callable = functools.partial(Context, characters, length, width, hidden, activation, norm)
    return float32_task(make, parts[0], F.cross_entropy, batch_size, name, parts[1])


def text_transformer(
    name: str = "small-transformer", length: int = 16, width: int = 16, heads: int = 2, batch_size: int = 16
) -> ModuleTask:
    """The next character of source code, by one block of attention."""
    train, held_out, characters = _windows(length + 1, 5)
    parts = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in (train, held_out)]
    make = functools.partial(Block, characters, length, width, heads)
    return float32_task(make, parts[0], token_loss, batch_size, name, parts[1])


SMALL: dict[str, tuple[Callable[..., ModuleTask], dict]] = {
    "digits-small-mlp": (image_mlp, {"data": "digits", "pool": 1}),
    "mnist-small-mlp": (image_mlp, {"data": "mnist", "pool": 4}),
    "small-regression": (regression, {}),
    "small-text-mlp": (text_mlp, {}),
    "small-transformer": (text_transformer, {}),
}
