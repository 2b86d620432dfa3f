"""Options that make no sense are refused by name, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch


def require(good: bool, option: str, value, allowed: str) -> None:
    if not good:
        raise ValueError(f"{option} must be {allowed}, got {value!r}")


def is_whole(value, least: int) -> bool:
    """Whether it is an int of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole(option: str, value, least: int) -> int:
    """An int of at least ``least``, from NumPy's and others' as well."""
    good = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    require(good, option, value, f"an int of at least {least}")
    return int(value)


def is_number(value) -> bool:
    """Whether it is a finite real number, NumPy's included."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def function(option: str, value, what: str) -> Callable:
    """Something that can be called."""
    require(callable(value), option, value, what)
    return value


def usable_device(device: torch.device | str) -> torch.device:
    """A device that tensors can be put on."""
    try:
        found = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=found)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that this torch can use, got {str(device)!r} ({reason})") from None
    return found
