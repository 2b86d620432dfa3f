"""The CUDA kernels without a GPU: compiled as C++ over emulator.h, and run by the CPU thread by thread."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compiled import COMPILER, compiled
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
PARITY = [HERE / "test_parity.py", HERE / "test_matrix.py", HERE / "test_scaled.py"]
HOPPER = {"test_parity": ["1"], "test_matrix": ["1", "0"], "test_scaled": ["0"]}  # with its copy engine, or without
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif("L2L_FAST_EMULATED" in os.environ, reason="already in the emulator"),
]


def build(name: str, sources: list[Path], *flags: str, link: list[str]) -> Path:
    emulator = f'-DL2L_CUDA_EMULATOR="{HERE}/emulator.h"'
    common = ["-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", emulator]
    return compiled(name, sources, *common, *flags, link=link)


@pytest.mark.parametrize(("tests", "boxes"), [(path, boxes) for path in PARITY for boxes in HOPPER[path.stem]])
def test_parity_in_the_emulator(tests, boxes):
    """Everything that a GPU is held to, at sizes that the emulator can bear."""
    torch_headers = [f"-isystem{path}" for path in include_paths()]
    folders = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    library = build(
        "emulated.so", [CUDA / "ops.cpp", *sorted(CUDA.glob("*.cu"))], "-O1", *torch_headers,
        link=["-shared", *folders, "-ltorch_cpu", "-lc10"],
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"L2L_FAST_NATIVE": "0", "L2L_FAST_EMULATED": str(library), "L2L_EMULATED_BOXES": boxes},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-4000:]
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.slow
def test_kernels_without_torch_under_the_sanitizers():
    """Buffers of the exact size, so that no thread may read or write past one."""
    test = build(
        "emulated_test", [HERE / "emulated_test.cpp", *sorted(CUDA.glob("*.cu"))],
        "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", link=[],
    )  # fmt: skip
    run = subprocess.run([test], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all good" in run.stdout


def test_table():
    """The pointer table's index arithmetic, on the host."""
    test = build(
        "table_test", [HERE / "table_test.cpp"],
        "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", link=[],
    )  # fmt: skip
    run = subprocess.run([test], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all good" in run.stdout
