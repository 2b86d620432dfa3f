"""The kernels without torch, under the sanitizers; also the error bounds of exp2, log, sigmoid and tanh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "csrc" / "sanitize.sh"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [pytest.param([], marks=pytest.mark.slow), ["-g0"]], ids=["sanitized", "plain"])
def test_kernels_without_torch(flags):
    run = subprocess.run([SCRIPT, *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all good" in run.stdout
