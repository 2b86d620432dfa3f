"""Rows that compare networks with tuned baselines, and rows of long runs of the networks alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from l2l_fast.config import state_size
from l2l_fast.evaluate.compare import Contest, held_out, held_out_seeds, learned_lanes
from l2l_fast.evaluate.comparison import Comparison
from l2l_fast.evaluate.costs import measure_cost
from l2l_fast.evaluate.pictures import plot_front, plot_start_scales
from l2l_fast.evaluate.plots import plot_curves
from l2l_fast.evaluate.store import stored_trajectories
from l2l_fast.evaluate.trajectories import Lane, smoothed
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce.figures import Entry, Findings
from l2l_fast.reproduce.rows import ROWS, Case, Row
from l2l_fast.reproduce.run import Run, write

ADAM_BYTES = 8  # of state for each coordinate: two moments in float32
EARLY, LATE = (500, 1000), 500  # the steps that a long run's last ones are held against, and how many those are
Networks = Mapping[str, CoordinatewiseLSTM]


def judge(name: str, networks: Networks, run: Run) -> Findings:
    """Run a row of the kinds "compare" and "long" on networks, and write its JSON, tables and pictures."""
    row, findings = ROWS[name], run.findings(name, list(networks))
    folder = run.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    of_kind = {"compare": _compare, "long": _long}[row.kind]
    found = [of_kind(case, networks, run, findings, folder) for case in row.cases]
    by_scale = dict(zip((case.options.get("init_scale") for case in row.cases), found, strict=True))
    if len(by_scale) > 1 and None not in by_scale:
        _against_start_scales(by_scale, findings, folder)
    if row.costs:
        _against_costs(found, networks, run, findings, folder)
    write(findings, folder)
    return findings


def contest(case: Case, row: Row, networks: Networks, run: Run) -> Contest:
    """What a case of a row of the kind "compare" compares."""
    settings = run.settings
    return Contest(
        run.task(case), dict(networks), case.horizons, seeds=settings.seeds, tuning_seeds=settings.tuning_seeds,
        baselines=row.baselines, seed=run.seed, state_dtype=getattr(torch, row.state_dtype), device=run.device,
        store=run.store(case),
    )  # fmt: skip


def long_lanes(case: Case, networks: Networks, run: Run) -> tuple[dict[str, Lane], dict]:
    """Lanes by name of a case of a row of the kind "long", and how they are run: arguments of stored_trajectories."""
    shared = {"horizon": run.settings.long_horizon, "seeds": held_out_seeds(run.seed, run.settings.seeds)}
    shared |= {"device": run.device, "store": run.store(case)}
    return learned_lanes(dict(networks)), {"task": held_out(run.task(case))} | shared


def _compare(case: Case, networks, run: Run, findings: Findings, folder: Path) -> dict[int, Comparison]:
    label, row = case.label(run.dataset), ROWS[findings.row]
    with run.bars(f"{findings.row}: {label}") as progress:
        found = contest(case, row, networks, run).result(progress)
    for horizon, comparison in found.items():
        comparison.task = label
        entry = Entry.of(comparison, f"{label}, {horizon} steps", dict(case.bars.get(horizon, {})))
        if "bytes" in entry.bars:
            for name, network in networks.items():
                size = state_size(network.config) * getattr(torch, row.state_dtype).itemsize
                entry.figures[name]["bytes"] = size / ADAM_BYTES
        stem = f"{_file_name(label)}-{horizon}"
        entry.files = [f"{stem}.json", f"{stem}.png"]
        comparison.to_json(folder / f"{stem}.json")
        comparison.plot(folder / f"{stem}.png")
        findings.entries.append(entry)
        findings.pictures[f"{stem}.png"] = entry.label
    return found


def _against_start_scales(found: dict[float, dict[int, Comparison]], findings: Findings, folder: Path) -> None:
    """A picture more for a row whose cases differ in the start scale alone."""
    for horizon in next(iter(found.values())):
        picture, task = f"start-scales-{horizon}.png", findings.entries[0].label.split(",")[0]
        title = f"{task}: start scales, {horizon} steps, {findings.seeds} held-out seeds, baselines tuned"
        plot_start_scales({scale: by[horizon] for scale, by in found.items()}, folder / picture, title)
        findings.pictures = {picture: title} | findings.pictures


def _against_costs(found: list[dict[int, Comparison]], networks, run: Run, findings: Findings, folder: Path) -> None:
    """The costs of the networks as one case more, and a picture of quality against time."""
    costs = {name: measure_cost(network, run.device) for name, network in networks.items()}
    comparisons = [comparison for by_horizon in found for comparison in by_horizon.values()]
    figures = {
        name: {"state": cost.bytes, "multiply_adds": cost.multiply_adds, "nanoseconds": cost.nanoseconds}
        for name, cost in costs.items()
    }
    findings.entries.append(Entry("each coordinate and step", figures))
    title = f"mean loss against the time of a step, {findings.seeds} held-out seeds, baselines tuned"
    plot_front({name: cost.nanoseconds for name, cost in costs.items()}, comparisons, folder / "front.png", title)
    findings.pictures = {"front.png": title} | findings.pictures


def _long(case: Case, networks, run: Run, findings: Findings, folder: Path) -> None:
    label, horizon = case.label(run.dataset), run.settings.long_horizon
    with run.bars(f"{findings.row}: {label}") as progress:
        on_step = progress and (lambda done: progress(f"{horizon} steps", done, horizon))
        lanes, shared = long_lanes(case, networks, run)
        losses = stored_trajectories(lanes=lanes.values(), on_step=on_step, **shared)
    curves = dict(zip(networks, losses, strict=True))
    for steps in sorted({min(EARLY[1], horizon), horizon}):
        figures = {name: stability(curve[:, : steps + 1]) for name, curve in curves.items()}
        (bars,) = case.bars.values()
        entry = Entry(
            f"{label}, {steps} steps", figures, {m: bars[m] for m in bars if m in figures[next(iter(figures))]}
        )
        findings.entries.append(entry)
    picture = f"{_file_name(label)}-{horizon}.png"
    entry.files = [picture]
    findings.pictures[picture] = f"{label}: each point is the mean of the {_window(horizon)} steps up to it"
    drawn = {name: smoothed(curve, 20 * _window(horizon)) for name, curve in curves.items()}
    seeds = f"{run.settings.seeds} held-out seeds"
    plot_curves(drawn, folder / picture, f"{label}: {horizon} steps, {seeds}", emphasised=list(networks))


def stability(losses: Tensor) -> dict[str, float | None]:
    """Seeds that diverged among losses [B, T + 1], and how the last losses compare with earlier ones.

    A seed diverged where a loss is not finite, or where the smoothed loss at the end is above the first loss.
    """
    losses = losses.double()
    horizon = losses.shape[1] - 1
    bad = ~losses.isfinite().all(1) | (smoothed(losses, horizon)[:, -1] > losses[:, 0])
    figures = {"diverged": float(bad.sum())}
    if horizon > EARLY[1]:
        ratio = losses[:, -LATE:].mean() / losses[:, EARLY[0] + 1 : EARLY[1] + 1].mean()
        figures["late"] = ratio.item() if ratio.isfinite() else None
    return figures


def _window(horizon: int) -> int:
    """Steps that a picture of a long run averages over."""
    return max(1, horizon // 200)


def _file_name(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "-")
