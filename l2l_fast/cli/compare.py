"""``l2l-fast compare``: a learned optimizer beside tuned hand-designed ones."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from l2l_fast import evaluate
from l2l_fast.cli.options import Data, Device, Json, Out, Seed, note, out_folder, progress_bars, report
from l2l_fast.tasks import get


def compare(
    task: Annotated[str, typer.Argument(help="A task's name; see l2l-fast tasks.", show_default=False)],
    network: Annotated[
        str, typer.Option(help="A network: shipped name, folder or hub id. It runs at its default lr.")
    ] = "l2l-base-v1",
    horizon: Annotated[int, typer.Option(help="Steps a trajectory.", min=1)] = 100,
    seeds: Annotated[int, typer.Option(help="Held-out seeds.", min=1)] = 10,
    baselines: Annotated[
        str, typer.Option(help="Which, separated by commas; also adam-fused, and NAME-linear and NAME-cosine.")
    ] = ",".join(evaluate.USUAL),
    schedule: Annotated[
        str, typer.Option(help="Of every rate: constant; linear, to 0; cosine, up over a twentieth and down to 0.")
    ] = "constant",
    tune_learned: Annotated[
        bool, typer.Option("--tune-learned", help="Tune the network's rate as well, as the baselines' are.")
    ] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Compare a network with tuned baselines on TASK.

    Every baseline's learning rate is tuned for this horizon on other seeds; then all run from the same starts on the
    same minibatches. Writes comparison.json and comparison.png into --out.

    \b
    Examples:
        l2l-fast compare quadratic --network runs/meta-train-quadratic/network
        l2l-fast compare mnist-mlp --network runs/mnist/network --horizon 200 --baselines adam,nesterov
        l2l-fast compare deep-mlp --network l2l-base --schedule cosine --tune-learned --baselines adamw
    """
    problem, names = get(task), [name.strip() for name in baselines.split(",")]
    out = out_folder(out, f"compare-{task}")
    with progress_bars() as progress:
        comparison = evaluate.compare(
            problem, network, horizon=horizon, seeds=seeds, baselines=names, seed=seed, schedule=schedule,
            tune_learned=tune_learned, device=device, progress=progress,
        )  # fmt: skip
    comparison.to_json(out / "comparison.json")
    comparison.plot(out / "comparison.png")
    note(f"comparison.json and comparison.png are in {out}")
    report(json.loads((out / "comparison.json").read_text(encoding="utf-8")), comparison.table(), as_json)
