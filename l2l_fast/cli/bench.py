"""``l2l-fast bench``: the benchmark suite of a source checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import l2l_fast
from l2l_fast.cli.options import Device, Json, Out, note, out_folder, report


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small cases only, under a minute.")] = False,
    sizes: Annotated[str | None, typer.Option(help="Sizes of the step: 1k,16k,resnet,1M,10M.")] = None,
    select: Annotated[str | None, typer.Option(help="Only what this pytest -k expression selects.")] = None,
    device: Device = "cpu",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time the optimizer, its meta-gradient and its rivals on this machine.

    Needs a source checkout: the benches are no part of an installed package. Nothing is timed unless the kernels agree
    with the float64 reference. Writes summary.md, tables.md, steps.png and the results as JSON into --out.

    \b
    Examples:
        l2l-fast bench --quick
        l2l-fast bench --select "step and 1M" --out runs/step
    """
    folder = Path(l2l_fast.__file__).resolve().parents[1] / "bench"
    if not (folder / "report.py").exists():
        raise RuntimeError("the bench folder is not there: run this from a source checkout installed with pip -e")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ImportError("the benches need pytest-benchmark: pip install 'l2l_fast[test]'")
    out = out_folder(out, "bench").resolve()
    raw = out / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider", "-rs", "--benchmark-quiet"]
    command += [f"--benchmark-json={raw}", f"--device={device}", *(["--quick"] if quick else [])]
    command += [f"--sizes={sizes}"] if sizes else []
    command += ["-k", select] if select else []
    raw.unlink(missing_ok=True)
    # The checkout's own package, wherever pytest is started from; its progress goes to our stderr.
    path = os.pathsep.join([str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}
    code = subprocess.run(command, cwd=folder.parent, stdout=2, env=environment).returncode
    if code == 5:
        raise RuntimeError(f"no bench matches --select {select!r}; see the names with: pytest bench --collect-only -q")
    if code:
        raise RuntimeError("the benches failed, so nothing is reported; what failed is above")
    command = [sys.executable, str(folder / "report.py"), str(raw), "--out", str(out)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env=environment).stdout
    note(f"summary.md, tables.md, the results and steps.png (of two sizes or more) are in {out}")
    report(_rows(out), text.rstrip("\n"), as_json)


def _rows(out: Path) -> dict:
    """The newest result file, which report.py names by kernels and commit."""
    found = [path for path in out.glob("*.json") if path.name != "benchmark.json"]
    return json.loads(max(found, key=lambda path: path.stat().st_mtime_ns).read_text(encoding="utf-8"))
