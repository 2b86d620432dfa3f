"""How long trajectories are, and how that grows while the network learns."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from l2l_fast.checks import is_whole, require


class Horizon:
    """Trajectories of one length.

    Args:
        steps: the length.

    Raises:
        ValueError: if it is not an int of at least 1.
    """

    def __init__(self, steps: int) -> None:
        require(is_whole(steps, 1), "horizon", steps, "an int of at least 1")
        self.steps = steps

    @property
    def validation(self) -> int:
        """Steps of a validation run."""
        return self.steps

    def draw(self, rng: np.random.Generator, fraction: float) -> int:
        """Length of a new trajectory; ``fraction`` runs from 0 to 1 over the meta-training."""
        return self.steps

    def validated(self, score: float) -> bool:
        """Told every validation score; True asks for the best weights so far and a new standard to be best at."""
        return False

    def forget(self) -> None:
        """Told that other weights are trained from now on: the scores so far are no standard for them."""

    def state_dict(self) -> dict:
        """Numbers that a resumed run needs; here, and with a cap that follows from that fraction, none."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a :meth:`state_dict`."""

    def __repr__(self) -> str:
        return f"Horizon({self.steps})"


class LogUniform(Horizon):
    r"""Lengths log-uniform between ``low`` and a cap that grows from ``first`` to ``high`` over the first half.

    steps ~ exp(U(log low, log cap)),   cap = first (high / first)^min(1, 2 fraction)

    Heavy-tailed horizons keep early speed in sight while late behaviour is learned (Wichrowska et al. 2017).

    Args:
        low: the shortest length.
        high: the longest, and the length of a validation run.
        first: the cap at the start; ``high`` if None, which lets nothing grow.

    Raises:
        ValueError: unless they are ints with 1 <= low <= first <= high.

    Example:
        >>> import numpy as np
        >>> from l2l_fast.meta import LogUniform
        >>> horizon, rng = LogUniform(50, 800, first=100), np.random.default_rng(0)
        >>> max(horizon.draw(rng, fraction=0.0) for _ in range(100)) <= 100
        True

    References:
        Wichrowska et al. 2017, https://arxiv.org/abs/1703.04813
    """

    def __init__(self, low: int, high: int, first: int | None = None) -> None:
        first = high if first is None else first
        if not all(is_whole(steps, 1) for steps in (low, first, high)) or not low <= first <= high:
            raise ValueError(
                f"horizon must have ints 1 <= low <= first <= high, got low={low!r}, first={first!r}, high={high!r}"
            )
        super().__init__(high)
        self.low, self.first = low, first

    def draw(self, rng: np.random.Generator, fraction: float) -> int:
        cap = self.first * (self.steps / self.first) ** min(1.0, 2 * fraction)
        return round(math.exp(rng.uniform(math.log(self.low), math.log(cap))))

    def __repr__(self) -> str:
        return f"LogUniform({self.low}, {self.steps}, first={self.first})"


class Staged(Horizon):
    """One length after another: on to the next when validation there has stopped improving (Chen et al. 2020).

    The best weights are restored at each advance.

    Args:
        stages: growing lengths, such as ``(100, 200, 500, 1000)``.
        patience: validations without improvement before the next stage.

    Raises:
        ValueError: if the lengths do not grow, or are not ints of at least 1; if ``patience`` is not one.
    """

    def __init__(self, stages, patience: int = 3) -> None:
        self.stages, self.patience = tuple(stages) if isinstance(stages, Iterable) else (), patience
        whole = bool(self.stages) and all(is_whole(steps, 1) for steps in self.stages)
        require(whole and list(self.stages) == sorted(set(self.stages)), "stages", stages, "growing ints of at least 1")
        require(is_whole(patience, 1), "patience", patience, "an int of at least 1")
        self.stage, self.best, self.waited = 0, math.inf, 0

    @property
    def validation(self) -> int:
        return self.stages[min(self.stage + 1, len(self.stages) - 1)]

    def draw(self, rng: np.random.Generator, fraction: float) -> int:
        return self.stages[self.stage]

    def validated(self, score: float) -> bool:
        self.waited = 0 if score < self.best else self.waited + 1
        self.best = min(score, self.best)
        if self.waited < self.patience or self.stage == len(self.stages) - 1:
            return False
        self.stage += 1
        self.forget()
        return True

    def forget(self) -> None:
        self.best, self.waited = math.inf, 0

    def state_dict(self) -> dict:
        return {"stage": self.stage, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"Staged({self.stages}, patience={self.patience})"


def parse_horizon(text: str | int) -> Horizon:
    """A curriculum from ``100``, ``50:300`` (log-uniform), ``50:300:100`` (one whose top grows) or ``100,200,500``.

    Raises:
        ValueError: it is none of them; the message says what is.

    Example:
        >>> from l2l_fast.meta.curricula import parse_horizon
        >>> parse_horizon(100), parse_horizon("50:300"), parse_horizon("100,200,500")
        (Horizon(100), LogUniform(50, 300, first=300), Staged((100, 200, 500), patience=3))
    """
    text = str(text)
    try:
        if ":" in text:
            return LogUniform(*(int(part) for part in text.split(":")))
        if "," in text:
            return Staged([int(part) for part in text.split(",")])
        return Horizon(int(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"horizon {text!r}: give 100, 50:300 or 100,200,500 ({error})") from None
