"""Hand-designed baselines, all of them torch.optim's own classes, and the search for their learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from l2l_fast.checks import usable_device, whole
from l2l_fast.evaluate.trajectories import Lane, Progress, finite_or_inf, smoothed, trajectories
from l2l_fast.schedule import warm_cosine
from l2l_fast.tasks.base import Task

EXTENSION = 4  # rates added at a time: a decade
MAX_EXTENSIONS = 4  # on each side
Scores = dict[int, tuple[Tensor, Tensor]]  # exponent -> mean losses [B] and final losses [B], one a seed


@dataclass(frozen=True)
class Baseline:
    """An optimizer whose learning rate is searched.

    Args:
        name: the key in tables, JSON and ``--baselines``.
        label: how people write it.
        factory: (parameters, learning rate) -> ``torch.optim.Optimizer``.
        exponents: the grid's first and last quarter-decade k; its rates are 10^(k/4).
        elementwise: whether each coordinate is treated by itself, see :class:`~l2l_fast.evaluate.trajectories.Lane`.
    """

    name: str
    label: str
    factory: Callable[[list[Tensor], float], torch.optim.Optimizer]
    exponents: tuple[int, int]
    elementwise: bool = True


# foreach is torch's default on CUDA and, with several parameters, the quicker one on the CPU too.
_FACTORIES = {
    "sgd": ("SGD", partial(torch.optim.SGD, foreach=True), (-12, 6)),
    "nesterov": ("Nesterov", partial(torch.optim.SGD, momentum=0.9, nesterov=True, foreach=True), (-14, 3)),
    "rmsprop": ("RMSprop", partial(torch.optim.RMSprop, foreach=True), (-14, 0)),
    "adam": ("Adam", partial(torch.optim.Adam, foreach=True), (-12, 1)),
    "adamw": ("AdamW", partial(torch.optim.AdamW, foreach=True), (-12, 1)),
    "adam-fused": ("Adam (fused)", partial(torch.optim.Adam, fused=True), (-12, 1)),
}


def _with_rate(optimizer_class):
    return lambda params, lr: optimizer_class(params, lr=lr)


BASELINES: dict[str, Baseline] = {
    name: Baseline(name, label, _with_rate(optimizer_class), exponents)
    for name, (label, optimizer_class, exponents) in _FACTORIES.items()
}
# What people compare with unless they say otherwise: fused Adam takes the steps that Adam does, in less time.
USUAL = ("sgd", "nesterov", "rmsprop", "adam", "adamw")
# Behind a baseline's name: the same, its rate going as this says; (T, updates done) -> share of the rate.
SCHEDULES: dict[str, tuple[str, Callable[[int, int], float]]] = {
    "linear": ("lr to 0", lambda horizon, done: max(0.0, 1 - done / horizon)),
    "cosine": ("cosine", partial(warm_cosine, 1.0)),
}


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` found.

    Attributes:
        baseline: what was tuned.
        rates: every rate tried, rising.
        mean_losses: mean loss over the horizon at each rate; inf where a seed diverged.
        final_losses: final loss at each rate; inf where a seed diverged.
        lr: the rate of the lowest mean loss.
        lr_final: the rate of the lowest final loss.
        on_edge: True where the best rate, by either measure, is the first or last one tried although the grid was
            extended as far as it goes.
        tied: True where, by either measure, the second best rate is within a standard error of the best, paired over
            seeds: other seeds might have chosen it.
    """

    baseline: Baseline
    rates: list[float]
    mean_losses: list[float]
    final_losses: list[float]
    lr: float
    lr_final: float
    on_edge: bool
    tied: bool = False  # as tunings kept before there was this field say


def find_baseline(baseline: str | Baseline, horizons: Sequence[int] = (), schedule: str = "constant") -> Baseline:
    """The baseline of that name; a :class:`Baseline` is taken as it is.

    Args:
        baseline: name or baseline; NAME-linear and NAME-cosine are NAME under that schedule.
        horizons: what it is to run for; a schedule needs exactly one.
        schedule: of a baseline whose name has none: "constant", "linear" or "cosine".

    Raises:
        ValueError: no such name, or not one horizon for a rate that depends on it.
    """
    if not isinstance(baseline, Baseline):
        name, _, suffix = str(baseline).rpartition("-")
        if suffix not in SCHEDULES:
            name, suffix = baseline, schedule
        if name not in BASELINES:
            raise ValueError(
                f"baselines must be among {', '.join(BASELINES)}, one of these with "
                f"{' or '.join(f'-{suffix}' for suffix in SCHEDULES)} behind it, or a Baseline, got {baseline!r}"
            )
        baseline, schedule = BASELINES[name], suffix
    if schedule == "constant":
        return baseline
    if len(horizons) != 1:
        raise ValueError(
            f"{baseline.name}-{schedule} depends on the horizon, so its run for one says nothing of another: use one "
            f"horizon, got {list(horizons)}"
        )
    return scheduled(baseline, schedule, horizons[0])


def scheduled(baseline: Baseline, schedule: str, horizon: int) -> Baseline:
    """The same optimizer under a schedule.

    "linear": lr[t] = lr * (1 - t / T) at updates t = 0, 1, ...;   "cosine": warm-up over T / 20, then a cosine to 0
    (:func:`~l2l_fast.schedule.warm_cosine`)

    Args:
        baseline: whose rate is the highest.
        schedule: a key of ``SCHEDULES``.
        horizon: T.

    Example:
        >>> from l2l_fast.evaluate.baselines import BASELINES, scheduled
        >>> scheduled(BASELINES["adam"], "linear", 100).label
        'Adam, lr to 0'
    """
    label = SCHEDULES[schedule][0]

    def make(params, lr):
        return under(schedule, horizon, baseline.factory(params, lr))

    return replace(baseline, name=f"{baseline.name}-{schedule}", label=f"{baseline.label}, {label}", factory=make)


def under(schedule: str, horizon: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, whose rates go as the schedule says from now on."""
    share = partial(SCHEDULES[schedule][1], horizon)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def tune(
    task: Task,
    baseline: str | Baseline,
    *,
    horizon: int = 100,
    seeds: Iterable[int] = range(10),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tuned:
    """Best learning rates of a baseline on a task, for the mean loss over the horizon and for the final loss.

    mean = 1/(B T) sum_i sum_{t=1..T} f_t(theta_t),   final: see :func:`~l2l_fast.evaluate.trajectories.smoothed`

    All rates and all seeds run as one stacked batch, on shared minibatches. While a best rate stands on the grid's
    edge, the grid grows by a decade on that side, at most four times.

    Args:
        task: the task.
        baseline: a name in ``BASELINES``, or a :class:`Baseline`.
        horizon: T, number of updates.
        seeds: B instances to tune on.
        device: where to run.
        progress: called as progress(description, updates done, updates in all), from 0 again for each extension.

    Raises:
        ValueError: an unknown baseline, a horizon below 1, or no seeds.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.evaluate import tune
        >>> tuned = tune(l2l.tasks.Quadratic(), "adam", horizon=20, seeds=range(3))
        >>> tuned.lr in tuned.rates and not tuned.on_edge
        True
    """
    options = {"seeds": seeds, "device": device, "progress": progress}
    return tune_horizons(task, baseline, (horizon,), **options)[horizon]


def tune_horizons(
    task: Task,
    baseline: str | Baseline,
    horizons: Sequence[int],
    *,
    seeds: Iterable[int] = range(10),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[int, Tuned]:
    """What :func:`tune` finds at each of several horizons, for the cost of the longest: the others are its beginnings.

    The grid grows while a best rate of any horizon stands on its edge.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.evaluate import tune_horizons
        >>> tuned = tune_horizons(l2l.tasks.Quadratic(), "adam", (10, 20), seeds=range(3))
        >>> tuned[10].lr >= tuned[20].lr
        True
    """
    seeds, horizons = list(seeds), sorted({whole("horizon", horizon, 1) for horizon in horizons})
    baseline, device = find_baseline(baseline, horizons), usable_device(device)
    if not horizons:
        raise ValueError("horizon must be at least 1, got none")
    if not seeds:
        raise ValueError("seeds must name at least one instance to tune on, got none")
    longest = horizons[-1]

    def measure(exponents: Sequence[int], description: str) -> dict[int, Scores]:
        lanes = [Lane(partial(baseline.factory, lr=10 ** (k / 4)), baseline.elementwise) for k in exponents]
        on_step = progress and (lambda done: progress(description, done, longest))
        losses = trajectories(task, lanes, horizon=longest, seeds=seeds, device=device, on_step=on_step)
        return {
            horizon: {
                k: (lane[:, 1 : horizon + 1].double().mean(1), smoothed(lane[:, : horizon + 1], horizon)[:, -1])
                for k, lane in zip(exponents, losses, strict=True)
            }
            for horizon in horizons
        }

    description = f"tuning {baseline.label}"
    first, last = baseline.exponents
    scores = measure(range(first, last + 1), description)
    for _ in range(MAX_EXTENSIONS):
        best = {exponent for found in scores.values() for exponent in _best(found)}
        wider = [*range(first - EXTENSION, first)] * (first in best)
        wider += [*range(last + 1, last + 1 + EXTENSION)] * (last in best and last != first)
        if not wider:
            break
        for horizon, found in measure(wider, f"{description}, wider").items():
            scores[horizon] |= found
        first, last = min(scores[longest]), max(scores[longest])
    return {horizon: _tuned(baseline, scores[horizon]) for horizon in horizons}


def _tuned(baseline: Baseline, scores: Scores) -> Tuned:
    exponents, best = sorted(scores), _best(scores)
    mean_losses, final_losses = ([finite_or_inf(scores[k][metric].mean()) for k in exponents] for metric in (0, 1))
    return Tuned(
        baseline=baseline,
        rates=[10 ** (k / 4) for k in exponents],
        mean_losses=mean_losses,
        final_losses=final_losses,
        lr=10 ** (best[0] / 4),
        lr_final=10 ** (best[1] / 4),
        on_edge=exponents[0] in best or exponents[-1] in best,
        tied=any(_tied(scores, metric) for metric in (0, 1)),
    )


def _best(scores: Scores) -> tuple[int, int]:
    """Exponents of the lowest mean and of the lowest final loss; the lower rate where they tie."""
    return tuple(_ranked(scores, metric)[0] for metric in (0, 1))


def _ranked(scores: Scores, metric: int) -> list[int]:
    return sorted(sorted(scores), key=lambda k: finite_or_inf(scores[k][metric].mean()))


def _tied(scores: Scores, metric: int) -> bool:
    best, second, *_ = _ranked(scores, metric)
    excess = scores[second][metric] - scores[best][metric]
    return len(excess) > 1 and bool(excess.mean() <= excess.std() / len(excess) ** 0.5)
