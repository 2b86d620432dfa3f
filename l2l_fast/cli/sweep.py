"""``l2l-fast sweep``: how options of meta-training, such as the meta learning rate, decide what is learned."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from l2l_fast.cli.options import Data, Device, Json, Out, Seed, note, out_folder, parse_rates, progress_bars, report
from l2l_fast.studies import Range, Sweep
from l2l_fast.studies import sweep as run_sweep
from l2l_fast.studies.queue import require_optuna, require_url, shown

RATES = "0.1,0.03,0.01,0.003,0.001"


def sweep(
    task: Annotated[str, typer.Argument(help="A task's name; see l2l-fast tasks.", show_default=False)],
    meta_lr: Annotated[
        str | None,
        typer.Option(help="Learning rates of Adam on the network, or LOW:HIGH to search.", show_default=RATES),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=A,B,C or NAME=LOW:HIGH: another option of meta-train; several are combined.",
            metavar="NAME=VALUES",
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Of a search: how many points are tried.", min=1, show_default="20")
    ] = None,
    meta_steps: Annotated[int, typer.Option(help="Meta-updates for each.", min=1)] = 500,
    horizon: Annotated[int, typer.Option(help="Steps of a trajectory.", min=1)] = 100,
    seeds: Annotated[int, typer.Option(help="Held-out seeds.", min=1)] = 32,
    meta_seeds: Annotated[int, typer.Option(help="Trainings at each combination.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Processes, one thread each; 1 is this one.", min=1)] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            help="URL of a database that workers share.",
            envvar="L2L_FAST_STORAGE",
            show_envvar=True,
            show_default="sqlite:///OUT/study.db",
        ),
    ] = None,
    grace: Annotated[int, typer.Option(help="Seconds of silence after which a worker counts as killed.", min=2)] = 60,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Train a network on TASK at each value of some options, and run them all on held-out seeds.

    Lists of values are tried in every combination; a range is searched by Optuna, --trials points in all. Writes
    sweep.json and sweep.png, the loss against the number of steps, into --out, with each trial's network in a folder of
    its own, and names the best: that of the lowest mean loss over the horizon.

    The same command goes on where it was stopped, and joins in where it runs already: workers on several machines share
    a --storage, such as PostgreSQL. Each trial is run once. One whose worker was killed is taken up by another worker,
    from its checkpoint where that is in --out.

    \b
    Examples:
        l2l-fast sweep quadratic --meta-lr 0.1,0.03,0.01,0.003,0.001 --workers 2
        l2l-fast sweep digits-mlp --meta-lr 0.001:0.1 --vary unroll=10,20,50 --trials 20
        l2l-fast sweep quadratic --storage postgresql+psycopg://user@host/studies --out /shared/sweep
    """
    require_optuna().logging.set_verbosity(require_optuna().logging.WARNING)
    if storage:
        require_url(storage)
    options = _options(meta_lr, vary or [])
    search = any(isinstance(values, Range) for values in options.values())
    if trials and not search:
        raise typer.BadParameter("--trials goes with a range LOW:HIGH; every value of a list is tried")
    if meta_seeds > 1 and search:
        raise typer.BadParameter("--meta-seeds goes with lists of values; a search trains once at each point")
    what = Sweep(task, options, meta_steps, horizon, seeds, meta_seeds, trials, seed, device)
    out = out_folder(out, f"sweep-{task}")
    place = storage or f"sqlite:///{os.path.join(out.absolute(), 'study.db')}"
    note(f"study {what.study} in {shown(place)}")
    with progress_bars() as progress:
        found = run_sweep(what, out, storage=place, workers=workers, grace=grace, progress=progress)
    found.write(out)
    note(f"sweep.json and sweep.png are in {out}, networks in {out / what.study}")
    report(found.to_dict(), found.table(), as_json)


def _options(meta_lr: str | None, vary: list[str]) -> dict:
    """Values to try, by option."""
    options = {}
    for text in vary:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not values:
            raise typer.BadParameter(f"--vary {text!r}: give NAME=A,B,C or NAME=LOW:HIGH, such as unroll=10,20")
        if name in options or (name == "meta_lr" and meta_lr):
            raise typer.BadParameter(f"{name} was given twice")
        options[name] = _range(values) or [_value(part) for part in values.split(",")]
    if "meta_lr" in options or (vary and meta_lr is None):
        return options
    rates = meta_lr or RATES
    return {"meta_lr": _range(rates) or parse_rates(rates, "--meta-lr")} | options


def _range(text: str) -> Range | None:
    try:
        low, high = (json.loads(part) for part in text.split(":"))
        return Range(low, high)
    except ValueError:
        return None


def _value(text: str) -> object:
    """A number, true, false or null; any other word is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
