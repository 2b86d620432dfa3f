"""``l2l-fast reproduce``: every comparison of the deck, and questions beyond it."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import l2l_fast.reproduce
from l2l_fast.cli.options import Data, Device, Json, Out, Seed, note, out_folder, progress_bars, report
from l2l_fast.files import write_text
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce import FULL, QUICK, ROWS, Findings, Run, find
from l2l_fast.reproduce.report import html, markdown
from l2l_fast.reproduce.workloads import DEFAULT, Plan, rivals, table, write
from l2l_fast.reproduce.workloads import QUICK as QUICK_WORKLOADS
from l2l_fast.reproduce.workloads import run as run_workloads
from l2l_fast.studies.queue import require_optuna
from l2l_fast.tasks.classifier import DATASETS
from l2l_fast.tasks.workloads import WORKLOADS

Networks = Mapping[str, CoordinatewiseLSTM]
RIVALS = tuple(rivals())


def reproduce(
    row: Annotated[str, typer.Argument(help=f"{', '.join(ROWS)}, all of these, or workloads.")] = "all",
    network: Annotated[
        list[str] | None,
        typer.Option(help="Name, folder or hub id; several for several meta-seeds.", show_default="l2l-base-v1"),
    ] = None,
    quadratic_network: Annotated[
        list[str] | None, typer.Option(help="The same for the row quadratic.", show_default="l2l-quadratic")
    ] = None,
    small_network: Annotated[
        list[str] | None, typer.Option(help="The same for the row seconds.", show_default="l2l-small")
    ] = None,
    proposal_networks: Annotated[
        Path | None,
        typer.Option(
            help="The same for the row proposal: a folder, as examples/proposal_online.py leaves it.",
            show_default="the package's",
        ),
    ] = None,
    dataset: Annotated[str, typer.Option(help="digits (minutes, nothing to download) or mnist.")] = "digits",
    seeds: Annotated[int | None, typer.Option(help="Held-out seeds.", min=1, show_default="10")] = None,
    steps: Annotated[int | None, typer.Option(help="Of workloads: steps.", min=20, show_default="1000")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Of workloads, some: {', '.join(WORKLOADS)}.", show_default="all")
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(help=f"Of workloads, some: {'; '.join(RIVALS)}. AdamW is always there.", show_default="the usual"),
    ] = None,
    rates_from: Annotated[
        Path | None,
        typer.Option(
            help="Of workloads: a workloads.json whose rates are taken in place of tuning.", dir_okay=False, exists=True
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes, one thread each; figures are the same.", min=1)] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Few seeds, short trainings: to try it.")] = False,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Run ROW, or all rows: learned optimizers beside tuned baselines, held against bars.

    Each row writes its table, JSON and pictures into a subfolder of --out; "all" adds report.html, one page with
    everything inside, and results.md. What was measured is kept in --out: a run that was killed goes on with the same
    command, and another network meets baselines that are tuned already. --jobs spreads tunings, trainings and lanes
    over processes; figures are those of one.

    The row "workloads" is for l2l-base, in AdamW's place on eight small workloads: language models, image models,
    regression. Every optimizer has the same schedule and as many rates. It takes an hour or more, and is not among all.

    \b
    Examples:
        l2l-fast reproduce quadratic --network runs/demo/network --quick
        l2l-fast reproduce relu --network runs/base-0/network --network runs/base-1/network
        l2l-fast reproduce proposal --proposal-networks runs/proposal
        l2l-fast reproduce all --dataset mnist --jobs 8
        l2l-fast reproduce workloads --jobs 2
        l2l-fast reproduce workloads --steps 3000 --rival AdamW --rival learned --out runs/3000
        l2l-fast reproduce workloads --steps 10000 --rival learned --rates-from runs/3000/workloads.json
    """
    if row == "workloads":
        others = {"--quadratic-network": quadratic_network, "--small-network": small_network, "--seed": seed,
                  "--dataset": dataset != "digits", "--device": device != "cpu"}  # fmt: skip
        if given := [name for name, value in others.items() if value]:
            raise typer.BadParameter(f"{given[0]} does not go with the row workloads: leave it out")
        _workloads(network, steps, workload, rival, rates_from, seeds, jobs, quick, out, as_json)
        return
    if given := [
        name
        for name, value in {
            "--steps": steps,
            "--workload": workload,
            "--rival": rival,
            "--rates-from": rates_from,
        }.items()
        if value
    ]:
        raise typer.BadParameter(f"{given[0]} goes with the row workloads")
    names = find(row)
    if "meta-lr" in names:  # said before hours of work, not after
        require_optuna().logging.set_verbosity(require_optuna().logging.WARNING)
    if dataset not in DATASETS:
        raise typer.BadParameter(f"--dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    given = {"l2l-base-v1": network, "l2l-quadratic": quadratic_network, "l2l-small": small_network}
    if row != "all" and ROWS[row].network:
        given[ROWS[row].network] = given[ROWS[row].network] or network
    # All of them now: what is missing should be said before hours of work, not after.
    networks = {name: _networks(name, given.get(ROWS[name].network)) for name in names}
    if proposal_networks is not None:
        if "proposal" not in names:
            raise typer.BadParameter("--proposal-networks goes with the row proposal")
        if not proposal_networks.is_dir():
            raise typer.BadParameter(f"--proposal-networks must be a folder, got {str(proposal_networks)!r}")
    extra = _load(network) if network else {}
    out = out_folder(out, f"reproduce-{dataset}")
    settings = QUICK if quick else FULL
    if seeds is not None:
        settings = dataclasses.replace(settings, seeds=seeds)
    chosen = {"--network": network, "--quadratic-network": quadratic_network, "--small-network": small_network,
              "--proposal-networks": [str(proposal_networks)] if proposal_networks else None}  # fmt: skip
    words = [*(word for option, values in chosen.items() for value in values or []
             for word in (option, value)), "--dataset", dataset, *(["--seeds", str(seeds)] if seeds else []),
             *(["--quick"] if quick else []), *(["--seed", str(seed)] if seed else [])]  # fmt: skip
    run = Run(
        out, dataset, settings, seed, device, lambda name: shlex.join(["l2l-fast", "reproduce", name, *words]), _bars,
        jobs,
    )  # fmt: skip

    l2l_fast.reproduce.prepare(names, run, networks, beside=extra)
    found = []
    for name in names:
        own = {name: proposal_networks} if name == "proposal" and proposal_networks else networks[name]
        found.append(l2l_fast.reproduce.reproduce(name, run, own, beside=extra))
        note(f"{name}: row.json, table.txt and pictures are in {out / name}")
    if row == "all":
        write_text(out / "report.html", html(found, out, run.command("all")))
        write_text(out / "results.md", markdown(found))
        note(f"report.html and results.md are in {out}")
    report(_result(row, found), "\n\n\n".join(findings.table() for findings in found), as_json)


def _workloads(network, steps, names, chosen_rivals, rates_from, seeds, jobs, quick, out, as_json) -> None:
    if network is not None and len(network) > 1:
        raise typer.BadParameter("--network of the row workloads is one")
    if unknown := [name for name in names or [] if name not in WORKLOADS]:
        raise typer.BadParameter(f"--workload {unknown[0]!r}: give one of {', '.join(WORKLOADS)}")
    if unknown := [name for name in chosen_rivals or [] if name not in RIVALS]:
        raise typer.BadParameter(f"--rival {unknown[0]!r}: give one of {'; '.join(RIVALS)}")
    plan = Plan(
        steps or (100 if quick else 1000),
        seeds or (2 if quick else 5),
        tuple(dict.fromkeys(names or (QUICK_WORKLOADS if quick else WORKLOADS))),
        network[0] if network else "l2l-base",
        tuple(dict.fromkeys(chosen_rivals or DEFAULT)),
        rates_from and str(rates_from),
    )
    CoordinatewiseLSTM.from_pretrained(plan.network)  # what is missing should be said before hours of work
    out = out_folder(out, "reproduce-workloads")
    with progress_bars() as progress:
        found = run_workloads(plan, out, jobs, progress)
    write(found, out)
    note(f"workloads.json, table.txt, table.md and workloads.png are in {out}")
    report(found, table(found), as_json)


def _result(row: str, found: list[Findings]) -> dict:
    contents = {findings.row: findings.to_dict() for findings in found}
    return contents if row == "all" else contents[row]


@contextmanager
def _bars(what: str):
    note(what)
    with progress_bars() as progress:
        yield progress


def _networks(row: str, given: list[str] | None) -> Networks | None:
    """What a row judges; None for a row that trains its networks itself."""
    name = ROWS[row].network
    if name is None:
        return None
    if given:
        return _load(given)
    try:
        return {name: CoordinatewiseLSTM.from_pretrained(name)}
    except FileNotFoundError:
        option = {"l2l-quadratic": "--quadratic-network", "l2l-small": "--small-network"}.get(name, "--network")
        task = "quadratic" if row == "quadratic" else "digits-mlp"
        raise FileNotFoundError(
            f"the row {row} judges {name}, which does not come with this version: train a network with l2l-fast "
            f"meta-train {task} --out runs/mine, then give {option} runs/mine/network"
        ) from None


def _load(given: list[str]) -> Networks:
    """Networks by short names: the folder's own, or the folder's above it where that tells more."""
    paths = [Path(name) for name in given]
    short = [path.parent.name or path.name if path.name == "network" else path.name for path in paths]
    count = Counter(short)
    names = [name if count[name] == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    if len(set(names)) < len(names):
        raise typer.BadParameter("--network was given twice with the same folder")
    return {name: CoordinatewiseLSTM.from_pretrained(path) for name, path in zip(names, given, strict=True)}
