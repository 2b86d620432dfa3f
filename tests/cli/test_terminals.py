"""Where a command's words go: terminals of every encoding, pipes that close, disks that are full; and Ctrl-C."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from l2l_fast.cli import main

COMMAND = [sys.executable, "-c", "from l2l_fast.cli import main; main()"]
QUICK = ["--meta-steps", "2", "--horizon", "5"]
WORKS = {
    "compare": ["compare", "quadratic", "--horizon", "5", "--seeds", "2", "--baselines", "adam"],
    "compare as JSON": ["compare", "quadratic", "--horizon", "5", "--seeds", "2", "--baselines", "adam", "--json"],
    "meta-train": ["meta-train", "quadratic", *QUICK, "--instances", "2"],
    "sweep": ["sweep", "quadratic", "--meta-lr", "0.01", *QUICK, "--seeds", "2"],
    "tasks": ["tasks"],
    "info": ["info"],
    "no command": [],
} | {f"help of {name}": [name, "--help"] for name in ("demo", "meta-train", "compare", "sweep", "reproduce", "bench")}


@pytest.fixture
def run_in(monkeypatch):
    """Runs a command with a stdout of some encoding: exit code and what it printed."""

    def run_in(encoding, *arguments):
        contents = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(contents, encoding=encoding))
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code or 0, contents.getvalue().decode(encoding)

    return run_in


@pytest.mark.parametrize("work", WORKS)
def test_an_ascii_terminal_is_enough(run_in, work, capfd):
    if work == "sweep":
        pytest.importorskip("optuna", reason="sweeps need Optuna")
    code, out = run_in("ascii", *WORKS[work])
    assert code == (2 if work == "no command" else 0), capfd.readouterr().err
    assert out or work == "no command"
    if work == "compare":
        assert "+- std" in out
        assert " +- " in out.split("mean loss ")[-1]


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "±"), ("latin-1", "±"), ("koi8-r", "+-"), ("ascii", "+-")])
def test_a_terminal_gets_what_its_encoding_has(run_in, encoding, sign):
    assert f" {sign} " in run_in(encoding, *WORKS["compare"])[1]


def test_a_folder_whose_name_is_no_text_is_printed(run_in, tmp_path):
    folder = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    code, out = run_in("utf-8", *WORKS["meta-train"], "--out", folder)
    assert code == 0
    assert r"caf\udce9" in out


def test_the_program_itself_in_ascii(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, *WORKS["compare"], "--out", tmp_path], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"+- std" in done.stdout
    assert done.stdout.isascii()


def test_a_pipe_that_nobody_reads_is_no_failure_to_tell():
    process = subprocess.Popen([*COMMAND, "tasks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, b"")
    process.stderr.close()


def test_results_that_cannot_be_written_are_a_failure():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "tasks"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "l2l-fast: [Errno 28] No space left on device\n"


def test_a_closed_stdout_is_none():
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "tasks"], stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("ignored", [True, False])
def test_ctrl_c_stops_a_run_unless_it_is_ignored(tmp_path, ignored):
    """A shell starts jobs in the background with SIGINT ignored, and they go on."""
    arguments = ["meta-train", "quadratic", "--meta-steps", 500, "--horizon", 10, "--unroll", 5, "--instances", 2]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--json", "--out", tmp_path], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else
                                                                 signal.default_int_handler),
    )  # fmt: skip
    while not (tmp_path / "checkpoint" / "trainer.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    if ignored:
        assert process.returncode == 0, err
        assert json.loads(out)["meta_steps"] == 500
    else:
        assert (process.returncode, out) == (130, ""), err
        assert "saved to" in err.splitlines()[-1]
