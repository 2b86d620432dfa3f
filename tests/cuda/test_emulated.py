"""The CUDA kernels without a GPU: compiled as C++ over emulator.h, and run by the CPU thread by thread."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "csrc" / "cuda"
PARITY = [HERE / "test_parity.py", HERE / "test_matrix.py"]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif("L2L_FAST_EMULATED" in os.environ, reason="already in the emulator"),
]


def build(out: Path, sources: list[Path], *flags: str, link: list[str]) -> Path:
    """Compile the sources side by side, and link them."""
    emulator = f'-DL2L_CUDA_EMULATOR="{HERE}/emulator.h"'
    common = ["-std=c++17", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", emulator]
    jobs = {}
    for source in sources:
        target = out.with_name(f"{source.name}.o")
        command = [COMPILER, *common, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        jobs[target] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    failures = [job.communicate()[1] for job in jobs.values()]
    assert not any(job.returncode for job in jobs.values()), "\n".join(failures)
    subprocess.run([COMPILER, *flags, *map(str, jobs), "-o", str(out), *link], check=True)
    return out


def test_parity_in_the_emulator(tmp_path):
    """Everything that a GPU is held to, at sizes that the emulator can bear."""
    torch_headers = [f"-isystem{path}" for path in include_paths()]
    folders = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    library = build(
        tmp_path / "emulated.so", [CUDA / "ops.cpp", *sorted(CUDA.glob("*.cu"))], "-O1", *torch_headers,
        link=["-shared", *folders, "-ltorch_cpu", "-lc10"],
    )  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, PARITY)],
        env=os.environ | {"L2L_FAST_NATIVE": "0", "L2L_FAST_EMULATED": str(library)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-4000:]
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout


def test_kernels_without_torch_under_the_sanitizers(tmp_path):
    """Buffers of the exact size, so that no thread may read or write past one."""
    test = build(
        tmp_path / "test", [HERE / "emulated_test.cpp", *sorted(CUDA.glob("*.cu"))],
        "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", link=[],
    )  # fmt: skip
    run = subprocess.run([test], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all good" in run.stdout


def test_table(tmp_path):
    """The pointer table's index arithmetic, on the host."""
    test = build(
        tmp_path / "test", [HERE / "table_test.cpp"],
        "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", link=[],
    )  # fmt: skip
    run = subprocess.run([test], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "all good" in run.stdout
