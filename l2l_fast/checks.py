"""Options that make no sense are refused by name, before anything is changed."""

from __future__ import annotations

import math
from numbers import Real


def require(good: bool, option: str, value, allowed: str) -> None:
    if not good:
        raise ValueError(f"{option} must be {allowed}, got {value!r}")


def is_whole(value, least: int) -> bool:
    """Whether it is an int of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value) -> bool:
    """Whether it is a finite real number, NumPy's included."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
