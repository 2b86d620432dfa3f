"""``l2l-fast bench``: one tiny bench from end to end, and how it fails."""

import importlib.util
import json
import os

import pytest

import l2l_fast


def test_help_has_examples(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    assert "Examples:" in out
    assert "--quick" in out
    assert "--json" in out


@pytest.fixture(autouse=True)
def _by_itself(monkeypatch):
    """Nothing is timed where several tests run at once, and the benches know it by xdist's variables."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


def test_a_tiny_selection(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # which is not that of the files between the processes
    selection = "test_step and 1k and (ours or SGD) and not bf16 and not moments and not fused and not foreach"
    code, out, err = run(
        "bench", "--quick", "--sizes", "1k", "--select", selection, "--out", tmp_path / "found", "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert {"cpu", "kernels", "torch", "threads", "commit", "command"} <= set(result["environment"])
    ways = {row["way"]: row for row in result["rows"]}
    assert ways["ours"]["coordinates"] == 1000
    assert ways["ours"]["bytes"] == 652
    assert ways["ours"]["share_of_ceiling"] > 0
    assert ways["SGD loop"]["times_ours"] > 0
    assert (tmp_path / "found" / "summary.md").exists()


def test_a_selection_of_nothing(run):
    code, out, err = run("bench", "--quick", "--select", "no_such_bench")
    assert code == 1
    assert out == ""
    assert "no bench matches" in err.splitlines()[-1]


def test_an_installed_package_has_no_benches(run, monkeypatch, tmp_path):
    monkeypatch.setattr(l2l_fast, "__file__", str(tmp_path / "l2l_fast" / "__init__.py"))
    code, out, err = run("bench", "--quick")
    assert (code, out) == (1, "")
    assert "source checkout" in err
    assert len(err.splitlines()) == 1


def test_without_pytest_benchmark(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run("bench", "--quick")
    assert (code, out) == (1, "")
    assert "l2l_fast[test]" in err
    assert len(err.splitlines()) == 1
