r"""The mathematics of an optimizer that is a small MLP of the gradient, shared by every coordinate.

    u = s MLP_phi(z),   MLP_phi(z) = w2 . tanh(W1 z + b1) + b2

z are four features of a coordinate's gradient d: m^/sqrt(v^), d/sqrt(v^), and :func:`~l2l_fast.reference.log_sign`,
with the bias-corrected running moments m^, v^ of d. phi is W1, b1, w2 and b2, flat in this order.

Everything here is for R optimizees side by side, each with its own phi: gradients [R, N], features [R, 4, N] and phi
[R, P].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from l2l_fast.reference import log_sign, outside_autocast

FEATURES = 4
PREPROCESS_P, BETA, EPSILON = 10.0, 0.95, 1e-8  # p, decay and eps of the LSTM's own features
LIMIT = 2.0**63  # from this magnitude on a gradient counts as not finite: its square is not, in float32


class Point(NamedTuple):
    """What an update was made of.

    Attributes:
        features: z, [R, 4, N].
        active: whether a coordinate takes part, [R, N]: its gradient is finite, and it has had one that is not 0.
    """

    features: Tensor
    active: Tensor


def weight_shapes(hidden_size: int) -> dict[str, tuple[int, int]]:
    """The shapes of phi's tensors by name, in the order in which they stand in it.

    Example:
        >>> from l2l_fast import mlp
        >>> mlp.weight_shapes(8)["hidden.weight"], mlp.num_weights(8)
        ((8, 4), 49)
    """
    return {
        "hidden.weight": (hidden_size, FEATURES), "hidden.bias": (hidden_size, 1),
        "head.weight": (1, hidden_size), "head.bias": (1, 1),
    }  # fmt: skip


def num_weights(hidden_size: int) -> int:
    """P, the numbers in phi."""
    return sum(math.prod(shape) for shape in weight_shapes(hidden_size).values())


def split(phi: Tensor, hidden_size: int) -> list[Tensor]:
    """phi [R, P] as W1 [R, H, 4], b1 [R, H, 1], w2 [R, 1, H] and b2 [R, 1, 1]."""
    shapes = weight_shapes(hidden_size).values()
    pieces = phi.split([math.prod(shape) for shape in shapes], dim=-1)
    return [piece.reshape(*phi.shape[:-1], *shape) for piece, shape in zip(pieces, shapes, strict=True)]


def features(grad: Tensor, m: Tensor, v: Tensor) -> list[Tensor]:
    """The four, each of the gradient's shape; the moments are bias-corrected."""
    root = (v + EPSILON**2).sqrt()  # which has a derivative where v is 0
    return [m / root, grad / root, *log_sign(grad, PREPROCESS_P)]


@outside_autocast
def observe_(grad: Tensor, m: Tensor, v: Tensor, step: int) -> Point:
    """Moves the moments on by a gradient, and gives what the MLP sees of it.

    A gradient that is not finite leaves its moments as they are, and the coordinate is not active in this step. One
    that has never had a gradient but 0 is not active either: what does not matter stays where it is.

    Args:
        grad: d, [R, N].
        m, v: the running moments [R, N] before the step, moved on in place.
        step: the number of this step, counted from 1.
    """
    finite = grad.abs() < LIMIT
    grad = torch.where(finite, grad, 0.0)
    m.copy_(torch.where(finite, m.lerp(grad, 1 - BETA), m))
    v.copy_(torch.where(finite, v.lerp(grad * grad, 1 - BETA), v))
    return again(grad, m, v, step, finite)


@outside_autocast
def again(grad: Tensor, m: Tensor, v: Tensor, step: int, finite: Tensor | None = None) -> Point:
    """What :func:`observe_` gave, from the moments as it left them."""
    finite = grad.abs() < LIMIT if finite is None else finite
    grad, correction = torch.where(finite, grad, 0.0), 1 - BETA**step
    seen = features(grad, m / correction, v / correction)
    return Point(torch.stack(seen, dim=-2), finite & (v > 0))


@outside_autocast
def update(phi: Tensor, point: Point, scale: float) -> tuple[Tensor, Tensor]:
    """u = s MLP_phi(z), 0 where a coordinate is not active.

    Args:
        phi: [R, P].
        point: what the MLP sees.
        scale: s.

    Returns:
        u [R, N] and the hidden units [R, H, N], which :func:`pull_back` takes.
    """
    weight, bias, head, head_bias = split(phi, hidden_size_of(phi))
    hidden = torch.baddbmm(bias, weight, point.features).tanh_()
    u = scale * torch.baddbmm(head_bias, head, hidden).squeeze(-2)
    return torch.where(point.active, u, 0.0), hidden


@outside_autocast
def pull_back(phi: Tensor, point: Point, hidden: Tensor, d_update: Tensor, scale: float) -> Tensor:
    """(du/dphi)^T d_update: a gradient of u as one of phi.

    With the gradient of f at theta + u it is the one-step hypergradient, df(theta + u)/dphi.

    Args:
        phi, point, scale: those of :func:`update`.
        hidden: what it gave.
        d_update: [R, N].

    Returns:
        [R, P].
    """
    head = split(phi, hidden_size_of(phi))[2]
    d_out = torch.where(point.active & (d_update.abs() < LIMIT), scale * d_update, 0.0).unsqueeze(-2)
    d_hidden = (head.mT * d_out) * (1 - hidden * hidden)
    parts = d_hidden @ point.features.mT, d_hidden.sum(-1), d_out @ hidden.mT, d_out.sum(-1)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def hidden_size_of(phi: Tensor) -> int:
    """H, from P = H (4 + 1 + 1) + 1."""
    return (phi.shape[-1] - 1) // (FEATURES + 2)
