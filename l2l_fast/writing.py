"""How numbers are written, for people and for programs."""

from __future__ import annotations

import json
import math


def with_error(ratio: float, error: float | None) -> str:
    """Such as 0.82 ± 0.01, with a digit more of an error that would vanish."""
    return f"{ratio:.2f}" + ("" if error is None else f" ± {error:.{2 if error >= 0.005 else 3}f}")


def json_text(value) -> str:
    """JSON of a nested value, for files and for stdout: null for a number that is not finite, as JSON knows none."""
    return json.dumps(_finite_or_null(value), indent=1, allow_nan=False)


def _finite_or_null(value):
    """The same nested value with None, JSON's null, for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
