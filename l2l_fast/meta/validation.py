"""The score by which weights are judged in meta-training: f_t / f_0, on instances that are trained on by nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from l2l_fast.meta import seeds
from l2l_fast.meta.options import TrainerOptions
from l2l_fast.meta.streams import TrajectoryPool, float32_instances
from l2l_fast.meta.unroll import Trajectory, advance_
from l2l_fast.tasks import Task
from l2l_fast.tasks.base import Batch


class Validation:
    """Scores the weights of the pool's rule, by the same instances each time.

    Args:
        tasks: those that are trained on.
        options: of the trainer.
        pool: starts trajectories.
    """

    def __init__(self, tasks: Sequence[Task], options: TrainerOptions, pool: TrajectoryPool) -> None:
        self.tasks, self.options, self.pool = tasks, options, pool
        self._ratios = pool.rule.weights.new_zeros(options.validation_instances)  # sums of f_t / f_0

    def __call__(self, tell: Callable[[str], None] = lambda doing: None) -> float:
        """The mean of f_t / f_0 over the horizon, the instances and the tasks; infinite where it is not finite.

        tell: is told which task it is at.
        """
        scores = []
        for index in range(len(self.tasks)):
            tell(f"validating, {index + 1} of {len(self.tasks)}")
            scores.append(self.score(index))
        score = sum(scores) / len(scores)
        return score if math.isfinite(score) else math.inf

    def score(self, index: int) -> float:
        """The mean of one task, by its place among them."""
        options, horizon, graphs = self.options, self.options.horizon.validation, self.pool.graphs
        chosen = [seeds.seed(seeds.VALIDATION, options.seed, index, i) for i in range(options.validation_instances)]
        instances = float32_instances(self.tasks[index], chosen, options.device)
        trajectory = self.pool.start(("validation", index), instances, schedule=options.rates(horizon))
        self._ratios.zero_()
        while left := horizon - trajectory.steps_done:
            batches = trajectory.next(length := min(left, options.unroll))
            graphs((trajectory, length), partial(self._walk, trajectory, batches, length))
        self.pool.leave(("validation", index), trajectory)
        return self._ratios.mean().item() / horizon

    def _walk(self, trajectory: Trajectory, batches: Batch, length: int) -> None:
        """Steps without a meta-gradient; adds their f_t / f_0."""
        grads = trajectory.grad.expand(length, -1, -1)  # each step's in the place of the one before
        self._ratios += (advance_(trajectory, self.pool.rule, batches, grads) / trajectory.first_losses).sum(0)
