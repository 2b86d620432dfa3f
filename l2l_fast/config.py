"""What a coordinatewise LSTM computes, and how its weights and its state are laid out: the twin of csrc/network.h."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FEATURES = {"identity": 1, "log_sign": 2, "moments": 2, "both": 4}
OUTPUTS = ("linear", "tanh")

# What the kernels take; a network that is made has fewer units, for speed is what it is for.
MAX_HIDDEN, MAX_LAYERS = 4096, 64
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Config(NamedTuple):
    """What a coordinatewise LSTM computes; the fields are the ops' scalar arguments, in the schema's order."""

    features: str
    hidden_size: int
    num_layers: int
    projection: bool
    output: str
    output_scale: float
    preprocess_p: float
    beta1: float
    beta2: float
    eps: float
    linear_path: bool = False

    @classmethod
    def of(cls, features: str | int, *fields) -> Config:
        """From names, or from the ops' arguments: ``features`` and ``output`` as places in FEATURES and OUTPUTS."""
        if isinstance(features, str):
            return cls(features, *fields)
        config = cls(tuple(FEATURES)[features], *fields)
        return config._replace(output=OUTPUTS[fields[3]])


def has_moments(config: Config) -> bool:
    return config.features in ("moments", "both")


def gradient_limit(config: Config, arithmetic: torch.dtype, state: torch.dtype) -> float:
    """The magnitude from which on a gradient counts as not finite, given the dtypes of the weights and of the state.

    Below it the state stays finite. Moments square a gradient, and an infinite v would never come down again. As it is,
    it meets weights (up to a thousand or so, twice), and a sum of products that overflow is NaN. A logarithm is finite.
    """
    if config.features == "log_sign":
        return math.inf
    if arithmetic == state == torch.float64:
        return 2.0**511
    return 2.0**63 if has_moments(config) else 2.0**100


def state_size(config: Config) -> int:
    """Number of state rows per coordinate."""
    return 2 * has_moments(config) + 2 * config.num_layers * config.hidden_size


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order in which they follow each other in the flat weight vector."""
    hidden, inputs = config.hidden_size, FEATURES[config.features]
    shapes: dict[str, tuple[int, ...]] = {}
    if config.projection:
        shapes["projection.weight"] = (hidden, inputs)
        shapes["projection.bias"] = (hidden,)
        inputs = hidden
    for layer in range(config.num_layers):
        shapes[f"weight_ih_l{layer}"] = (4 * hidden, inputs)
        shapes[f"weight_hh_l{layer}"] = (4 * hidden, hidden)
        shapes[f"bias_ih_l{layer}"] = (4 * hidden,)
        shapes[f"bias_hh_l{layer}"] = (4 * hidden,)
        inputs = hidden
    shapes["head.weight"] = (1, hidden)
    shapes["head.bias"] = (1,)
    if config.linear_path:
        shapes["linear.weight"] = (1, FEATURES[config.features])
    return shapes


def num_weights(config: Config) -> int:
    """Length of the flat weight vector."""
    return sum(math.prod(shape) for shape in weight_shapes(config).values())


def split_weights(flat: Tensor, config: Config) -> dict[str, Tensor]:
    """Views of the flat weight vector by name."""
    shapes = weight_shapes(config)
    pieces = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
