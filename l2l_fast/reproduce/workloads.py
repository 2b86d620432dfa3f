"""The learned rule in AdamW's place: eight workloads, every optimizer under one schedule, with as many rates tried.

theta <- optimizer(grad, lr_t),   lr_t: warm-up over T / 20 and a cosine to 0 (schedule.warm_cosine)

Of every optimizer the rate is taken whose mean training loss on a seed of its own is lowest, and shown on other seeds.
The row "at AdamW's rate" is not tuned at all. Starts and minibatches are the same for all. One run costs seconds to a
minute, a whole report hours: each is kept in a file as it ends, so that a report that was killed goes on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from l2l_fast import normalize
from l2l_fast.files import append_line, write_text
from l2l_fast.networks import CoordinatewiseLSTM, digest
from l2l_fast.optim import LSTMOptimizer
from l2l_fast.reproduce.processes import spread
from l2l_fast.schedule import warm_cosine
from l2l_fast.tasks import ModuleTask
from l2l_fast.tasks.workloads import WORKLOADS
from l2l_fast.writing import json_text

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WEIGHT_DECAY = 0.01
LAST = 0.05  # of the steps: what counts as the last loss
POINTS = 20  # of a curve
HELD_OUT = 1024  # rows that validate
TUNING_SEED, SEED = 0, 1000  # the first seed that is shown; others than any recipe was chosen by
SWAP = "at AdamW's rate"
SIZED = "Muon, sized"
QUICK = ("tabular-regression", "deep-mlp")  # workloads of seconds
METRICS = ("mean", "last", "validation")


# ---------------------------------------------------------------- the rivals


class Muon(torch.optim.Optimizer):
    """Muon on matrices, an update's RMS being 0.2 as AdamW's is; AdamW on all other tensors.

    m <- 0.95 m + 0.05 g,   theta <- theta - lr (weight_decay theta + 0.2 o / RMS(o)),   o = NS(0.95 m + 0.05 g)

    The same five steps, and the same tensors, as ``LSTMOptimizer(orthogonalize=True)`` has.

    Args:
        params: what to train.
        lr: the rate.
        weight_decay: decoupled, per unit of lr.
        sized_like: a network whose sizes of a matrix's step (:func:`~l2l_fast.normalize.update_sizes_`) are to be in
            place of 0.2: what Muon gains by them without anything learned.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        sized_like: CoordinatewiseLSTM | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.sized_like = sized_like
        rest = [p for group in self.param_groups for p in group["params"] if not normalize.is_matrix(p)]
        self.rest = [torch.optim.AdamW(rest, lr, weight_decay=weight_decay)] if rest else []

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in filter(normalize.is_matrix, group["params"]):
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"].lerp_(param.grad, 0.05)
                o = normalize.unit(normalize.orthogonalize(param.grad.lerp(momentum, 0.95)))
                o = o.mul_(self._size(param.grad, state) / 0.2) if self.sized_like else o
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(o, alpha=0.2 * group["lr"])
            for rest in self.rest:
                rest.param_groups[0]["lr"] = group["lr"]
        for rest in self.rest:
            rest.step()

    def _size(self, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        like = self.sized_like
        if "square" not in state:
            state["square"], state["step"] = grad.new_zeros(()), grad.new_zeros(())
        state["step"] += 1
        given = [grad], [state["momentum"][..., None]], [state["square"]], [state["step"]]
        return normalize.update_sizes_(*given, like.config._replace(beta1=0.95), like.update_rms, like.max_update_rms)


def nothing_learned(like: CoordinatewiseLSTM) -> CoordinatewiseLSTM:
    """The control: the same rule before any training, whose update is Adam's direction."""
    options = like.options | {"linear_path": True}
    return CoordinatewiseLSTM(**options)


@dataclass(frozen=True)
class Rival:
    """An optimizer and the rates that are tried."""

    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
    rates: tuple[float, ...] = RATES


@cache
def _network(name: str) -> CoordinatewiseLSTM:
    return CoordinatewiseLSTM.from_pretrained(name)


def rivals(network: str = "l2l-base") -> dict[str, Rival]:
    """AdamW, Nesterov, Muon, the same with the learned network's sizes of a step, the control and the network.

    Args:
        network: a shipped name or a folder.

    Returns:
        by name; "coordinatewise" means ``orthogonalize=False``. "Muon, sized" needs ``max_update_rms``.
    """
    decay = {"weight_decay": WEIGHT_DECAY}

    def learned(params, lr, orthogonalize):
        return LSTMOptimizer(params, _network(network), lr, **decay, orthogonalize=orthogonalize)

    def control(params, lr, orthogonalize):
        return LSTMOptimizer(params, nothing_learned(_network(network)), lr, **decay, orthogonalize=orthogonalize)

    return {
        "AdamW": Rival(lambda params, lr: torch.optim.AdamW(params, lr, **decay)),
        "Nesterov": Rival(
            lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, nesterov=True, **decay),
            tuple(10 * rate for rate in RATES),
        ),
        "Muon": Rival(lambda params, lr: Muon(params, lr, **decay)),
        SIZED: Rival(lambda params, lr: Muon(params, lr, **decay, sized_like=_network(network))),
        "control": Rival(partial(control, orthogonalize=True)),
        "control, coordinatewise": Rival(partial(control, orthogonalize=False)),
        "learned": Rival(partial(learned, orthogonalize=True)),
        "learned, coordinatewise": Rival(partial(learned, orthogonalize=False)),
    }


LEARNED = ("learned", "learned, coordinatewise")  # those that are shown at AdamW's rate as well
# What a report has unless it is asked for more.
DEFAULT = ("AdamW", "Nesterov", "Muon", SIZED, "control", *LEARNED)


# ---------------------------------------------------------------- one run


@cache
def _task(workload: str):
    return WORKLOADS[workload]()


def train(workload: str | ModuleTask, make: Callable, lr: float, seed: int, steps: int) -> dict:
    """One training run.

    Args:
        workload: a key of ``WORKLOADS``, or a task of one's own.
        make: makes the optimizer from a list of parameters and ``lr``.
        lr: the peak of the schedule.
        seed: of the start and the minibatches.
        steps: T.

    Returns:
        ``mean``, over all steps, ``last``, over the last twentieth, ``validation``, ``seconds`` (those of validation
        left out), and by twentieths of the steps the training losses ``curve`` and the validation losses ``held_out``.
    """
    task = _task(workload) if isinstance(workload, str) else workload
    generator = torch.Generator().manual_seed(seed)
    model = task.module(generator)
    optimizer = make(list(model.parameters()), lr)
    losses, held_out, seconds = [], [], 0.0
    points = {steps * (point + 1) // POINTS for point in range(POINTS)}
    begun = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(lr, steps, step)
        loss = _loss(task, model, task.data, task.sample(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step + 1 in points:
            seconds += time.perf_counter() - begun
            held_out.append(_validation(task, model))
            if not math.isfinite(losses[-1]):
                losses += [losses[-1]] * (steps - step - 1)
                break
            begun = time.perf_counter()
    losses = torch.stack(losses).double()
    count = max(1, round(LAST * steps))
    return {
        "mean": losses.mean().item(), "last": losses[-count:].mean().item(), "validation": held_out[-1],
        "seconds": seconds, "curve": [part.mean().item() for part in losses.tensor_split(POINTS)], "held_out": held_out,
    }  # fmt: skip


def _loss(task, model: nn.Module, data: Sequence[Tensor], rows: Tensor) -> Tensor:
    inputs, *targets = (tensor[rows] for tensor in data)
    return task.loss_fn(model(inputs), *targets)


@torch.no_grad()
def _validation(task, model: nn.Module) -> float:
    data = task.with_half("meta-test").data
    count = len(data[0])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu")[:HELD_OUT]
    model.eval()
    loss = _loss(task, model, data, rows).item()
    model.train()
    return loss


# ---------------------------------------------------------------- a report


@dataclass(frozen=True)
class Plan:
    """What a report is of.

    Attributes:
        steps: T.
        seeds: that are shown.
        workloads: names.
        network: a shipped name or a folder.
        rivals: names; AdamW is always among them.
        rates_from: a report (``workloads.json``) whose rates are taken, of another number of steps for instance; None
            tunes.
    """

    steps: int = 1000
    seeds: int = 5
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    network: str = "l2l-base"
    rivals: tuple[str, ...] = DEFAULT
    rates_from: str | None = None


@dataclass(frozen=True)
class Job:
    """One run to do, or done."""

    workload: str
    rival: str
    lr: float
    seed: int
    steps: int
    network: str
    digest: str = ""  # of the network: its name may have come to mean another


def _do(job: Job) -> dict:
    torch.set_num_threads(1)
    return train(job.workload, rivals(job.network)[job.rival].make, job.lr, job.seed, job.steps)


def run(plan: Plan, folder: Path, jobs: int = 1, progress: Callable[[str, int, int], None] | None = None) -> dict:
    """Do all runs of a plan that ``folder`` does not have yet.

    Args:
        plan: which.
        folder: holds ``runs.jsonl``, one line for each run.
        jobs: processes, one thread each.
        progress: called with what is being done, how many runs of it are done, and how many there are to do.

    Returns:
        ``plan`` and ``found``: by workload and row ``lr``, ``tuning`` by rate, and ``seeds``, a list of what
        :func:`train` gives.

    Raises:
        ValueError: the network has no ``update_rms``, so its rates would not be AdamW's; or no ``max_update_rms``,
            and its sizes are asked for.
    """
    network = _network(plan.network)
    if network.update_rms is None:
        raise ValueError(
            f"network must have update_rms, as l2l-base has it, to be in AdamW's place; got {plan.network!r}"
        )
    if network.max_update_rms is None and SIZED in plan.rivals and plan.rivals != DEFAULT:
        raise ValueError(f"rivals can have {SIZED!r} beside a network with max_update_rms; {plan.network!r} has none")
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / "runs.jsonl", {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            done[Job(**entry["job"])] = entry["found"]
    table, chosen = rivals(plan.network), ["AdamW", *(name for name in plan.rivals if name != "AdamW")]
    if normalize.no_momentum(network.config, network.update_rms):
        chosen = [name for name in chosen if name not in ("control", "learned")]
    if network.max_update_rms is None:
        chosen = [name for name in chosen if name != SIZED]
    job = partial(Job, steps=plan.steps)

    identity = {"network": plan.network, "digest": digest(network)}

    def of(rival: str) -> dict[str, str]:
        return identity if rival not in ("AdamW", "Nesterov", "Muon") else {"network": ""}

    tuning = [
        job(workload=workload, rival=rival, lr=lr, seed=TUNING_SEED, **of(rival))
        for workload in plan.workloads for rival in chosen for lr in table[rival].rates if plan.rates_from is None
    ]  # fmt: skip
    _fill(tuning, done, path, jobs, progress and partial(progress, "tuning"))
    best = {}
    for one in tuning:
        mean = done[one]["mean"]
        key = one.workload, one.rival
        if key not in best or (mean is not None and mean < best[key][0]):
            best[key] = (math.inf if mean is None else mean), one.lr
    rates = {key: lr for key, (_, lr) in best.items()}
    if plan.rates_from is not None:
        rates = _rates_of(plan.rates_from, plan.workloads, chosen)
    swaps = {(workload, rival): rates[workload, "AdamW"] for workload, rival in rates if rival in LEARNED}
    shown = {
        (workload, rival, lr): [
            job(workload=workload, rival=rival, lr=lr, seed=SEED + seed, **of(rival))
            for seed in range(plan.seeds)
        ]
        for pairs in (rates, swaps) for (workload, rival), lr in pairs.items()
    }  # fmt: skip
    every = [one for group in shown.values() for one in group]
    _fill(every, done, path, jobs, progress and partial(progress, "seeds"))
    found: dict = {}
    for names in (rates, swaps):
        for (workload, rival), lr in names.items():
            label = rival if names is rates else f"{rival}, {SWAP}"
            tried = {one.lr: done[one]["mean"] for one in tuning if (one.workload, one.rival) == (workload, rival)}
            seeds = [done[one] for one in shown[workload, rival, lr]]
            found.setdefault(workload, {})[label] = {
                "lr": lr,
                "tuning": tried if names is rates else {},
                "seeds": seeds,
            }
    return {"plan": asdict(plan), "torch": torch.__version__, "found": found}


def _rates_of(report: str, workloads: Sequence[str], chosen: Sequence[str]) -> dict[tuple[str, str], float]:
    try:
        found = json.loads(Path(report).read_text(encoding="utf-8"))["found"]
        return {(workload, rival): float(found[workload][rival]["lr"]) for workload in workloads for rival in chosen}
    except KeyError as error:
        raise ValueError(f"rates_from must have all that is asked for: {report} has no {error.args[0]!r}") from None
    except (ValueError, TypeError):
        raise ValueError(f"rates_from must be a workloads.json of this command, which {report} is not") from None


def _fill(wanted: Sequence[Job], done: dict, path: Path, jobs: int, progress) -> None:
    missing = [job for job in dict.fromkeys(wanted) if job not in done]
    for number, (job, found) in enumerate(spread(_do, missing, jobs)):
        done[job] = json.loads(json_text(found))  # as it will be read
        append_line(path, json.dumps({"job": asdict(job), "found": done[job]}))
        if progress:
            progress(number + 1, len(missing))


# ---------------------------------------------------------------- what it says


def ratios(found: dict, row: str, metric: str, rival: str = "AdamW") -> dict[str, tuple[float, float]]:
    """By workload: a row's mean of ``metric`` in the rival's, and the standard error over pairs of seeds."""
    result = {}
    for workload, rows in found.items():
        ours, theirs = (np.array([_number(seed[metric]) for seed in rows[name]["seeds"]]) for name in (row, rival))
        pairs = ours / theirs
        error = pairs.std(ddof=1) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        result[workload] = float(ours.mean() / theirs.mean()), float(error)
    return result


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(np.mean([math.log(value) for value in values]))


def share_of_steps(rows: dict, row: str, rival: str = "AdamW") -> float:
    """The share of the steps after which a row's curve stays below the rival's last loss; above 1 if it does not."""
    target = np.mean([_number(seed["last"]) for seed in rows[rival]["seeds"]])
    curve = np.mean([[_number(point) for point in seed["curve"]] for seed in rows[row]["seeds"]], 0)
    above = np.flatnonzero(curve > target)  # minibatches are noisy: the last time counts
    if not len(above):
        return 1 / POINTS
    place = above[-1] + 1
    if place == POINTS:
        return 1 + 1 / POINTS
    part = (curve[place - 1] - target) / (curve[place - 1] - curve[place])
    return float((place + part) / POINTS)  # a point is the middle of its twentieth, and counts at its end


def _number(value: float | None) -> float:
    return math.inf if value is None else value


@dataclass(frozen=True)
class Bar:
    """What was promised, the figure it is held to, and what was found."""

    what: str
    most: float
    found: float

    @property
    def met(self) -> bool:
        return self.found <= self.most


def bars(found: dict, steps: int = 1000) -> list[Bar]:
    """What ``learned`` is held to after so many steps, as far as the report has the rivals."""

    def mean(metric: str, row: str = "learned", rival: str = "AdamW") -> float:
        return geometric_mean(value for value, _ in ratios(found, row, metric, rival).values())

    rows, swap = next(iter(found.values())), f"learned, {SWAP}"
    last = [value for value, _ in ratios(found, swap, "last").values()]
    higher = sum(one > 1 for one in last) / len(last)
    if steps >= 10_000:
        runs = [seed for entries in found.values() for row in ("learned", swap) for seed in entries[row]["seeds"]]
        diverged = sum(not math.isfinite(_number(run["last"])) for run in runs)
        return [
            Bar("runs that diverged", 0, diverged),
            Bar("at AdamW's rate, share of workloads with a higher last loss", 2 / 8, higher),
        ]
    if steps >= 3000:
        return [Bar("tuned alike, validation loss in AdamW's", 0.95, mean("validation"))]
    judged = [
        Bar("at AdamW's tuned rate, mean loss in AdamW's", 0.92, mean("mean", swap)),
        Bar("the same: share of workloads with a higher last loss", 1 / 8, higher),
        Bar("tuned alike, validation loss in AdamW's", 0.92, mean("validation")),
        Bar("share of AdamW's steps to its last loss", 0.65, geometric_mean(
            share_of_steps(rows, "learned") for rows in found.values()
        )),
    ]  # fmt: skip
    names = {"Muon": "Muon's", "control": "the control's", SIZED: "Muon's with its sizes"}
    for rival, metric, most in (("Muon", "last", 1.0), ("control", "mean", 0.93), (SIZED, "mean", 0.93)):
        if rival in rows:
            judged.append(Bar(f"{metric} loss in {names[rival]}", most, mean(metric, rival=rival)))
    return judged


def table(report: dict) -> str:
    """A table for each metric, the geometric means, and the bars."""
    found, lines = report["found"], []
    rows = list(next(iter(found.values())))
    wide = max(map(len, rows)) + 2
    short = {name: name.split("-")[0] if len(name) > 11 else name for name in found}
    for metric in METRICS:
        lines += [f"{metric} loss", " " * wide + "".join(f"{short[name]:>12}" for name in found)]
        for row in rows:
            cells = [np.mean([_number(seed[metric]) for seed in found[name][row]["seeds"]]) for name in found]
            lines.append(f"{row:<{wide}}" + "".join(f"{cell:>12.4f}" for cell in cells))
        lines.append("")
    lines += ["rates", *(
        f"{row:<{wide}}" + "".join(f"{found[name][row]['lr']:>12g}" for name in found) for row in rows
    ), ""]  # fmt: skip
    title = f"{'in AdamW, geometric means':<{wide}}"
    lines += [title + f"{'mean':>9}{'last':>9}{'validation':>12}{'steps':>9}{'seconds':>9}"]
    for row in rows:
        means = [geometric_mean(value for value, _ in ratios(found, row, metric).values()) for metric in METRICS]
        steps = geometric_mean(share_of_steps(found[name], row) for name in found)
        seconds = geometric_mean(
            share_of_steps(found[name], row) * value
            for name, (value, _) in ratios(found, row, "seconds").items()
        )  # fmt: skip
        lines.append(f"{row:<{wide}}{means[0]:>9.3f}{means[1]:>9.3f}{means[2]:>12.3f}{steps:>9.2f}{seconds:>9.2f}")
    if "learned" in rows:
        lines += ["", f"{'bars: geometric means unless said':<60}{'at most':>9}{'found':>8}"]
        for bar in bars(found, report["plan"]["steps"]):
            lines.append(f"{bar.what:<60}{bar.most:>9.3g}{bar.found:>8.3f}  {'met' if bar.met else 'missed'}")
    return "\n".join(lines)


def markdown(report: dict) -> str:
    """The same for a document: of each workload and row the rate, mean / last loss and validation loss."""
    found, steps = report["found"], report["plan"]["steps"]
    rows = list(next(iter(found.values())))
    lines = [f"| {steps:,} steps | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]

    def short(value: float) -> str:
        text = f"{value:.3f}" if value >= 0.1 else f"{value:.4f}"
        return text.removeprefix("0")

    for name, entries in found.items():
        cells = []
        for row in rows:
            means = [np.mean([_number(seed[metric]) for seed in entries[row]["seeds"]]) for metric in METRICS]
            mean, last, validation = map(short, means)
            cells.append(f"{short(entries[row]['lr']).rstrip('0')}: {mean} / {last}, {validation}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [
        " / ".join(
            f"{geometric_mean(value for value, _ in ratios(found, row, metric).values()):.2f}" for metric in METRICS
        )
        for row in rows
    ]
    lines.append(f"| in AdamW's, geometric mean | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Picture: geometric mean over the workloads of the validation loss against steps, in AdamW's last."""
    from l2l_fast.evaluate.plots import draw

    found, steps, lines = report["found"], report["plan"]["steps"], {}
    x = np.arange(1, POINTS + 1) * steps / POINTS
    for row in next(iter(found.values())):
        logs = []
        for rows in found.values():
            last = np.mean([_number(seed["held_out"][-1]) for seed in rows["AdamW"]["seeds"]])
            curves = np.array([seed["held_out"] for seed in rows[row]["seeds"] if len(seed["held_out"]) == POINTS])
            logs.append(np.log(curves.astype(float).mean(0) / last))
        mean = np.interp(np.arange(steps + 1), x, np.exp(np.mean(logs, 0)))
        lines[row] = mean, np.zeros_like(mean)
    emphasised = [row for row in lines if row.startswith("learned") and "coordinatewise" not in row]
    title = f"validation loss on {len(found)} workloads, warm-up and cosine"
    draw(lines, path, title, emphasised, band=None, ylabel="in AdamW's last, geometric mean")


def write(report: dict, folder: Path) -> None:
    """``workloads.json``, ``table.txt``, ``table.md`` and ``workloads.png``."""
    write_text(folder / "workloads.json", json_text(report) + "\n")
    write_text(folder / "table.md", markdown(report) + "\n")
    write_text(folder / "table.txt", table(report) + "\n")
    plot(report, folder / "workloads.png")
