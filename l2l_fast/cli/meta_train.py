"""``l2l-fast meta-train``: train a learned optimizer."""

from __future__ import annotations

import math
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from l2l_fast.cli.options import HORIZONS, Data, Device, Json, Out, Seed, curriculum, note, out_folder, report
from l2l_fast.evaluate import plot_curves
from l2l_fast.meta import Trained, ranks, train
from l2l_fast.meta.recipes import for_tasks, read
from l2l_fast.tasks import Task, get

Choice = typer.Option  # short, for the long list below


def meta_train(
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="TASK...", help="One or several.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None, Choice(help="Train by this recipe: a shipped network's name, or a file.", show_default="by task")
    ] = None,
    meta_steps: Annotated[
        int | None, Choice(help="Meta-updates, of a recipe's last stage.", min=1, show_default="by task")
    ] = None,
    max_minutes: Annotated[float, Choice(help="Stop earlier after this time.", min=0)] = math.inf,
    network: Annotated[str | None, Choice(help="Start from this network: name, folder or hub id.")] = None,
    features: Annotated[str | None, Choice(help="identity, log_sign, moments or both.", show_default="by task")] = None,
    hidden_size: Annotated[int | None, Choice(help="Units a layer.", show_default="by task")] = None,
    num_layers: Annotated[int | None, Choice(help="LSTM layers.", show_default="by task")] = None,
    projection: Annotated[bool | None, Choice(help="ELU projection before the LSTM.", show_default="by task")] = None,
    linear_path: Annotated[
        bool | None, Choice(help="Add a linear function of the features to the output.", show_default="by task")
    ] = None,
    output: Annotated[str | None, Choice(help="linear or tanh.", show_default="by task")] = None,
    output_scale: Annotated[float | None, Choice(help="Factor of the update.", show_default="by task")] = None,
    update_rms: Annotated[
        float | None, Choice(help="RMS that each tensor's update is scaled to.", show_default="by task")
    ] = None,
    max_update_rms: Annotated[
        float | None, Choice(help="The most, where gradients agree from step to step.", show_default="by task")
    ] = None,
    unroll: Annotated[int | None, Choice(help="Steps a meta-update.", min=1, show_default="by task")] = None,
    horizon: Annotated[str | None, Choice(help=HORIZONS, show_default="by task")] = None,
    instances: Annotated[int | None, Choice(help="Instances side by side.", min=1, show_default="by task")] = None,
    parallel: Annotated[int | None, Choice(help="Trajectories a meta-update.", min=1, show_default="by task")] = None,
    meta_lr: Annotated[
        float | None, Choice(help="Learning rate of Adam on the network.", show_default="by task")
    ] = None,
    schedule: Annotated[str | None, Choice(help="constant or cosine.", show_default="by task")] = None,
    objective: Annotated[str | None, Choice(help="sum, relative or log.", show_default="by task")] = None,
    meta_optimizer: Annotated[str | None, Choice(help="adam or soap.", show_default="by task")] = None,
    average: Annotated[float | None, Choice(help="Decay of averaged weights.", show_default="by task")] = None,
    scaling: Annotated[float | None, Choice(help="Range r of random scaling.", show_default="by task")] = None,
    lr: Annotated[float | None, Choice(help="Of the learned update.", show_default="by network")] = None,
    imitation: Annotated[
        float | None, Choice(help="Share of trajectories led by Adam.", min=0, max=1, show_default="by task")
    ] = None,
    second_derivatives: Annotated[
        bool | None,
        Choice("--second-derivatives/--first-order", help="Whether to keep them.", show_default="by task"),
    ] = None,
    estimator: Annotated[
        str | None,
        Choice(help="backpropagation, es, pes, es+backpropagation or pes+backpropagation.", show_default="by task"),
    ] = None,
    perturbations: Annotated[
        int | None, Choice(help="Perturbed copies of the network for es and pes, even.", min=2, show_default="16")
    ] = None,
    sigma: Annotated[float | None, Choice(help="Their standard deviation.", show_default="0.01")] = None,
    perturbed_share: Annotated[
        str | None, Choice(help="Of es or pes beside backpropagation: 0 to 1, or variance.", show_default="0.5")
    ] = None,
    init_scale: Annotated[str | None, Choice(help="Start std of classifiers: 0.01, or LOW:HIGH.")] = None,
    checkpoint_every: Annotated[
        int | None, Choice(help="Meta-steps between checkpoints; at most a minute.", show_default="100")
    ] = None,
    tensorboard: Annotated[bool, Choice("--tensorboard", help="Write logs for TensorBoard.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Train an optimizer on TASK, or on several in turn.

    Writes the network, a checkpoint, history.json and meta_training.png into --out; the stages of a recipe before its
    last into stage-1 and so on below it. Run the same command again to go on after an interruption. What is not given
    follows the recipe, or what is known to suit the kind of task.

    Under torchrun every process has --instances of its own, and gradients are averaged; --out is a folder that all
    share. When a process dies, torchrun --max-restarts starts all again, and they go on from the last checkpoint.

    \b
    Examples:
        l2l-fast meta-train quadratic
        l2l-fast meta-train --recipe l2l-base-v1 --seed 1 --out runs/base-1
        l2l-fast meta-train mnist-mlp --meta-steps 4000 --seed 1 --out runs/mnist
        l2l-fast meta-train digits-mlp digits-mlp-2layer --horizon 50:300 --init-scale 0.003:0.3
        torchrun --nproc-per-node 4 --max-restarts 3 --no-python l2l-fast meta-train mnist-mlp --out runs/mnist
    """
    if bool(tasks) == bool(recipe):
        raise typer.BadParameter("give one or several TASKs, or --recipe NAME")
    if recipe and init_scale:
        raise typer.BadParameter("--init-scale goes with TASKs; a recipe's tasks have their own")
    shape = _given(features=features, hidden_size=hidden_size, num_layers=num_layers, projection=projection,
                   linear_path=linear_path, output=output, output_scale=output_scale,
                   update_rms=update_rms, max_update_rms=max_update_rms)  # fmt: skip
    if network is not None and shape:
        raise typer.BadParameter(f"--network already has its own {', '.join(shape)}; leave them out")
    if recipe:
        chosen, title = read(recipe), Path(recipe).stem
    else:
        chosen, title = for_tasks(*_mixture(tasks, init_scale)), "-".join(tasks)
    chosen["network"] |= shape
    changed = _given(
        unroll=unroll, instances=instances, parallel=parallel, meta_lr=meta_lr, schedule=schedule,
        objective=objective, meta_optimizer=meta_optimizer, average=average, scaling=scaling, imitation=imitation,
        lr=lr, second_derivatives=second_derivatives, horizon=curriculum(horizon), estimator=estimator,
        perturbations=perturbations, sigma=sigma, perturbed_share=_perturbed_share(perturbed_share),
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    if second_derivatives or estimator in ("es", "pes"):
        changed["coordinates"] = None  # a sample of them carries no second derivatives, and es runs nothing backward
    out = out_folder(out, f"meta-train-{title}")
    begun = time.monotonic()
    with ranks.joined(device) as own:
        leads = ranks.rank() == 0
        trained = train(
            chosen, out, network=network, meta_steps=meta_steps, max_seconds=60 * max_minutes, seed=seed, device=own,
            tensorboard=tensorboard, on_stage=partial(_record, title) if leads else None, **changed,
        )  # fmt: skip
    if not leads:
        return
    trainer, history, folder = trained.trainer, trained.history, trained.folder
    names = [task.name for task in trainer.tasks]
    seconds = time.monotonic() - begun
    result = {"tasks": names, "meta_steps": trainer.meta_step, "seconds": seconds, "best_score": history.best_score,
              "skipped": history.skipped, "network": str(folder / "network")}  # fmt: skip
    try_it = ["l2l-fast", "compare", names[0], "--network", str(folder / "network")]
    text = (
        f"{trainer.meta_step} meta-steps in {seconds:.0f} s; "
        f"best validation {history.best_score:.4g} (mean of f_t / f_0)\n"
        f"network: {folder / 'network'}\n"
        f"try it:  {shlex.join(try_it)}"
    )
    report(result, text, as_json)


def _mixture(names: list[str], init_scale: str | None) -> list[Task]:
    """The tasks of these names; classifiers among them start as ``--init-scale`` says."""
    if init_scale is None:
        return [get(name) for name in names]
    scaled = {name for name in names if hasattr(get(name), "init_scale")}
    if not scaled:
        raise typer.BadParameter(f"--init-scale is for classifiers; {names[0]} starts in its own way: leave it out")
    options = {"init_scale": _init_scale(init_scale)}
    return [get(name, **(options if name in scaled else {})) for name in names]


def _record(title: str, stage: Trained) -> None:
    """The picture of a stage that has ended."""
    losses = stage.history.meta_losses
    plot_curves(
        {"meta-loss": np.array(losses)}, stage.folder / "meta_training.png", f"meta-training: {title}",
        xlabel="meta-step (meta-updates)", ylabel=f"meta-loss of a window ({stage.trainer.options.objective})",
        log=min(losses) > 0,
    )  # fmt: skip
    note(f"network, history and picture are in {stage.folder}")


def _given(**options) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def _perturbed_share(text: str | None) -> float | str | None:
    try:
        return text if text in (None, "variance") else float(text)
    except ValueError:
        raise typer.BadParameter(f"--perturbed-share {text!r}: give a number from 0 to 1, or variance") from None


def _init_scale(text: str) -> float | tuple[float, float]:
    try:
        values = [float(part) for part in text.split(":")]
        return values[0] if len(values) == 1 else (values[0], values[1])
    except ValueError:
        raise typer.BadParameter(f"--init-scale {text!r}: give 0.01 or 0.003:0.3") from None
