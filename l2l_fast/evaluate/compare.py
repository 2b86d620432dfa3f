"""The protocol: tune every baseline on its own seeds, then run everything on held-out seeds, paired."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from l2l_fast.adaptive import AdaptiveMLP, CoordinatewiseMLP
from l2l_fast.checks import is_whole, require, usable_device, whole
from l2l_fast.environment import environment
from l2l_fast.evaluate.baselines import BASELINES, SCHEDULES, USUAL, Baseline, Tuned, find_baseline, under
from l2l_fast.evaluate.comparison import Comparison, Result
from l2l_fast.evaluate.store import Store, stored_trajectories, stored_tuning
from l2l_fast.evaluate.trajectories import Lane, MakeOptimizer, Progress, final_loss, mean_loss, smoothed
from l2l_fast.mlp_optim import MLPOptimizer
from l2l_fast.modes import plain
from l2l_fast.networks import CoordinatewiseLSTM, digest
from l2l_fast.optim import LSTMOptimizer
from l2l_fast.tasks import get as get_task
from l2l_fast.tasks.base import Instances, Task, half

TIMED_STEPS, WARM_UP_STEPS = 40, 5
# Tuning and held-out seeds stay apart for every ``seed`` a person may give (torch's CPU generator uses 32 bits).
_FIRST_TUNING_SEED, _FIRST_TEST_SEED, _SEEDS_EACH = 1_000_000_000, 2_000_000_000, 100_000


def compare(
    task: Task | str,
    optimizers: torch.nn.Module | str | PathLike | MakeOptimizer | Mapping[str, object],
    *,
    horizon: int = 100,
    seeds: int = 10,
    baselines: Sequence[str | Baseline] = USUAL,
    tuning_seeds: int = 10,
    seed: int = 0,
    schedule: str = "constant",
    tune_learned: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    """Compare learned optimizers with tuned hand-designed ones.

    Every baseline gets the learning rate of the lowest mean loss, and separately that of the lowest final loss, over
    the same horizon on ``tuning_seeds`` instances. Then all optimizers run on ``seeds`` other instances, from the same
    starts and on the same minibatches. A task that has halves is tuned and run on its half "meta-test".

    ``seconds_per_step`` is the median wall-clock time of loss, gradient and update on one instance, parameters in their
    own shapes, the optimizers taking turns step by step so that whatever else the machine does hits all alike.
    Baselines are torch's classes as they come, with ``foreach=True``, or fused where their name says so.

    Args:
        task: a task, or the name of one.
        optimizers: a network, the name or folder of one, a callable (parameters -> optimizer), or a dictionary from
            names to any of these. A callable is called once an instance and once more to time its steps, each time
            with a list of parameters of the task's own shapes, so it need not be elementwise; its optimizer's ``step``
            must work without a closure.
        horizon: number of updates.
        seeds: number of held-out instances.
        baselines: what to compare with: names, ``-linear`` or ``-cosine`` behind one for that schedule, or a
            :class:`Baseline` of your own.
        tuning_seeds: number of instances to tune on.
        seed: shifts both sets of instances, 0 to 9999.
        schedule: of every rate, the learned optimizers' included: "constant"; "linear", to 0 over the horizon; or
            "cosine", up over its first twentieth and then down to 0. A baseline with one in its name keeps that.
        tune_learned: whether the rates of the learned optimizers, which must be networks, are tuned like the
            baselines', over three decades around their ``default_lr``; otherwise they run at that.
        device: where to run.
        progress: called as progress(description, done, total) while a stage runs; each stage has its own description.

    Raises:
        ValueError: a number out of its range, an unknown baseline, no optimizers, or two of one name.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.evaluate import compare
        >>> found = compare(l2l.tasks.Quadratic(), l2l.CoordinatewiseLSTM(), horizon=10, seeds=2, baselines=["adam"])
        >>> sorted(found.optimizers)
        ['LSTM', 'adam']
    """
    options = {"seeds": seeds, "baselines": baselines, "tuning_seeds": tuning_seeds, "seed": seed}
    options |= {"schedule": schedule, "tune_learned": tune_learned}
    return compare_horizons(task, optimizers, (horizon,), **options, device=device, progress=progress)[horizon]


def compare_horizons(
    task: Task | str,
    optimizers: torch.nn.Module | str | PathLike | MakeOptimizer | Mapping[str, object],
    horizons: Sequence[int],
    *,
    seeds: int = 10,
    baselines: Sequence[str | Baseline] = USUAL,
    tuning_seeds: int = 10,
    seed: int = 0,
    schedule: str = "constant",
    tune_learned: bool = False,
    state_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    store: Store | None = None,
) -> dict[int, Comparison]:
    """What :func:`compare` finds at each of several horizons, every baseline tuned for each of them.

    It costs little more than the longest: a trajectory's beginning is the shorter trajectory.

    Args:
        horizons: numbers of updates; the other arguments are :func:`compare`'s.
        state_dtype: of the networks' state, float32 or bfloat16.
        store: keeps tunings and losses; its facts must say which task this is. None keeps nothing.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.evaluate import compare_horizons
        >>> network = l2l.CoordinatewiseLSTM()
        >>> found = compare_horizons(l2l.tasks.Quadratic(), network, (5, 10), seeds=2, baselines=["adam"])
        >>> found[5].horizon, found[10].horizon
        (5, 10)
    """
    contest = Contest(
        task, optimizers, horizons, seeds=seeds, baselines=baselines, tuning_seeds=tuning_seeds, seed=seed,
        schedule=schedule, tune_learned=tune_learned, state_dtype=state_dtype, device=device, store=store,
    )  # fmt: skip
    return contest.result(progress)


class Contest:
    """A comparison that is to be made. What takes long of it can be made ahead, in other processes, by its store.

    The arguments are those of :func:`compare_horizons`.

    Attributes:
        task: on the half that optimizers are judged on.
        horizons: rising.
        baselines: what is tuned, the learned optimizers among them if their rates are.
        test, tuning: held-out seeds, and those that baselines are tuned on.
        device, store: where it runs, and what keeps its parts.
    """

    def __init__(
        self, task, optimizers, horizons, *, seeds=10, baselines=USUAL, tuning_seeds=10, seed=0,
        schedule="constant", tune_learned=False, state_dtype=torch.float32, device="cpu", store=None,
    ) -> None:  # fmt: skip
        self.store, self.device = store or Store(None), usable_device(device)
        self.horizons = sorted({whole("horizon", horizon, 1) for horizon in horizons})
        seeds, tuning_seeds = whole("seeds", seeds, 1), whole("tuning_seeds", tuning_seeds, 1)
        if max(seeds, tuning_seeds) > _SEEDS_EACH:
            raise ValueError(f"seeds and tuning_seeds must be at most {_SEEDS_EACH}, got {max(seeds, tuning_seeds)}")
        require(is_whole(seed, 0) and seed <= 9999, "seed", seed, "an int from 0 to 9999")
        allowed = ("constant", *SCHEDULES)
        require(isinstance(schedule, str) and schedule in allowed, "schedule", schedule, f"one of {allowed}")
        optimizers = _by_name(optimizers)
        learned = learned_lanes(optimizers, state_dtype, schedule, self.horizons)
        baselines = [baselines] if isinstance(baselines, str | Baseline) else baselines
        require(isinstance(baselines, Iterable), "baselines", baselines, "a sequence of names")
        self.baselines = [find_baseline(baseline, self.horizons, schedule) for baseline in baselines]
        if not self.baselines:
            raise ValueError(f"baselines must name at least one of {', '.join(BASELINES)}, got none")
        names = [*learned, *(baseline.name for baseline in self.baselines)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"optimizers and baselines must have different names, got {', '.join(twice)} twice; rename one"
            )
        if tune_learned:
            self.baselines = [*_tunable(optimizers, state_dtype, schedule, self.horizons), *self.baselines]
        self._names, self._fixed = list(learned), {} if tune_learned else learned
        self.task, self._tuned = held_out(task), {}
        self.tuning, self.test = tuning_seeds_of(seed, tuning_seeds), held_out_seeds(seed, seeds)

    def tuned(self, baseline: Baseline, progress: Progress | None = None) -> dict[int, Tuned]:
        """A baseline's best rates, by horizon."""
        if baseline.name not in self._tuned:
            shared = {"seeds": self.tuning, "device": self.device, "store": self.store}
            self._tuned[baseline.name] = stored_tuning(self.task, baseline, self.horizons, progress=progress, **shared)
        return self._tuned[baseline.name]

    def lanes(self, progress: Progress | None = None) -> dict[object, Lane]:
        """What is run: an optimizer that is not tuned by its name, a baseline by its name and one of its best rates."""
        lanes: dict[object, Lane] = dict(self._fixed)
        for baseline in self.baselines:
            for best in self.tuned(baseline, progress).values():
                for rate in (best.lr, best.lr_final):
                    lanes[baseline.name, rate] = _baseline_lane(baseline, rate)
        return lanes

    def losses(self, lanes: Mapping[object, Lane], progress: Progress | None = None) -> dict[object, Tensor]:
        """Of each lane [B, longest horizon + 1]."""
        longest = self.horizons[-1]
        on_step = progress and (lambda done: progress("comparing", done, longest))
        running = {"horizon": longest, "seeds": self.test, "device": self.device, "store": self.store}
        found = stored_trajectories(self.task, lanes.values(), on_step=on_step, **running)
        return dict(zip(lanes, found, strict=True))

    def result(self, progress: Progress | None = None) -> dict[int, Comparison]:
        """By horizon, what was found."""
        fixed, longest = self._fixed, self.horizons[-1]
        losses, tuned = self.losses(self.lanes(progress), progress), self._tuned
        # What a step costs does not depend on the rate.
        makers = {name: lane.make for name, lane in fixed.items()}
        makers |= {
            baseline.name: partial(baseline.factory, lr=tuned[baseline.name][longest].lr) for baseline in self.baselines
        }
        with plain(self.device):
            seconds, rates = _seconds_and_rates(self.task, makers, self.test[0], self.device, progress)

        comparisons = {}
        for horizon in self.horizons:
            begun = {name: found[:, : horizon + 1] for name, found in losses.items()}
            results = {}
            for name in fixed:
                rate = rates[name]
                results[name] = _result(
                    name, begun[name], begun[name], horizon, lr=rate, lr_final=rate, seconds=seconds[name]
                )
            for baseline in self.baselines:
                name, best = baseline.name, tuned[baseline.name][horizon]
                results[name] = _result(
                    baseline.label, begun[name, best.lr], begun[name, best.lr_final], horizon,
                    lr=best.lr, lr_final=best.lr_final, seconds=seconds[name], on_edge=best.on_edge, tied=best.tied,
                )  # fmt: skip
            comparisons[horizon] = Comparison(
                self.task.name, horizon, len(self.test), self._names, results, environment(self.device)
            )
        return comparisons


def held_out_seeds(seed: int, count: int) -> range:
    """The held-out seeds of a comparison."""
    first = _FIRST_TEST_SEED + seed * _SEEDS_EACH
    return range(first, first + count)


def tuning_seeds_of(seed: int, count: int) -> range:
    """The seeds that baselines of a comparison are tuned on."""
    first = _FIRST_TUNING_SEED + seed * _SEEDS_EACH
    return range(first, first + count)


# ---------------------------------------------------------------- arguments


def learned_lanes(
    optimizers, state_dtype: torch.dtype = torch.float32, schedule: str = "constant", horizons: Sequence[int] = ()
) -> dict[str, Lane]:
    """Lanes by name, of all that :func:`compare` takes as ``optimizers``, at their own rates."""
    lanes = {}
    for name, optimizer in _by_name(optimizers).items():
        if isinstance(optimizer, torch.nn.Module):
            made = _learned(name, optimizer, state_dtype)
            make, identity = partial(made.factory, lr=None), _identity(optimizer, state_dtype)
        elif callable(optimizer):
            made, make, identity = None, optimizer, None
        else:
            raise ValueError(
                "optimizers must be a network, its name or folder, a callable (parameters -> optimizer) or a "
                f"dictionary of these, got {type(optimizer).__name__}"
            )
        if schedule != "constant":
            make = _scheduled(make, schedule, _only(horizons, schedule))
            identity = identity and identity | {"schedule": [schedule, *horizons]}
        lanes[name] = Lane(make, elementwise=made is not None and made.elementwise, identity=identity)
    return lanes


def _by_name(optimizers) -> dict[str, object]:
    """Networks and callables by name. Found here and now: a wrong name should not cost the time of the tuning."""
    if not isinstance(optimizers, Mapping):
        optimizers = {_name(optimizers): optimizers}
    if not optimizers:
        raise ValueError("optimizers must hold at least one network or callable, got none")
    return {str(name): _network(optimizer) for name, optimizer in optimizers.items()}


def _name(optimizer) -> str:
    if isinstance(optimizer, (str, PathLike)):
        return Path(optimizer).name or str(optimizer)
    return "LSTM" if isinstance(optimizer, torch.nn.Module) else getattr(optimizer, "__name__", "learned")


def _network(optimizer):
    """What a name or folder stands for; all else as it is."""
    return CoordinatewiseLSTM.from_pretrained(optimizer) if isinstance(optimizer, str | PathLike) else optimizer


def _identity(network: torch.nn.Module, state_dtype: torch.dtype) -> dict[str, object]:
    return {"network": digest(network)} | ({} if state_dtype == torch.float32 else {"state_dtype": str(state_dtype)})


def _learned(name: str, network: torch.nn.Module, state_dtype: torch.dtype) -> Baseline:
    """A network as an optimizer whose rate can be searched; lr=None is its own."""
    if isinstance(network, CoordinatewiseMLP | AdaptiveMLP):
        # phi follows all coordinates of an instance, so that each instance needs an optimizer of its own.
        alone = isinstance(network, CoordinatewiseMLP)
        return Baseline(name, name, partial(_mlp_optimizer, network), (-6, 6), alone)

    def make(params: list[Tensor], lr: float | None) -> torch.optim.Optimizer:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lr=.* moves tensors")  # a search finds out by itself
            return LSTMOptimizer(params, network=network, lr=lr, state_dtype=state_dtype)

    middle = round(4 * math.log10(network.default_lr))
    # What looks at whole tensors must not be given several stacked into one.
    elementwise = network.update_rms is None and network.input_rms is None and not network.orthogonalize
    return Baseline(name, name, make, (middle - 6, middle + 6), elementwise)


def _mlp_optimizer(network: torch.nn.Module, params: list[Tensor], lr: float | None) -> torch.optim.Optimizer:
    return MLPOptimizer(params, network, 1.0 if lr is None else lr)


def _tunable(optimizers, state_dtype: torch.dtype, schedule: str, horizons: Sequence[int]) -> list[Baseline]:
    found = []
    for name, optimizer in _by_name(optimizers).items():
        network = isinstance(optimizer, torch.nn.Module)
        require(network, "optimizers", optimizer, "networks, or their names, with tune_learned=True")
        made = _learned(name, optimizer, state_dtype)
        if schedule != "constant":
            made = replace(made, factory=_scheduled(made.factory, schedule, _only(horizons, schedule)))
        found.append(made)
    return found


def _scheduled(make: Callable, schedule: str, horizon: int) -> Callable:
    return lambda params, **rate: under(schedule, horizon, make(params, **rate))


def _only(horizons: Sequence[int], schedule: str) -> int:
    if len(horizons) != 1:
        raise ValueError(f"schedule={schedule!r} depends on the horizon: use one horizon, got {list(horizons)}")
    return horizons[0]


def _baseline_lane(baseline: Baseline, rate: float) -> Lane:
    known = BASELINES.get(baseline.name) is baseline
    identity = {"baseline": baseline.name, "rate": rate} if known else None
    return Lane(partial(baseline.factory, lr=rate), baseline.elementwise, identity)


def held_out(task: Task | str) -> Task:
    """The task, by name or not, on the half that optimizers are judged on."""
    if isinstance(task, str):
        task = get_task(task)
    require(isinstance(task, Task), "task", task, "a task or the name of one")
    return half(task, "meta-test")


def _learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The one that all param groups have; nan where there is no such one."""
    rates = {float(group.get("lr", math.nan)) for group in optimizer.param_groups}
    return rates.pop() if len(rates) == 1 else math.nan


# ---------------------------------------------------------------- measurements


def _result(label: str, losses: Tensor, losses_final: Tensor, horizon: int, *, seconds: float, **rates) -> Result:
    """Numbers of losses [B, T + 1], at the rate for the mean and at the rate for the final loss."""
    losses, losses_final = losses.double(), losses_final.double()
    several, means = len(losses) > 1, losses[:, 1:].mean(1)
    return Result(
        label=label,
        mean_loss=mean_loss(losses),
        mean_loss_std=means.std().item() if several else 0.0,
        final_loss=final_loss(losses_final, horizon),
        seconds_per_step=seconds,
        curve=losses.mean(0).tolist(),
        curve_std=(losses.std(0) if several else torch.zeros_like(losses[0])).tolist(),
        curve_final=losses_final.mean(0).tolist(),
        seed_means=means.tolist(),
        seed_finals=smoothed(losses_final, horizon)[:, -1].tolist(),
        **rates,
    )


def _seconds_and_rates(
    task: Task, makers: Mapping[str, MakeOptimizer], seed: int, device, progress: Progress | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a step, and the learning rate at the start, by name."""
    instances = Instances(task, [seed], device)
    runs = {}
    for name, make in makers.items():
        params = {
            key: value[0].clone().requires_grad_() for key, value in instances.unflatten(instances.start()).items()
        }
        runs[name] = (params, make(list(params.values())), [])
    rates = {name: _learning_rate(optimizer) for name, (_, optimizer, _) in runs.items()}
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        batch = tree_map(lambda leaf: leaf[0], instances.draw())
        for params, optimizer, times in runs.values():
            start = _now(device)
            task.loss(params, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(_now(device) - start)
        if progress:
            progress("timing", step + 1, WARM_UP_STEPS + TIMED_STEPS)
    return {name: statistics.median(times[WARM_UP_STEPS:]) for name, (_, _, times) in runs.items()}, rates


def _now(device) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
