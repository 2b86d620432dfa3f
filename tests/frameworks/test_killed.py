"""Training runs that get a SIGKILL between two steps go on in a new process as if nothing had been."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = {
    "own loop": (),
    "Accelerate": ("accelerate",),
    "Trainer": ("transformers", "accelerate"),
    "Lightning": ("lightning",),
}
KILLED_AFTER, SAVED, STEPS = 5, 3, 9


@pytest.mark.parametrize("kind", NEEDS)
def test_a_run_that_is_killed_goes_on_to_the_last_bit(kind, tmp_path):
    if not all(importlib.util.find_spec(name) for name in NEEDS[kind]):
        pytest.skip("pip install l2l_fast[frameworks]")

    def start(name, losses, until=0):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        script = Path(__file__).with_name("killed.py")
        command = [sys.executable, str(script), kind, str(folder), str(tmp_path / losses), str(until)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    def losses_of(process, losses, status=0):
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == status, errors
        return (tmp_path / losses).read_text().split()

    unbroken, killed = start("unbroken", "unbroken.txt"), start("broken", "killed.txt", KILLED_AFTER)
    whole = losses_of(unbroken, "unbroken.txt")
    assert len(whole) == STEPS
    assert len(set(whole)) == STEPS
    assert losses_of(killed, "killed.txt", -signal.SIGKILL) == whole[:KILLED_AFTER]
    assert losses_of(start("broken", "resumed.txt"), "resumed.txt") == whole[SAVED:]
