"""The row ``proposal``: both readings of the deck's three networks.

Offline: an LSTM stands where Adam stood while the weights of an MLP optimizer are trained, so a step is a meta-update.
Online: an LSTM changes the MLP between two steps of one training. The networks are those of ``weights/proposal``, or of
a folder that ``examples/proposal_online.py`` has left.
"""

from __future__ import annotations

from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from l2l_fast.adaptive import AdaptiveMLP, CoordinatewiseMLP
from l2l_fast.checkpoint import WEIGHTS
from l2l_fast.evaluate.baselines import find_baseline
from l2l_fast.evaluate.compare import compare_horizons, held_out, held_out_seeds, learned_lanes, tuning_seeds_of
from l2l_fast.evaluate.plots import plot_curves
from l2l_fast.evaluate.store import stored_trajectories, stored_tuning
from l2l_fast.evaluate.trajectories import Lane, final_loss, mean_loss, smoothed
from l2l_fast.mlp_optim import MLPOptimizer
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce.figures import Entry, Findings
from l2l_fast.reproduce.rows import ROWS, Case
from l2l_fast.reproduce.run import Run, write

FOLDER = WEIGHTS / "proposal"
SEEDS = 5  # held-out ones of the online reading, and as many others to tune on
SGD_RATES = tuple(10.0**k for k in range(-6, 1))  # of hypergradient descent on phi
ONLINE, FROZEN, ALONE, SGD, ADAM = "online", "its MLP, frozen", "an MLP trained alone", "SGD on phi", "Adam"


class _Networks:
    """Of a folder, and the shipped ones where it has none."""

    def __init__(self, folder: str | PathLike | None) -> None:
        self.folder = None if folder is None else Path(folder)
        names = [path.name for path in FOLDER.iterdir() if path.is_dir()]
        if self.folder is not None and not any((self.folder / name).is_dir() for name in names):
            raise FileNotFoundError(f"{folder} has none of {', '.join(sorted(names))}")

    def __truediv__(self, name: str) -> Path:
        given = None if self.folder is None else self.folder / name
        return given if given is not None and given.is_dir() else FOLDER / name


def proposal(run: Run, networks: str | PathLike | None = None) -> Findings:
    """Run both readings, and write JSON, tables and pictures.

    Args:
        run: where and how much.
        networks: a folder with some of those of ``weights/proposal``, in their place.

    Raises:
        FileNotFoundError: the folder has none of them.
    """
    networks = _Networks(networks)
    findings = run.findings("proposal", ["LSTM", ONLINE, SGD, ALONE, ADAM])
    folder = run.folder / "proposal"
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = ROWS["proposal"].cases
    _offline(first, run, findings, folder, networks)
    behind = {case.label(run.dataset): _online(case, run, findings, folder, networks) for case in others}
    networks = {label: one for label, one in behind.items() if not label.startswith("quadratic")}
    label = f"online: of {len(networks)} networks, those where it is not below its own frozen MLP"
    findings.entries.append(Entry(label, {ONLINE: {"behind": float(sum(networks.values()))}}, {"behind": 1.0}))
    write(findings, folder)
    return findings


def _offline(case: Case, run: Run, findings: Findings, folder: Path, networks: _Networks) -> None:
    """The LSTM, and tuned Adam in the same place: at equal meta-updates, and at equal seconds."""
    (horizon,), settings, label = case.horizons, run.settings, case.label(run.dataset)
    with run.bars(f"proposal: {label}") as progress:
        found = compare_horizons(
            run.task(case), {"LSTM": CoordinatewiseLSTM.from_pretrained(networks / "offline")}, case.horizons,
            seeds=settings.seeds, tuning_seeds=settings.tuning_seeds, baselines=[find_baseline("adam")], seed=run.seed,
            device=run.device, progress=progress, store=run.store(case),
        )[horizon]  # fmt: skip
    label = f"offline: {label}, {horizon} meta-updates, {settings.seeds} seeds"
    found.task = label
    entry, stem = Entry.of(found, label, dict(case.bars[horizon])), f"offline-{horizon}"
    entry.files = [f"{stem}.json", f"{stem}.png"]
    found.to_json(folder / f"{stem}.json")
    found.plot(folder / f"{stem}.png")
    findings.pictures[f"{stem}.png"] = label
    findings.entries.append(entry)


def _online(case: Case, run: Run, findings: Findings, folder: Path, networks: _Networks) -> bool:
    """The LSTM that changes phi, beside what changes it otherwise or not at all; says whether it is behind."""
    (horizon,), label, store = case.horizons, case.label(run.dataset), run.store(case)
    kind = "quadratic" if label.startswith("quadratic") else "networks"
    network = AdaptiveMLP.from_pretrained(networks / f"online-{kind}")
    alone = CoordinatewiseMLP.from_pretrained(networks / f"mlp-{kind}")
    task, seeds = held_out(run.task(case)), min(SEEDS, run.settings.seeds)
    tuning = tuning_seeds_of(run.seed, min(SEEDS, run.settings.tuning_seeds))
    running = {"horizon": horizon, "device": run.device, "store": store}
    with run.bars(f"proposal: {label}, online") as progress:
        learned = learned_lanes({ONLINE: network, FROZEN: network.mlp, ALONE: alone})
        rate = _best_rate(task, network.mlp, tuning, running)
        adam = find_baseline("adam")
        tuned = stored_tuning(
            task, adam, [horizon], seeds=tuning, device=run.device, progress=progress, store=store
        )[horizon].lr  # fmt: skip
        lanes = {
            **learned, SGD: _sgd(network.mlp, rate, learned[FROZEN]),
            ADAM: Lane(partial(adam.factory, lr=tuned), identity={"baseline": "adam", "rate": tuned}),
        }  # fmt: skip
        on_step = progress and (lambda done: progress("comparing", done, horizon))
        test = held_out_seeds(run.seed, seeds)
        losses = dict(
            zip(lanes, stored_trajectories(task, lanes.values(), seeds=test, on_step=on_step, **running), strict=True)
        )
    frozen = losses.pop(FROZEN)
    title = f"online: {label}, {horizon} steps, {seeds} seeds"
    entry = Entry(title, {}, rivals=f"its own MLP frozen; SGD on phi at {rate:g}, Adam at {tuned:.3g}")
    for name, found in losses.items():
        entry.figures[name], entry.errors[name] = _against(found, frozen, horizon)
    picture = f"online-{label.replace(', ', '-')}.png"
    entry.files = [picture]
    findings.pictures[picture] = title
    curves = {name: smoothed(found, horizon) for name, found in {**losses, FROZEN: frozen}.items()}
    plot_curves(curves, folder / picture, title, emphasised=[ONLINE])
    findings.entries.append(entry)
    return not entry.figures[ONLINE]["ratio_frozen"] < 1


def _against(losses: Tensor, frozen: Tensor, horizon: int) -> tuple[dict, dict]:
    """Mean and final loss in the frozen MLP's, with standard errors paired over seeds."""
    figures, errors = {}, {}
    for metric, of, mean in (
        ("ratio_frozen", lambda found: found[:, 1:].double().mean(1), mean_loss),
        ("ratio_frozen_final", lambda found: smoothed(found, horizon)[:, -1], partial(final_loss, horizon=horizon)),
    ):
        ratio, difference = mean(losses) / mean(frozen), of(losses) - of(frozen)
        figures[metric] = ratio if ratio < float("inf") else None
        error = difference.std() / len(difference) ** 0.5 / mean(frozen) if len(difference) > 1 else None
        errors[metric] = error.item() if error is not None and error.isfinite() else None
    wins = (losses[:, 1:].double().mean(1) < frozen[:, 1:].double().mean(1)).sum()
    return figures | {"wins": float(wins)}, errors


def _best_rate(task, mlp: CoordinatewiseMLP, seeds: range, running: dict) -> float:
    """Of SGD on phi, by the mean loss on seeds that are not used again."""
    (frozen,) = learned_lanes({FROZEN: mlp}).values()
    lanes = [_sgd(mlp, rate, frozen) for rate in SGD_RATES]
    found = stored_trajectories(task, lanes, seeds=seeds, **running)
    return min(zip(SGD_RATES, found, strict=True), key=lambda pair: mean_loss(pair[1]))[0]


def _sgd(mlp: CoordinatewiseMLP, rate: float, frozen: Lane) -> Lane:
    """Hypergradient descent from the same phi_0."""
    make = partial(torch.optim.SGD, lr=rate)
    identity = dict(frozen.identity) | {"phi_optimizer": "SGD", "rate": rate}
    return Lane(lambda params: MLPOptimizer(params, mlp, phi_optimizer=make), elementwise=False, identity=identity)
