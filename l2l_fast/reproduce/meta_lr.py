"""The row ``meta-lr``: loss against meta-training steps at the deck's learning rates, by a sweep."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from l2l_fast.evaluate.plots import plot_curves
from l2l_fast.reproduce.figures import Entry, Findings
from l2l_fast.reproduce.rows import ROWS
from l2l_fast.reproduce.run import Run, write
from l2l_fast.studies import Point, Sweep, sweep

RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
META_STEPS = 500


def meta_lr(run: Run) -> Findings:
    """Train networks at each rate, a few meta-seeds each, and run them on held-out seeds."""
    (case,) = ROWS["meta-lr"].cases
    (horizon,) = case.horizons
    settings, problem = run.settings, run.task(case)
    meta_steps = settings.meta_steps or META_STEPS
    what = Sweep(
        problem, {"meta_lr": RATES}, meta_steps, horizon, settings.seeds, settings.meta_seeds, seed=run.seed,
        device=run.device,
    )  # fmt: skip
    with run.bars("meta-lr: meta-training") as progress:
        found = sweep(what, run.folder / "studies", workers=run.jobs, progress=progress)
    findings = run.findings("meta-lr", [f"{rate:g}" for rate in RATES])
    curves, figures = {}, {}
    for name, point in zip(findings.networks, found.points, strict=True):
        curves[name] = _curves(point, horizon)
        last = curves[name][:, -max(1, meta_steps // 10) :].mean(1)
        figures[name] = {
            "meta_loss": statistics.median(last.tolist()),
            "mean_loss": statistics.median(point.mean_losses),
            "final_loss": statistics.median(point.final_losses),
        }
    best = min(figures, key=lambda name: figures[name]["mean_loss"])
    label = f"{problem.name}, {horizon} steps, {meta_steps} meta-steps; best meta learning rate by mean loss: {best}"
    picture, folder = "meta-lr.png", run.folder / "meta-lr"
    folder.mkdir(parents=True, exist_ok=True)
    findings.entries.append(Entry(label, figures, files=[picture]))
    findings.pictures[picture] = f"{problem.name}: what is learned at each meta learning rate"
    legend = {f"meta-lr {name}{' (best)' if name == best else ''}": curve for name, curve in curves.items()}
    title = f"{problem.name}: meta-training at five learning rates, {settings.meta_seeds} meta-seeds"
    plot_curves(
        legend, folder / picture, title,
        emphasised=[f"meta-lr {best} (best)"], xlabel="meta-training step (meta-updates)",
        ylabel=f"mean loss of the last {horizon} steps trained on",
    )  # fmt: skip
    write(findings, folder)
    return findings


def _curves(point: Point, horizon: int) -> Tensor:
    """Meta-losses [meta-seeds, meta_steps], each the mean over a trajectory's worth of windows."""
    windows = max(1, horizon // point.unroll)
    losses = torch.tensor(point.meta_losses, dtype=torch.float64, device="cpu")
    sums = torch.cat([losses[:, :1].expand(-1, windows - 1), losses], 1).unfold(1, windows, 1).sum(2)
    return sums / (windows * point.unroll)
