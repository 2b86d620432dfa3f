"""The trajectories that run in parallel: how one starts, in whose memory, and how all of them are saved."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from l2l_fast.checks import require
from l2l_fast.meta import ranks, seeds
from l2l_fast.meta.graphs import Graphs
from l2l_fast.meta.options import MakeOptimizer, TrainerOptions
from l2l_fast.meta.unroll import Rule, Trajectory
from l2l_fast.tasks import Instances, Task
from l2l_fast.tasks import get as get_task
from l2l_fast.tasks.base import send


class TrajectoryPool:
    """Starts trajectories, each in the memory of one that has ended, where graphs may have been captured on it.

    Args:
        rule: the optimizer that goes along them.
        window: the most steps of one window.
        graphs: what captures; where nothing does, no memory is kept.
    """

    def __init__(self, rule: Rule, window: int, graphs: Graphs) -> None:
        self.rule, self.window, self.graphs = rule, window, graphs
        self._ended: defaultdict[tuple, list[Trajectory]] = defaultdict(list)

    def start(
        self, kind: tuple, instances: Instances, scaling: Tensor | None = None,
        schedule: Callable[[int], float] | None = None, copies: int = 1,
    ) -> Trajectory:  # fmt: skip
        """A trajectory at its start; ``kind`` tells trajectories apart that must not share memory."""
        ended = self._ended[kind, copies, tuple(instances.shapes.items())]
        if not ended:
            dtype = self.rule.weights.dtype
            return Trajectory(instances, self.rule.config, dtype, scaling, self.window, schedule, copies)
        trajectory = ended.pop()
        trajectory.place(instances, scaling, schedule)
        self.graphs((trajectory, 0), trajectory.evaluate_start_)
        return trajectory

    def leave(self, kind: tuple, trajectory: Trajectory) -> None:
        """Keep an ended trajectory's memory for the next of its kind."""
        if self.graphs.capture is not None:
            self._ended[kind, trajectory.copies, tuple(trajectory.instances.shapes.items())].append(trajectory)


@dataclass(eq=False)
class Stream:
    """One running trajectory, with what is needed to name it and to go on with it.

    Attributes:
        number: of the trajectory in the run; its task, horizon and seeds follow from it.
        task_index: of its task.
        horizon: steps that it has in all.
        trajectory: where it stands.
        teacher: the optimizer that leads it; None where the network does.
    """

    number: int
    task_index: int
    horizon: int
    trajectory: Trajectory
    teacher: torch.optim.Optimizer | None = None

    @property
    def steps_left(self) -> int:
        return self.horizon - self.trajectory.steps_done

    def state_dict(self) -> dict:
        return {
            "number": self.number, "task_index": self.task_index, "horizon": self.horizon,
            "teacher": self.teacher and self.teacher.state_dict(),
            "trajectory": self.trajectory.state_dict(),
        }  # fmt: skip


class Streams:
    """``parallel`` slots in which trajectories run.

    Args:
        tasks, options: of the trainer.
        pool: starts trajectories.
        copies: of every instance that trajectories have which the network itself leads.

    Attributes:
        running: the stream in each slot, None where the next meta-step starts one.
        started: how many have been started in the run.
    """

    def __init__(self, tasks: Sequence[Task], options: TrainerOptions, pool: TrajectoryPool, copies: int = 1) -> None:
        self.tasks, self.options, self.pool, self.copies = tasks, options, pool, copies
        self.running: list[Stream | None] = [None] * options.parallel
        self.started = 0
        self._drawn: tuple | None = None  # the number of a trajectory to come, and what :meth:`_draw` gives for it

    def in_slot(self, slot: int, fraction: float) -> Stream:
        """The stream that runs in a slot, started if there is none; ``fraction`` of the training is done."""
        if self.running[slot] is None:
            self.running[slot] = self.start(fraction)
        return self.running[slot]

    def start(self, fraction: float) -> Stream:
        """The next trajectory; its task, horizon and seeds follow from its number alone."""
        options, number = self.options, self.started
        self.started += 1
        rng = np.random.default_rng((seeds.TRAJECTORY, options.seed, number))
        horizon = options.horizon.draw(rng, fraction)
        if number < options.parallel:
            # The first trajectories end one after another, so that from then on a meta-step averages over early and
            # late windows. In step, they would pull the network to and fro between what the two ask of it.
            horizon = max(1, round(horizon * (number + 1) / options.parallel))
        first, last = options.imitation
        led = rng.random() < first + (last - first) * fraction
        return self.make(number, number % len(self.tasks), horizon, led)

    def make(self, number: int, task_index: int, horizon: int, led: bool) -> Stream:
        """A trajectory at its start, by its name; ``led`` by a teacher or not."""
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, *self._draw(number, task_index)
        (_, instances, scaling), self._drawn = self._drawn, None
        schedule = self.options.rates(horizon, number)
        copies = 1 if led else self.copies
        trajectory = self.pool.start(("training", task_index), instances, scaling, schedule, copies)
        return Stream(number, task_index, horizon, trajectory, self._teacher(trajectory) if led else None)

    def _teacher(self, trajectory: Trajectory) -> torch.optim.Optimizer:
        return teacher_maker(self.options)([trajectory.theta])

    def _draw(self, number: int, task_index: int) -> tuple[Instances, Tensor | None]:
        """Everything random of a trajectory but what it meets on its way: instances and scaling."""
        options = self.options
        ids = range(ranks.rank() * options.instances, (ranks.rank() + 1) * options.instances)
        chosen = [seeds.seed(seeds.INSTANCE, options.seed, number, i) for i in ids]
        instances, scaling = float32_instances(self.tasks[task_index], chosen, options.device), None
        if options.scaling:
            size = sum(math.prod(shape) for shape in instances.shapes.values())
            generators = [seeds.generator(seeds.SCALING, options.seed, number, i) for i in ids]
            exponents = torch.stack([
                torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") for generator in generators
            ])  # fmt: skip
            scaling = send(((2 * exponents - 1) * options.scaling).exp(), options.device)
        return instances, scaling

    def draw_ahead(self) -> None:
        """Draw the next trajectory to start, which depends on its number alone, before it is needed."""
        if self._drawn is None:
            self._drawn = self.started, *self._draw(self.started, self.started % len(self.tasks))

    def end(self, slot: int) -> None:
        """The trajectory in a slot, at its horizon or beyond use."""
        stream, self.running[slot] = self.running[slot], None
        if stream is not None:
            self.pool.leave(("training", stream.task_index), stream.trajectory)

    def end_all(self) -> None:
        for slot in range(len(self.running)):
            self.end(slot)

    def state_dict(self) -> list[dict | None]:
        return [stream and stream.state_dict() for stream in self.running]

    def restored(self, saved: Sequence[dict | None]) -> list[Stream | None]:
        """What runs by a :meth:`state_dict`, still to be put in ``running``; an error leaves all as it is."""
        drawn = self._drawn
        try:
            return [entry and self._restore(entry) for entry in saved]
        except Exception:
            self._drawn = drawn
            raise

    def _restore(self, entry: dict) -> Stream:
        led = entry["teacher"] is not None
        stream = self.make(entry["number"], entry["task_index"], entry["horizon"], led)
        stream.trajectory.load_state_dict(entry["trajectory"])
        if led:
            stream.teacher.load_state_dict(entry["teacher"])
        return stream


def teacher_maker(options: TrainerOptions) -> MakeOptimizer:
    """What makes the teachers."""
    return options.teacher or (lambda params: torch.optim.Adam(params, lr=0.01))


def float32_instances(task: Task, chosen: list[int], device: torch.device) -> Instances:
    """Instances by their seeds.

    Raises:
        ValueError: they start from another dtype than float32.
    """
    instances = Instances(task, chosen, device)
    if instances.start().dtype != torch.float32:
        raise ValueError(
            f"the task {task.name} must start from float32 tensors, as a network is trained on, got "
            f"{instances.start().dtype}: name the dtype in its init, whatever torch's default is"
        )
    return instances


def task_list(tasks: Task | str | Sequence[Task | str]) -> list[Task]:
    """What a trainer mixes, of a task, its name, or a sequence of them.

    Raises:
        ValueError: none, or something else; the message says what.
    """
    tasks = [tasks] if isinstance(tasks, str | Task) or not isinstance(tasks, Iterable) else list(tasks)
    if not tasks:
        raise ValueError("tasks must name at least one task")
    found = [get_task(task) if isinstance(task, str) else task for task in tasks]
    for task in found:
        require(isinstance(task, Task), "tasks", task, "a task, its name, or a sequence of them")
    return found
