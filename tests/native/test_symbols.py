"""Nothing compiled for an instruction set beyond the baseline may be the copy that the linker keeps for everybody."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "csrc" / "cpu").glob("isa_*.cpp"))
COMPILER = os.environ.get("CXX", "c++")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER) or not shutil.which("nm"), reason="no C++ compiler or no nm")
def test_no_unit_exports_a_weak_symbol(tmp_path):
    objects = [tmp_path / f"{unit.stem}.o" for unit in UNITS]
    for unit, to in zip(UNITS, objects, strict=True):
        subprocess.run([COMPILER, "-std=c++17", "-O1", "-fPIC", "-w", "-c", unit, "-o", to], check=True)
    symbols = subprocess.run(["nm", "-C", *objects], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if any(f" {kind} " in line for kind in "WVu")]
    assert [line for line in weak if not line.endswith("DW.ref.__gxx_personality_v0")] == []  # a pointer, no code
