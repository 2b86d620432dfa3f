"""How the extension is found, chosen and refused: each case in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

PRINT = "from l2l_fast import ops, _native; print(_native.build_info())"


def run(code, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("L2L_FAST_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=clean | environment
    )


def test_switched_off():
    result = run(PRINT, L2L_FAST_NATIVE="0")
    assert "'native': False" in result.stdout
    assert "switched off by L2L_FAST_NATIVE=0" in result.stdout


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_instruction_set_by_environment(name):
    from l2l_fast import _native

    result = run(PRINT, L2L_FAST_CPU_ISA=name)
    if name in _native.extension.cpu_isas():
        assert f"'cpu_isa': '{name}'" in result.stdout
    else:
        assert f"this machine cannot run the instruction set '{name}'" in result.stderr


def test_bfloat16_by_environment():
    from l2l_fast import _native

    result, here = run(PRINT, L2L_FAST_CPU_ISA="bf16"), _native.extension.cpu_bf16_isas()
    if here:
        assert f"'cpu_isa': '{here[0]}'" in result.stdout
    else:
        assert "this machine has no instructions for products in bfloat16" in result.stderr


def test_facts_of_the_cuda_build_agree():
    from l2l_fast import _native

    info = _native.build_info()
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
    assert (info["cuda_reason"] is None) == (info["cuda"] and torch.cuda.is_available())


def test_unknown_instruction_set():
    result = run(PRINT, L2L_FAST_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "unknown instruction set 'sse9'; this build has" in result.stderr


def test_a_build_that_cannot_be_loaded_warns_and_falls_back():
    # An entry of None in sys.modules makes the import fail as a missing shared library would.
    broken = """
import importlib.util, sys, torch, warnings
sys.modules["l2l_fast._C"] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: name == "l2l_fast._C" or find_spec(name, *rest)
warnings.simplefilter("always")
"""
    result = run(broken + PRINT)
    assert "'native': False" in result.stdout
    assert "built, but cannot be loaded" in result.stdout
    assert "runs on plain PyTorch, many times slower" in result.stderr
