"""The learning rate over a training run, as meta-training, comparisons and reports have it."""

from __future__ import annotations

import math


def warm_cosine(peak: float, horizon: int, step: int) -> float:
    """A rate that comes up linearly over the first twentieth of the steps, and goes down to 0 along a cosine.

    peak * (t + 1) / w for t < w,   then peak * (1 + cos(pi (t - w) / (T - w))) / 2,   w = T / 20,   0 after T

    Args:
        peak: the highest rate.
        horizon: T.
        step: t, counted from 0.
    """
    warm = max(1, round(0.05 * horizon))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warm) / max(1, horizon - warm))))
