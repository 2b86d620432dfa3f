"""How long trajectories are, and how that grows while the network learns."""

from __future__ import annotations

import math

import numpy as np


class Horizon:
    """Trajectories of one length.

    Args:
        steps: the length.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise ValueError(f"horizon must be at least 1, got {steps}")
        self.steps = steps

    @property
    def validation(self) -> int:
        """Steps of a validation run."""
        return self.steps

    def draw(self, rng: np.random.Generator, progress: float) -> int:
        """Length of a new trajectory; ``progress`` runs from 0 to 1 over the meta-training."""
        return self.steps

    def validated(self, score: float) -> bool:
        """Told every validation score; True asks for the best weights so far and a new standard to be best at."""
        return False

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def __repr__(self) -> str:
        return f"Horizon({self.steps})"


class LogUniform(Horizon):
    """Lengths log-uniform between ``low`` and a cap that grows from ``first`` to ``high`` over the first half.

    Heavy-tailed horizons keep early speed in sight while late behaviour is learned (Wichrowska et al. 2017).
    """

    def __init__(self, low: int, high: int, first: int | None = None) -> None:
        first = high if first is None else first
        if not 1 <= low <= first <= high:
            raise ValueError(f"horizon must have 1 <= low <= first <= high, got low={low}, first={first}, high={high}")
        super().__init__(high)
        self.low, self.first = low, first

    def draw(self, rng: np.random.Generator, progress: float) -> int:
        cap = self.first * (self.steps / self.first) ** min(1.0, 2 * progress)
        return round(math.exp(rng.uniform(math.log(self.low), math.log(cap))))

    def __repr__(self) -> str:
        return f"LogUniform({self.low}, {self.steps}, first={self.first})"


class Staged(Horizon):
    """One length after another: on to the next when validation there has stopped improving (Chen et al. 2020).

    The best weights are restored at each advance.

    Args:
        stages: growing lengths, such as ``(100, 200, 500, 1000)``.
        patience: validations without improvement before the next stage.
    """

    def __init__(self, stages, patience: int = 3) -> None:
        self.stages, self.patience = tuple(stages), patience
        if not self.stages or list(self.stages) != sorted(set(self.stages)) or self.stages[0] < 1:
            raise ValueError(f"stages must be growing lengths of at least 1, got {stages}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.stage, self.best, self.waited = 0, math.inf, 0

    @property
    def validation(self) -> int:
        return self.stages[min(self.stage + 1, len(self.stages) - 1)]

    def draw(self, rng: np.random.Generator, progress: float) -> int:
        return self.stages[self.stage]

    def validated(self, score: float) -> bool:
        self.waited = 0 if score < self.best else self.waited + 1
        self.best = min(score, self.best)
        if self.waited < self.patience or self.stage == len(self.stages) - 1:
            return False
        self.stage, self.best, self.waited = self.stage + 1, math.inf, 0
        return True

    def state_dict(self) -> dict:
        return {"stage": self.stage, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"Staged({self.stages}, patience={self.patience})"
