"""The row ``meta-lr``: loss against meta-training steps at the deck's learning rates."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import Tensor

from l2l_fast.evaluate.compare import held_out, held_out_seeds, learned_lanes
from l2l_fast.evaluate.plots import plot_curves
from l2l_fast.evaluate.store import stored_trajectories
from l2l_fast.evaluate.trajectories import final_loss, mean_loss
from l2l_fast.meta.recipes import for_tasks, train_at_rate
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce.figures import Entry, Findings
from l2l_fast.reproduce.rows import ROWS
from l2l_fast.reproduce.run import Run, write

RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
META_STEPS = 500


def meta_lr(run: Run) -> Findings:
    """Train networks at each rate, a few meta-seeds each, and run them on held-out seeds."""
    (case,) = ROWS["meta-lr"].cases
    (horizon,) = case.horizons
    rates = {f"{rate:g}": rate for rate in RATES}
    findings, problem, settings = run.findings("meta-lr", list(rates)), run.task(case), run.settings
    meta_steps, store = settings.meta_steps or META_STEPS, run.store(case)
    curves, figures = {}, {}
    with run.bars("meta-lr: meta-training") as progress:
        for name, rate in rates.items():
            trained = []
            for meta_seed in range(run.seed, run.seed + settings.meta_seeds):
                on_step = progress and partial(progress, f"meta-lr {name}, seed {meta_seed}")
                trained.append(_trained(problem, rate, meta_steps, horizon, meta_seed, run.device, on_step, store))
            curves[name] = torch.stack([curve for curve, _ in trained])
            networks = {f"{name}, seed {k}": network for k, (_, network) in enumerate(trained)}
            losses = stored_trajectories(
                held_out(problem), learned_lanes(networks).values(), horizon=horizon, device=run.device, store=store,
                seeds=held_out_seeds(run.seed, settings.seeds),
            )  # fmt: skip
            last = curves[name][:, -max(1, meta_steps // 10) :].mean(1)
            figures[name] = {
                "meta_loss": statistics.median(last.tolist()),
                "mean_loss": statistics.median(mean_loss(found) for found in losses),
                "final_loss": statistics.median(final_loss(found, horizon) for found in losses),
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


def _trained(problem, rate, meta_steps, horizon, seed, device, on_step, store) -> tuple[Tensor, CoordinatewiseLSTM]:
    """Meta-losses [meta_steps], each the mean over a trajectory's worth of windows, and the network."""
    recipe = for_tasks(problem)
    facts = {"meta_lr": rate, "meta_steps": meta_steps, "horizon": horizon, "meta_seed": seed, "device": device,
             "recipe": repr(recipe | {"tasks": problem.name})}  # fmt: skip
    kept = store.get(**facts)
    if kept is None:
        done = train_at_rate(problem, rate, meta_steps, horizon, seed=seed, device=device, on_step=on_step)
        unroll = done.trainer.options.unroll
        windows = max(1, horizon // unroll)
        losses = torch.tensor(done.history.meta_losses, dtype=torch.float64, device="cpu")
        sums = torch.cat([losses[:1].expand(windows - 1), losses]).unfold(0, windows, 1).sum(1)
        kept = {"curve": sums / (windows * unroll), "weights": done.network.flat_weights().detach().cpu()}
        store.put(kept, **facts)
    network = CoordinatewiseLSTM(**recipe["network"])
    network.load_flat_weights_(kept["weights"])
    return kept["curve"], network.to(device)
