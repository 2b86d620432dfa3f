"""Networks trained at many values of an option, by several workers, and held against each other on one set of seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from l2l_fast.checks import is_number, is_whole, require, usable_device
from l2l_fast.environment import environment
from l2l_fast.evaluate.compare import held_out, held_out_seeds, learned_lanes
from l2l_fast.evaluate.plots import BAND, draw
from l2l_fast.evaluate.trajectories import Progress, final_loss, mean_loss, trajectories
from l2l_fast.files import HeldError, write_text
from l2l_fast.meta.identity import describe
from l2l_fast.meta.options import TrainerOptions
from l2l_fast.meta.recipes import for_tasks, prepare, train
from l2l_fast.meta.trainer import MetaTrainer
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.studies.queue import Queue, require_optuna
from l2l_fast.tasks import Task
from l2l_fast.tasks import get as get_task
from l2l_fast.writing import json_text

OF_THE_NETWORK = tuple(inspect.signature(CoordinatewiseLSTM).parameters)
# A sweep says itself how far its trajectories go, where it keeps them and from which seed they are drawn.
OF_THE_TRAINER = tuple(
    entry.name
    for entry in dataclasses.fields(TrainerOptions)
    if entry.metadata["decides"] and entry.name not in ("horizon", "seed")
)
TRIALS = 20  # of a search, unless it says how many
CHECKPOINT_EVERY = 50  # meta-steps that a killed worker costs at most


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, both included; whole ones if both are, and log-uniform above 0."""

    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """What is trained and measured; whatever is the same here is the same study.

    Args:
        task: a task, or the name of one.
        options: of the :class:`~l2l_fast.MetaTrainer` and the network, by name: the values to try, or one
            :class:`Range` to search.
        meta_steps: of each training.
        horizon: steps of a trajectory, in training and where networks are held against each other.
        seeds: held-out seeds.
        meta_seeds: trainings at each combination of values.
        trials: of a search; None where all values are listed, as every combination is then a trial.
        seed: of everything random.
        device: where to run.

    Raises:
        ValueError: a value out of its range, or no such option; the message names it.
    """

    task: Task | str
    options: Mapping[str, Sequence | Range]
    meta_steps: int = 500
    horizon: int = 100
    seeds: int = 32
    meta_seeds: int = 1
    trials: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", get_task(self.task) if isinstance(self.task, str) else self.task)
        require(isinstance(self.options, Mapping) and bool(self.options), "options", self.options, "values by name")
        for name in ("meta_steps", "horizon", "seeds", "meta_seeds"):
            require(is_whole(getattr(self, name), 1), name, getattr(self, name), "an int of at least 1")
        require(is_whole(self.seed, 0) and self.seed <= 9999, "seed", self.seed, "an int from 0 to 9999")
        usable_device(self.device)
        for name, values in self.options.items():
            known = name in OF_THE_TRAINER or name in OF_THE_NETWORK
            require(known, "options", name, f"named among {', '.join(sorted({*OF_THE_TRAINER, *OF_THE_NETWORK}))}")
            if isinstance(values, Range):
                good = all(map(is_number, values)) and values.low < values.high
                require(good, name, f"{values.low}:{values.high}", "a range LOW:HIGH of numbers, the lower first")
            else:
                several = isinstance(values, list | tuple) and len(set(map(str, values))) == len(values) > 0
                require(several, name, values, "different values in a list")
        search = any(isinstance(values, Range) for values in self.options.values())
        require(self.trials is None or search, "trials", self.trials, "None where all values are listed: each is tried")
        require(not search or self.meta_seeds == 1, "meta_seeds", self.meta_seeds, "1 for a search")
        if search:
            object.__setattr__(self, "trials", TRIALS if self.trials is None else self.trials)
            require(is_whole(self.trials, 1), "trials", self.trials, "an int of at least 1")
        self._check()

    def _check(self) -> None:
        """What a trainer would refuse is refused before any trial; each value once, beside the first of the others."""
        ends = {name: list(values) for name, values in self.options.items()}
        first = {name: values[0] for name, values in ends.items()}
        for name, values in ends.items():
            for value in values:
                network, tasks, training = prepare(self._recipe(first | {name: value}), seed=self.seed)
                MetaTrainer(network, tasks, progress=False, device=self.device, **training)

    # ------------------------------------------------------------ trials

    @cached_property
    def study(self) -> str:
        """The study's name: the task's, and a hash of all that decides what a trial gives."""
        task = describe(self.task)
        loss = task.pop("first_loss")  # machines sum in an order of their own
        facts = {"task": task, "loss": None if loss is None else f"{loss:.3g}", "space": self._kinds()}
        facts |= {name: getattr(self, name) for name in ("meta_steps", "horizon", "seeds", "seed")}
        versions = environment(self.device)
        facts |= {"l2l_fast": versions["l2l_fast"], "torch": versions["torch"].split("+")[0]}
        facts |= {"device": torch.device(self.device).type, "recipe": repr(for_tasks(self.task) | {"tasks": None})}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{self.task.name}-{digest[:10]}"

    def _kinds(self) -> dict:
        """What of the values decides a trial: where all are listed, a trial follows from its own."""
        if self.trials is not None:
            return {name: [type(values).__name__, *map(str, values)] for name, values in self.options.items()}
        return {name: None if all(map(is_number, values)) else list(map(str, values))
                for name, values in self.options.items()}  # fmt: skip

    def slots(self) -> dict[str, dict | None]:
        """The trials that are wanted, by name: their parameters, or None where a sampler chooses them."""
        if self.trials is not None:
            return {f"trial={number}": None for number in range(self.trials)}
        values = [self.options[name] for name in self.options]
        return {
            self._slot(dict(zip(self.options, point, strict=True)), meta_seed): self._parameters(point)
            for point in itertools.product(*values) for meta_seed in self._meta_seeds()
        }  # fmt: skip

    def _meta_seeds(self) -> range:
        return range(self.seed, self.seed + self.meta_seeds)

    @staticmethod
    def _slot(point: Mapping, meta_seed: int) -> str:
        return ",".join(f"{name}={value}" for name, value in [*point.items(), ("seed", meta_seed)])

    def _parameters(self, point: Sequence) -> dict:
        """As the distributions of :meth:`space` have them."""
        return {
            name: float(value) if all(map(is_number, values)) and not _whole(values) else value
            for (name, values), value in zip(self.options.items(), point, strict=True)
        }

    def space(self) -> dict:
        """Optuna's distributions of the options."""
        found, distributions = {}, require_optuna().distributions
        for name, values in self.options.items():
            listed = self.trials is not None and not isinstance(values, Range)  # of which a search draws one
            if listed or not all(map(is_number, values)):
                found[name] = distributions.CategoricalDistribution(list(values))
                continue
            low, high = min(values), max(values)
            kind = distributions.IntDistribution if _whole(values) else distributions.FloatDistribution
            found[name] = kind(low, high, log=low > 0 and isinstance(values, Range))
        return found

    def _recipe(self, parameters: Mapping) -> dict:
        """The task's recipe at some values. Validated often: at a large rate the weights are good for moments only."""
        recipe = for_tasks(self.task)
        recipe["training"] |= {"horizon": self.horizon, "schedule": "constant", "validate_every": 10}
        for name, value in parameters.items():
            recipe["training" if name in OF_THE_TRAINER else "network"][name] = value
        return recipe | {"meta_steps": self.meta_steps}

    def run(
        self, slot: str, parameters: Mapping, folder: Path, on_step: Callable[[int, int], None] | None = None
    ) -> tuple[float, dict]:
        """Train one network, from its own checkpoint where there is one, and run it on the held-out seeds."""
        meta_seed = int(slot.rsplit("=", 1)[1]) if self.trials is None else self.seed
        done = self._trained(parameters, meta_seed, folder, on_step)
        (losses,) = trajectories(
            held_out(self.task), list(learned_lanes({slot: done.network}).values()), horizon=self.horizon,
            seeds=held_out_seeds(self.seed, self.seeds), device=self.device,
        )  # fmt: skip
        with np.errstate(all="ignore"):  # a diverged curve has no spread
            error = losses.double().numpy().std(0, ddof=1) / self.seeds**0.5 if self.seeds > 1 else np.zeros(0)
        facts = {
            "final_loss": final_loss(losses, self.horizon), "curve": losses.double().mean(0).tolist(),
            "error": error.tolist(), "meta_losses": done.history.meta_losses, "unroll": done.trainer.options.unroll,
            "network": f"{socket.gethostname()}:{(folder / 'network').absolute()}",
        }  # fmt: skip
        return mean_loss(losses), facts

    def _trained(self, parameters: Mapping, meta_seed: int, folder: Path, on_step):
        """A worker that was silent and lives has the checkpoint still: it trains on, and we take what it makes."""
        while True:
            try:
                return train(
                    self._recipe(parameters), folder, seed=meta_seed, device=self.device, progress=False,
                    on_step=on_step, checkpoint_every=CHECKPOINT_EVERY,
                )  # fmt: skip
            except HeldError:
                time.sleep(1)


def _whole(values: Sequence) -> bool:
    return all(is_whole(value, -(2**53)) for value in values)


# ---------------------------------------------------------------- workers


def sweep(
    what: Sweep,
    folder: str | PathLike,
    *,
    storage: str | None = None,
    workers: int = 1,
    grace: int = 60,
    progress: Progress | None = None,
) -> Swept:
    """Run a sweep with some workers, beside those that others have started on the same storage.

    score(trial) = 1/(B T) sum_i sum_{t=1..T} f_t(theta_t), over the held-out seeds i; the best trial has the lowest

    A trial is taken by one worker. One whose worker is killed, here or on another machine, is taken up by another,
    from its own checkpoint where that is in ``folder``. What is finished is not run again, so the same call goes on
    where one was stopped, and more values or trials cost their own time only.

    Args:
        what: is swept.
        folder: keeps each trial's network, history and checkpoint, and ``study.db`` unless there is a ``storage``.
        storage: an SQLAlchemy URL, such as ``postgresql+psycopg://host/name``, that workers on several machines share.
        workers: processes, one thread each; 1 is this one.
        grace: seconds of silence after which a worker counts as killed.
        progress: called as progress(description, done, total).

    Raises:
        ImportError: without Optuna, or the database's driver.
        ValueError: an argument out of its range, or a storage that cannot be opened.
        RuntimeError: every worker has ended before the sweep did.
        KeyboardInterrupt: after Ctrl-C, once trials are saved and given back.

    Example:
        >>> import tempfile
        >>> from l2l_fast.studies import Sweep, sweep
        >>> what = Sweep("quadratic", {"meta_lr": [0.1, 0.001]}, meta_steps=3, horizon=20, seeds=2)
        >>> found = sweep(what, tempfile.mkdtemp())
        >>> [point.parameters["meta_lr"] for point in found.points], len(found.best.curve)
        ([0.1, 0.001], 21)
    """
    require(is_whole(workers, 1), "workers", workers, "an int of at least 1")
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    worker = Worker(what, folder, storage or f"sqlite:///{folder / 'study.db'}", grace)
    try:
        with worker.queue() as queue:
            on_change = progress and partial(_tell, progress, total=len(queue.slots))
            if workers == 1:
                worker.work(queue, progress, on_change)
            else:
                _run_beside(worker, workers, queue, on_change)
            return Swept.of(what, queue)
    except require_optuna().exceptions.StorageInternalError as error:
        raise RuntimeError(f"the storage failed ({error.__cause__ or error}): run the same again to go on") from error


def _tell(progress: Progress, finished: int, total: int) -> None:
    progress("trials", finished, total)


@dataclass(frozen=True)
class Worker:
    """What a process needs to take part in a sweep; it can be pickled."""

    what: Sweep
    folder: Path
    storage: str
    grace: int

    def queue(self) -> Queue:
        what = self.what
        return Queue(self.storage, what.study, what.slots(), what.space(), grace=self.grace, seed=what.seed)

    def work(self, queue: Queue, progress: Progress | None = None, on_change=None) -> None:
        """Until the sweep is finished."""
        place = self.folder / self.what.study

        def run(slot: str, parameters: dict) -> tuple[float, dict]:
            on_step = progress and partial(progress, slot)
            return self.what.run(slot, parameters, place / slot.replace("/", "_"), on_step)

        queue.work(run, *filter(None, [on_change]))


def _process(worker: Worker) -> None:
    torch.set_num_threads(1)
    require_optuna().logging.set_verbosity(require_optuna().logging.WARNING)
    try:
        with worker.queue() as queue:
            worker.work(queue)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run_beside(worker: Worker, count: int, queue: Queue, on_change) -> None:
    """Processes that work until the sweep is finished, watched by this one."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads without their stacks
    processes = [spawn.Process(target=_process, args=(worker,), name=f"sweep {number}") for number in range(count)]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            if on_change:
                on_change(queue.finished())
            time.sleep(0.5)
    except KeyboardInterrupt:  # it has reached them as well
        raise KeyboardInterrupt("stopped: trials are saved and given back; run the same again to go on") from None
    finally:
        for process in processes:
            process.join()
    if on_change:
        on_change(queue.finished())
    if left := len(queue.slots) - queue.finished():
        codes = ", ".join(str(process.exitcode) for process in processes)
        raise RuntimeError(
            f"every worker has ended (exit codes {codes}) and {left} of {len(queue.slots)} trials are left: the lines "
            "above say why; run the same command again to go on"
        )


# ---------------------------------------------------------------- what it found


@dataclass(frozen=True)
class Point:
    """What one combination of values has given.

    Attributes:
        parameters: the values, by option.
        mean_losses, final_losses: one for each meta-seed; inf where it diverged.
        curve, error: [horizon + 1] means over seeds and their standard errors.
        meta_losses: of each meta-seed, one for each meta-step.
        unroll: steps of a window.
        networks: where they are, HOST:FOLDER.
    """

    parameters: dict
    mean_losses: list[float]
    final_losses: list[float]
    curve: np.ndarray
    error: np.ndarray
    meta_losses: list[list[float]]
    unroll: int
    networks: list[str]

    @property
    def mean_loss(self) -> float:
        return float(np.mean(self.mean_losses))

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {_written(value)}" for name, value in self.parameters.items())


@dataclass(frozen=True)
class Swept:
    """All points of a sweep, in the order of its values or trials.

    Attributes:
        what: was swept.
        points: those that finished.
        left_out: slots that were given up, as each of several workers ended in them.
    """

    what: Sweep
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, what: Sweep, queue: Queue) -> Swept:
        """What is in the queue."""
        results, groups = queue.results(), {}
        for slot in queue.slots:
            if slot in results:
                groups.setdefault(slot.rsplit(",", 1)[0], []).append(results[slot])
        points = []
        for found in groups.values():
            facts = [one.facts for one in found]
            curves = np.array([fact["curve"] for fact in facts], dtype=float)
            error = np.array(facts[0]["error"], dtype=float)
            if len(found) > 1:
                with np.errstate(all="ignore"):
                    error = curves.std(0, ddof=1) / len(found) ** 0.5
            points.append(Point(
                {name: found[0].parameters[name] for name in what.options}, [one.value for one in found],
                [fact["final_loss"] for fact in facts], curves.mean(0), error if len(error) else 0 * curves[0],
                [fact["meta_losses"] for fact in facts], facts[0]["unroll"], [fact["network"] for fact in facts],
            ))  # fmt: skip
        return cls(what, points, [slot for slot in queue.slots if slot not in results])

    @property
    def best(self) -> Point:
        """The one of the lowest mean loss.

        Raises:
            RuntimeError: all diverged.
        """
        finite = [point for point in self.points if math.isfinite(point.mean_loss)]
        if not finite:
            raise RuntimeError("every trial diverged: try smaller rates")
        return min(finite, key=lambda point: point.mean_loss)

    def to_dict(self) -> dict:
        """Everything, fit for JSON."""
        what, best = self.what, self.best
        entries = [
            {"options": point.parameters, "mean_loss": point.mean_loss, "mean_losses": point.mean_losses,
             "final_losses": point.final_losses, "curve": point.curve.tolist(), "networks": point.networks}
            for point in self.points
        ]  # fmt: skip
        return {
            "task": what.task.name, "study": what.study, "horizon": what.horizon, "seeds": what.seeds,
            "meta_steps": what.meta_steps, "meta_seeds": what.meta_seeds, "best": best.parameters,
            "best_network": best.networks[int(np.argmin(best.mean_losses))], "points": entries,
            "left_out": self.left_out,
        }  # fmt: skip

    def table(self) -> str:
        """Plain text: a line for each point, the best one marked."""
        what, best = self.what, self.best
        names = list(what.options)
        rows = [[_written(point.parameters[name]) for name in names] for point in self.points]
        widths = [max(map(len, [name, *column])) for name, column in zip(names, zip(*rows, strict=True), strict=True)]
        lines = [
            f"{what.task.name}: mean loss over {what.horizon} steps, {what.seeds} held-out seeds", "",
            "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)) + f"  {'mean loss':>10}",
        ]  # fmt: skip
        for row, point in zip(rows, self.points, strict=True):
            cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            lines.append(f"{cells}  {point.mean_loss:>10.4g}{'  best' if point is best else ''}")
        if self.left_out:
            lines += ["", f"given up, as each of several workers ended in them: {', '.join(self.left_out)}"]
        return "\n".join(lines)

    def plot(self, path: str | PathLike, most: int = 8) -> None:
        """Picture: loss against steps, of the best ``most`` points."""
        shown = sorted(self.points, key=lambda point: (not math.isfinite(point.mean_loss), point.mean_loss))[:most]
        kept = [point for point in self.points if any(point is one for one in shown)]
        best = f"{self.best.label} (best)"
        labels = {id(point): best if point is self.best else point.label for point in kept}
        seeds = self.what.meta_seeds if self.what.meta_seeds > 1 else self.what.seeds
        draw(
            {labels[id(point)]: (point.curve, point.error) for point in kept}, path,
            f"{self.what.task.name}: learned optimizers by {', '.join(self.what.options)}", [best],
            band=BAND if seeds > 1 else None,
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        """``sweep.json`` and ``sweep.png``."""
        write_text(folder / "sweep.json", json_text(self.to_dict()) + "\n")
        self.plot(folder / "sweep.png")


def _written(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
