"""Options that several commands share, and how they print."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from l2l_fast.checks import usable_device
from l2l_fast.meta.curricula import Horizon, parse_horizon
from l2l_fast.writing import json_text


def _device(name: str) -> str:
    try:
        usable_device(name)
    except ValueError as error:
        raise typer.BadParameter(f"{error}; try cpu") from None
    return name


def _data(folder: Path | None) -> Path | None:
    if folder is not None:
        os.environ["L2L_FAST_DATA"] = str(folder)
    return folder


Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...", callback=_device)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=9999)]
Out = Annotated[
    Path | None, typer.Option(help="Folder for what is written.", file_okay=False, show_default="runs/COMMAND")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder of data sets, such as mnist/.", exists=True, file_okay=False, callback=_data),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
HORIZONS = "Steps a trajectory: 100, or LOW:HIGH for log-uniform, or A,B,C for stages."


def out_folder(out: Path | None, name: str) -> Path:
    """The folder that a command writes into, ``runs/NAME`` unless it was given.

    Made, and written to, before the work begins: what cannot be kept should not be computed.
    """
    out = out or Path("runs") / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise typer.BadParameter(f"--out {str(out)!r} cannot be written ({error.strerror}): give another") from None
    return out


def curriculum(text: str | None) -> Horizon | None:
    """The curriculum of ``--horizon``."""
    try:
        return None if text is None else parse_horizon(text)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None


def parse_rates(text: str, option: str) -> list[float]:
    """Learning rates separated by commas, no two of them written alike."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates) or len({f"{rate:g}" for rate in rates}) < len(rates):
        raise typer.BadParameter(f"{option} {text!r}: give different positive numbers with commas, such as 0.1,0.01")
    return rates


def report(result: dict, text: str, as_json: bool) -> None:
    """The result on stdout, for a program or for a person."""
    print(json_text(result) if as_json else text)


def note(text: str) -> None:
    """A line on stderr, beside the progress bars."""
    print(text, file=sys.stderr)


@contextmanager
def progress_bars():
    """Progress bars, one for each description: yields ``update(description, done, total)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress, bars = Progress(*columns, console=Console(stderr=True)), {}

    def update(description: str, done: int, total: int) -> None:
        progress.start()  # only now: what is refused shows no bar
        if description not in bars:
            bars[description] = progress.add_task(description, total=total)
        progress.update(bars[description], completed=done, total=total)

    try:
        yield update
    finally:
        if bars:
            progress.stop()
