"""Nothing compiled for an instruction set beyond the baseline may be the copy that the linker keeps for everybody."""

import shutil
import subprocess
from pathlib import Path

import pytest
from compiled import COMPILER, compiled

UNITS = sorted((Path(__file__).parents[2] / "csrc" / "cpu").glob("isa_*.cpp"))


@pytest.mark.skipif(COMPILER is None or not shutil.which("nm"), reason="no C++ compiler or no nm")
def test_no_unit_exports_a_weak_symbol():
    units = compiled("units.o", UNITS, "-std=c++17", "-O1", "-fPIC", "-w", link=["-r"])
    symbols = subprocess.run(["nm", "-C", units], capture_output=True, text=True, check=True).stdout
    weak = [line for line in symbols.splitlines() if any(f" {kind} " in line for kind in "WVu")]
    assert [line for line in weak if not line.endswith("DW.ref.__gxx_personality_v0")] == []  # a pointer, no code
