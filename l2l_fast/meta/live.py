"""Meta-training in a Jupyter notebook: one output, with progress and a picture of the losses that grows in place."""

from __future__ import annotations

import html
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

INTERVAL = 0.5  # seconds between two pictures: a browser should have time for other things
POINTS = 300  # of a curve; more meta-steps are averaged
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 220, 60, 24


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, so that what is displayed may be replaced."""
    if "IPython" not in sys.modules:  # or there would be no kernel
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


@contextmanager
def live_picture(
    total: int, losses: list[float], validations: list[tuple[int, float]]
) -> Iterator[Callable[..., None]]:
    """Displays a :class:`LivePicture`, and yields ``update(meta_step, loss, best, doing="")``.

    The last state stays in the notebook, however the training ends.
    """
    from IPython.display import display

    picture = LivePicture(total, losses, validations)
    handle = display(picture, display_id=True)
    shown = time.monotonic()

    def update(meta_step: int, loss: float, best: float, doing: str = "") -> None:
        nonlocal shown
        if time.monotonic() - shown >= INTERVAL:
            handle.update(picture)
            shown = time.monotonic()

    try:
        yield update
    finally:
        picture.ended = True
        handle.update(picture)


class LivePicture:
    """A run as a notebook shows it: HTML with a picture in SVG, or a line of text.

    Args:
        total: meta-steps that are to be made.
        losses: one for each meta-step made, a list that grows.
        validations: (meta-step, score), a list that grows.

    Example:
        >>> from l2l_fast.meta.live import LivePicture
        >>> LivePicture(10, [3.0, 2.0, 1.0], [(2, 0.5)])
        meta-training: 3 of 10, loss 1, best 0.5
    """

    def __init__(self, total: int, losses: list[float], validations: list[tuple[int, float]]) -> None:
        self.total, self.losses, self.validations = total, losses, validations
        self.begun, self.at_first, self.ended = time.monotonic(), len(losses), False

    def __repr__(self) -> str:
        best = min((score for _, score in self.validations), default=math.inf)
        words = [f"meta-training: {len(self.losses)} of {self.total}"]
        words += [f"loss {self.losses[-1]:.4g}"] if self.losses else []
        words += [f"best {best:.4g}"] if math.isfinite(best) else []
        done, seconds = len(self.losses) - self.at_first, time.monotonic() - self.begun
        if done > 0 and not self.ended and len(self.losses) < self.total:
            words.append(f"{_duration(seconds / done * (self.total - len(self.losses)))} left")
        return ", ".join(words)

    def _repr_html_(self) -> str:
        bar = f'<progress value="{len(self.losses)}" max="{self.total}" style="width: 100%"></progress>'
        return f'<div style="max-width: {_WIDTH}px">{bar}<div>{html.escape(repr(self))}</div>{self.svg()}</div>'

    def svg(self) -> str:
        """Losses against meta-steps, logarithmic where they allow it, and validations in a scale of their own."""
        parts = [_curve(_thinned(self.losses), self.total, "#0072B2", "meta-loss", top=0)]
        parts.append(_curve(self.validations, self.total, "#D55E00", "validation", top=_HEIGHT))
        axis = (
            f'<text x="{_WIDTH}" y="{2 * _HEIGHT + 16}" text-anchor="end" fill="currentColor">meta-step, to '
            f"{self.total}</text>"
        )
        return (
            f'<svg viewBox="0 0 {_WIDTH} {2 * _HEIGHT + _BOTTOM}" width="100%" font-size="12" role="img" '
            f'aria-label="{html.escape(repr(self))}">{"".join(parts)}{axis}</svg>'
        )


def _thinned(losses: Sequence[float]) -> list[tuple[float, float]]:
    """(meta-step, mean loss) of at most ``POINTS`` stretches; what is not finite counts in none."""
    size = max(1, math.ceil(len(losses) / POINTS))
    points = []
    for begin in range(0, len(losses), size):
        finite = [loss for loss in losses[begin : begin + size] if math.isfinite(loss)]
        if finite:
            points.append((begin + (min(begin + size, len(losses)) - begin + 1) / 2, sum(finite) / len(finite)))
    return points


def _curve(points: Sequence[tuple[float, float]], total: int, colour: str, name: str, *, top: int) -> str:
    """One panel: a curve, its name, and the highest and the lowest value."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return ""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    scale = math.log if low > 0 else lambda value: value
    span, height = scale(high) - scale(low) or 1.0, _HEIGHT - 30

    def place(step: float, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 5) * step / max(total, points[-1][0])
        return f"{x:.1f},{top + 20 + height * (1 - (scale(value) - scale(low)) / span):.1f}"

    line = " ".join(place(step, value) for step, value in points)
    marks = "".join(
        f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in (one.split(",") for one in line.split())
    ) if len(points) < 40 else ""  # fmt: skip
    label = 'text-anchor="end" fill="currentColor"'
    return (
        f'<text x="{_LEFT}" y="{top + 12}" fill="{colour}">{name}</text>'
        f'<text x="{_LEFT - 6}" y="{top + 24}" {label}>{high:.3g}</text>'
        f'<text x="{_LEFT - 6}" y="{top + 20 + height}" {label}>{low:.3g}</text>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>{marks}'
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
