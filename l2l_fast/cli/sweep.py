"""``l2l-fast sweep``: how the meta-optimizer's learning rate decides what is learned."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import typer

from l2l_fast.cli.options import (
    Data,
    Device,
    Json,
    Out,
    Seed,
    note,
    out_folder,
    parse_rates,
    progress_bars,
    report,
)  # fmt: skip
from l2l_fast.evaluate import plot_curves
from l2l_fast.evaluate.compare import held_out, held_out_seeds, learned_lanes
from l2l_fast.evaluate.trajectories import trajectories
from l2l_fast.files import write_text
from l2l_fast.meta.recipes import train_at_rate
from l2l_fast.tasks import get
from l2l_fast.writing import json_text


def sweep(
    task: Annotated[str, typer.Argument(help="A task's name; see l2l-fast tasks.", show_default=False)],
    meta_lr: Annotated[str, typer.Option(help="Learning rates of Adam on the network.")] = "0.1,0.03,0.01,0.003,0.001",
    meta_steps: Annotated[int, typer.Option(help="Meta-updates for each.", min=1)] = 500,
    horizon: Annotated[int, typer.Option(help="Steps of a trajectory.", min=1)] = 100,
    seeds: Annotated[int, typer.Option(help="Held-out seeds.", min=1)] = 32,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Train a network on TASK at each meta learning rate and run them all on held-out seeds.

    Writes sweep.json and sweep.png, the loss against the number of steps, into --out, and names the best rate:
    that of the lowest mean loss over the horizon.

    \b
    Examples:
        l2l-fast sweep quadratic --meta-lr 0.1,0.03,0.01,0.003,0.001
        l2l-fast sweep digits-mlp --meta-lr 0.01,0.003 --meta-steps 1000
    """
    rates = parse_rates(meta_lr, "--meta-lr")
    problem = get(task)
    out = out_folder(out, f"sweep-{task}")
    networks = {}
    with progress_bars() as progress:
        for rate in rates:
            on_step = partial(progress, f"meta-lr {rate:g}")
            trained = train_at_rate(problem, rate, meta_steps, horizon, seed=seed, device=device, on_step=on_step)
            networks[rate] = trained.network
        lanes, test_seeds = list(learned_lanes(networks).values()), held_out_seeds(seed, seeds)
        losses = trajectories(held_out(problem), lanes, horizon=horizon, seeds=test_seeds, device=device)
    curves = dict(zip(rates, losses, strict=True))
    means = {rate: curve[:, 1:].mean().item() for rate, curve in curves.items()}
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise RuntimeError("every meta learning rate diverged; try smaller ones")
    best = min(finite, key=finite.get)
    labels = {rate: f"{rate:g}" + (" (best)" if rate == best else "") for rate in rates}
    plot_curves(
        {labels[rate]: curve for rate, curve in curves.items()}, out / "sweep.png",
        f"{task}: learned optimizers by meta learning rate", emphasised=[labels[best]],
    )  # fmt: skip
    result = {
        "task": task, "horizon": horizon, "seeds": seeds, "meta_steps": meta_steps, "best": best,
        "meta_lrs": {f"{rate:g}": {"mean_loss": means[rate],
                                   "curve": curve.mean(0).tolist()} for rate, curve in curves.items()},
    }  # fmt: skip
    write_text(out / "sweep.json", json_text(result) + "\n")
    note(f"sweep.json and sweep.png are in {out}")
    lines = [f"{task}: mean loss over {horizon} steps by meta learning rate, {seeds} held-out seeds", ""]
    lines += [f"{rate:>10g}  {means[rate]:>10.4g}{'  best' if rate == best else ''}" for rate in rates]
    report(result, "\n".join(lines), as_json)
