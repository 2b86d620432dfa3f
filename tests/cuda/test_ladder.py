"""Every rung of bench/ladder computes the optimizer's step: in the emulator, against its own CPU version."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import COMPILER, compiled

HERE = Path(__file__).parent
LADDER = HERE.parents[1] / "bench" / "ladder"
RUNGS = sorted(LADDER.glob("*.cu"))
pytestmark = pytest.mark.skipif("L2L_FAST_EMULATED" in os.environ, reason="a process of its own")


def test_there_are_rungs():
    assert len(RUNGS) == 5


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("rung", RUNGS, ids=lambda path: path.stem)
def test_a_rung_agrees_with_the_cpu(rung):
    emulator = f'-DL2L_CUDA_EMULATOR="{HERE}/emulator.h"'
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", emulator]
    run = subprocess.run([compiled(rung.stem, [rung], *flags, link=[])], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "agrees with the CPU" in run.stdout
    assert "WRONG" not in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_every_rung_compiles_and_spills_nothing(tmp_path):
    command = ["make", "-C", str(LADDER), f"OUT={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    spills = [line.split(",")[1:] for line in done.stdout.splitlines() if "spill stores" in line]
    assert len(spills) == 2 * (len(RUNGS) + 1)  # of two architectures; one rung has two kernels
    assert all(spill == [" 0 bytes spill stores", " 0 bytes spill loads"] for spill in spills)
