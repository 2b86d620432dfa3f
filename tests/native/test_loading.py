"""How the extension is found, chosen and refused: each case in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PRINT = "from l2l_fast import ops, _native; print(_native.build_info())"
WARN = "import warnings; warnings.simplefilter('always'); "  # print warnings: run() makes them errors


def run(code, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("L2L_FAST_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=clean | environment
    )


@pytest.mark.parametrize("switch", ["0", "false", "No", "off"])
def test_switched_off(switch):
    result = run(PRINT, L2L_FAST_NATIVE=switch)
    assert "'native': False" in result.stdout
    assert f"switched off by L2L_FAST_NATIVE={switch}" in result.stdout


def test_an_empty_variable_is_as_good_as_none():
    from l2l_fast import _native

    result = run(PRINT, L2L_FAST_NATIVE="", L2L_FAST_CPU_ISA="")
    assert f"'cpu_isa': '{_native.extension.cpu_isas()[0]}'" in result.stdout


def assert_another_runs(result, name):
    """With one line that says so."""
    from l2l_fast import _native

    best = _native.extension.cpu_isas()[0]
    assert f"'cpu_isa': '{best}'" in result.stdout
    assert f"L2L_FAST_CPU_ISA={name} does not run here, so {best} does; this machine can run {best}" in result.stderr


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_instruction_set_by_environment(name):
    from l2l_fast import _native

    result = run(WARN + PRINT, L2L_FAST_CPU_ISA=name)
    if name in _native.extension.cpu_isas():
        assert f"'cpu_isa': '{name}'" in result.stdout
        assert not result.stderr
    else:
        assert_another_runs(result, name)


def test_bfloat16_by_environment():
    from l2l_fast import _native

    result, here = run(WARN + PRINT, L2L_FAST_CPU_ISA="bf16"), _native.extension.cpu_bf16_isas()
    if here:
        assert f"'cpu_isa': '{here[0]}'" in result.stdout
    else:
        assert_another_runs(result, "bf16")


def test_facts_of_the_cuda_build_agree():
    from l2l_fast import _native

    info = _native.build_info()
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
    assert (info["cuda_reason"] is None) == (info["cuda"] and torch.cuda.is_available())


def test_unknown_instruction_set():
    assert_another_runs(run(WARN + PRINT, L2L_FAST_CPU_ISA="sse9"), "sse9")


def test_a_package_without_kernels_warns_and_falls_back():
    hidden = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "l2l_fast._C" else find_spec(name, *rest)
"""
    result = run(hidden + WARN + PRINT)
    assert "'native': False" in result.stdout
    assert "runs on plain PyTorch, many times slower. Its kernels are not built: install with a" in result.stderr
    assert not run(hidden + WARN + PRINT, L2L_FAST_NATIVE="0").stderr


def test_a_build_that_cannot_be_loaded_warns_and_falls_back():
    # An entry of None in sys.modules makes the import fail as a missing shared library would.
    broken = """
import importlib.util, sys, torch
sys.modules["l2l_fast._C"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name == "l2l_fast._C" or find_spec(name, *rest)
"""
    result = run(broken + WARN + PRINT)
    assert "'native': False" in result.stdout
    assert "built, but cannot be loaded" in result.stdout
    assert "runs on plain PyTorch, many times slower" in result.stderr


@pytest.mark.parametrize("by", ["path", "finder"])
def test_a_checkout_without_kernels_names_the_package_that_has_them_and_takes_none_of_them(tmp_path, by):
    """As where Python is started in a checkout that was never built, and a wheel is installed, or another checkout."""
    from l2l_fast import _native

    module = Path(_native.extension.__file__)
    checkout = tmp_path / "l2l_fast"
    shutil.copytree(module.parent, checkout, ignore=shutil.ignore_patterns("_C*", "weights", "__pycache__"))
    code = f"""
import importlib.util, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "l2l_fast._C":
            return importlib.util.spec_from_file_location(name, {str(module)!r})

sys.meta_path = [BuiltinImporter, FrozenImporter, PathFinder]
sys.path.insert(0, {str(module.parents[1])!r}) if {by!r} == "path" else sys.meta_path.append(Finder)
sys.path.insert(0, {str(tmp_path)!r})
"""
    result = run(code + WARN + PRINT)
    assert "'native': False" in result.stdout
    said = (
        f"not built in {checkout}, which Python finds before the installed package in {module.parent}, which has them"
    )
    assert f"Its kernels are {said}: start Python in another folder" in result.stderr


def test_kernels_that_take_other_arguments_are_not_run(tmp_path):
    """As where a checkout was updated and not built again: they are there, and would read a number as a string."""
    from l2l_fast import _native

    package = Path(_native.extension.__file__).parent
    shutil.copytree(package, tmp_path / "l2l_fast", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "l2l_fast" / "ops.py"
    path.write_text(path.read_text() + "\nVERSION = -1\n")
    step = """
import torch, l2l_fast
theta = torch.nn.Parameter(torch.ones(3))
theta.grad = torch.ones(3)
l2l_fast.LSTMOptimizer([theta]).step()
config = l2l_fast.CoordinatewiseLSTM("both", 4, 1)(torch.ones(2, 3))
print(theta.tolist())
"""
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); " + WARN
    result = run(code + PRINT + step)
    assert result.returncode == 0, result.stderr
    assert "'native': False" in result.stdout
    assert "Its kernels are of other sources" in result.stderr
    assert "build them again" in result.stderr
    expected = run(WARN + step, L2L_FAST_NATIVE="0")
    assert result.stdout.splitlines()[-1] == expected.stdout.splitlines()[-1]
