"""What a coordinate must cost: bytes, multiply-adds, and the time that follows from the machine's ceilings."""

from __future__ import annotations

import math

import torch

from l2l_fast.config import Config, state_size, weight_shapes

# Bytes a coordinate and step of the hand-designed optimizers in float32: what they read and what they write.
HAND_DESIGNED = {"SGD": 12, "RMSprop": 20, "Adam": 28}


def step_bytes(config: Config, state_dtype=torch.float32, param_dtype=torch.float32) -> int:
    """State and parameter read and written, gradient read."""
    return 2 * state_size(config) * state_dtype.itemsize + 3 * param_dtype.itemsize


def step_multiply_adds(config: Config) -> int:
    """One for each entry of each weight matrix; biases and activations are left out."""
    return sum(math.prod(shape) for shape in weight_shapes(config).values() if len(shape) == 2)


def meta_bytes(config: Config, unroll: int) -> float:
    """A coordinate and step of a meta-gradient: the step, its gradient kept and summed, and the backward's reading."""
    first_state = state_size(config) * 4 / unroll
    return step_bytes(config) + 6 * 4 + first_state


def meta_multiply_adds(config: Config) -> int:
    """A coordinate and step of a meta-gradient: forward, gradient of the weights, gradient of what went in.

    Recomputing the forward run is a way's own business and does not count. The features need no gradient.
    """
    shapes = weight_shapes(config)
    of_features = ["projection.weight" if config.projection else "weight_ih_l0"]
    of_features += ["linear.weight"] * config.linear_path
    return 3 * step_multiply_adds(config) - sum(math.prod(shapes[name]) for name in of_features)


def floor_seconds(moved: float, multiply_adds: float, ceilings: dict) -> tuple[float, str]:
    """Least time of a coordinate on this machine, and which ceiling sets it."""
    by_copy = moved / ceilings["copy_bytes_per_second"]
    # Two products at tf32's rate, one of them in float16, can have the accuracy of one in float32: docs/kernels.md.
    by_sgemm = 2 * multiply_adds / max(ceilings["sgemm_flops"], ceilings.get("tf32_flops", 0.0) / 2)
    return (by_sgemm, "sgemm") if by_sgemm > by_copy else (by_copy, "copy")
