"""The CUDA sources compile for every architecture, and their kernels take what csrc/cuda/resources.txt says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc" / "cuda"))

import check
import toolkit

FOLDER = Path(check.__file__).parent
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3l2l4stepIfLi4EEEvPf' for 'sm_90'
ptxas info    : Function properties for _ZN3l2l4stepIfLi4EEEvPf
    96 bytes stack frame, 216 bytes spill stores, 264 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 96 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compiling entry function '_ZN3l2l4plainEPf' for 'sm_90'
ptxas info    : Function properties for _ZN3l2l4plainEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
"""


@pytest.mark.slow
@pytest.mark.skipif(toolkit.find() is None, reason="no CUDA toolkit: nvcc is neither in CUDA_HOME nor on PATH")
def test_resources():
    done = subprocess.run([sys.executable, FOLDER / "check.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.skipif(toolkit.find() is None, reason="no CUDA toolkit: nvcc is neither in CUDA_HOME nor on PATH")
def test_the_bench_of_the_kernels_compiles(tmp_path):
    """It has the launchers' structs written out, and no other test meets it."""
    source = FOLDER.parents[1] / "bench" / "kernels.cu"
    command = [toolkit.find().nvcc, "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_90", "-c", source]
    done = subprocess.run([*command, "-o", tmp_path / "kernels.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_assemblers_report_is_read():
    found = check.read(REPORT)
    assert found == {
        "_ZN3l2l4stepIfLi4EEEvPf": check.Use(168, 2048, 96, 216, 264),
        "_ZN3l2l4plainEPf": check.Use(10, 0, 0, 0, 0),
    }


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void l2l::(anonymous namespace)::step<(int)4, float>(l2l::Table, int)", "step<4, float>"),
        ("void l2l::_GLOBAL__N__1a2b_4_x_cu_3c::step<l2l::Table<l2l::Entry, 7> >(int)", "step<Table<Entry, 7>>"),
        ("l2l::fill(float*)", "fill"),
    ],
)
def test_names_are_short(name, short):
    assert check.shorten(name) == short


def test_table_round_trip():
    found = {
        ("a.cu: step<4, float>", "sm_80"): check.Use(40, 0, 0, 0, 0),
        ("a.cu: step<4, float>", "sm_100"): check.Use(41, 16, 8, 4, 4),
        ("b.cu: fill", "sm_100"): check.Use(9, 0, 0, 0, 0),
    }
    assert check.read_table(check.write_table(found, "13.0")) == ("13.0", found)


def test_problems():
    good, spilled = check.Use(40, 0, 0, 0, 0), check.Use(168, 0, 8, 4, 4)
    kernels = ("matrix_step.cu: step<5, float>", "matrix_step.cu: step<8, float>", "step.cu: step<float>")
    (said,) = check.problems({(kernel, "sm_90"): spilled for kernel in kernels}, None)
    assert said == "matrix_step.cu: step<5, float> on sm_90: 8 bytes of stack, 4 spilled, 4 read back"
    found = {("a.cu: new", "sm_90"): good, ("a.cu: other", "sm_90"): good}
    held = {("a.cu: old", "sm_90"): good, ("a.cu: other", "sm_90"): spilled, ("a.cu: new", "sm_80"): good}
    assert check.problems(found, held) == [
        "a.cu: old on sm_90: 40 0 0 0 0 in the table, now gone",
        "a.cu: other on sm_90: 168 0 8 4 4 in the table, now 40 0 0 0 0",
        "a.cu: new on sm_90: not in the table, now 40 0 0 0 0",
    ]


# ---------------------------------------------------------------- what setup.py decides


NVCC = r"""#!/bin/sh
case $1 in
  -dryrun) printf '#$ _SPACE_=\n#$ TOP=%s/bin/..\n' "{home}" >&2 ;;
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) printf 'compute_75\ncompute_80\ncompute_90\n' ;;
esac
"""


@pytest.fixture
def make_toolkit(tmp_path, monkeypatch):
    """A toolkit behind a wrapper on PATH."""

    def make(version="13.0"):
        home, wrappers = tmp_path / "toolkit", tmp_path / "wrappers"
        for folder in (home / "bin", wrappers):
            folder.mkdir(parents=True)
            (folder / "nvcc").write_text(NVCC.format(home=home, version=version))
            (folder / "nvcc").chmod(0o755)
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(wrappers), prepend=os.pathsep)
        return home

    return make


def test_the_toolkit_behind_a_wrapper(make_toolkit):
    home = make_toolkit("12.4")
    found = toolkit.find()
    assert found.home == home
    assert found.version == "12.4"
    assert found.archs == ["7.5", "8.0", "9.0"]
    assert toolkit.default_archs(found) == "8.0;9.0+PTX"


def test_cuda_home_comes_first(make_toolkit, tmp_path, monkeypatch):
    home = make_toolkit()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert toolkit.find().home == home


def test_architectures():
    assert toolkit.gencode("8.0;9.0+PTX") == [
        ("compute_80", "sm_80"),
        ("compute_90", "sm_90"),
        ("compute_90", "compute_90"),
    ]
    assert toolkit.gencode("9.0a 10.0") == [("compute_90a", "sm_90a"), ("compute_100", "sm_100")]
    with pytest.raises(ValueError, match="'Hopper': give numbers, such as"):
        toolkit.gencode("Hopper")


@pytest.fixture
def decide(monkeypatch):
    """``decide(torch_cuda, found, **environment)``: setup.py's choice, nothing built."""
    import runpy

    import setuptools
    import torch
    from torch.utils import cpp_extension

    def run(torch_cuda, found, **environment):
        for name in ("FORCE_CUDA", "FORCE_ONLY_CPU", "L2L_FAST_REQUIRE_EXT", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        built = {}
        monkeypatch.setattr(setuptools, "setup", lambda **options: built.update(options))
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(toolkit, "find", lambda: found)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        runpy.run_path(str(FOLDER.parents[1] / "setup.py"))
        return built["ext_modules"][0]

    return run


def _cxx(module) -> str:
    return " ".join(module.extra_compile_args["cxx"])


def test_cuda_is_built_where_torch_and_a_toolkit_have_it(make_toolkit, decide):
    make_toolkit()
    found = toolkit.find()
    module = decide("13.2", found)
    assert "csrc/cuda/stream.cpp" in module.sources
    assert "-gencode=arch=compute_90,code=sm_90" in module.extra_compile_args["nvcc"]
    assert 'L2L_CUDA_ARCHS="sm_80 sm_90 compute_90"' in _cxx(module)
    assert not {"torch_cuda", "cudart", "c10_cuda"} & set(module.libraries)
    module = decide("13.2", found, TORCH_CUDA_ARCH_LIST="9.0")
    assert 'L2L_CUDA_ARCHS="sm_90"' in _cxx(module)


def test_torch_without_cuda(make_toolkit, decide):
    make_toolkit()
    found = toolkit.find()
    module = decide(None, found)
    assert not [source for source in module.sources if "cuda" in source]
    assert "has no CUDA" in _cxx(module)
    assert "csrc/cuda/stream.cpp" in decide(None, found, FORCE_CUDA="1").sources


def test_cpu_alone_by_request(make_toolkit, decide):
    make_toolkit()
    found = toolkit.find()
    assert "FORCE_ONLY_CPU=1" in _cxx(decide("13.0", found, FORCE_ONLY_CPU="1"))
    with pytest.raises(SystemExit, match="contradict"):
        decide("13.0", found, FORCE_ONLY_CPU="1", FORCE_CUDA="1")


def test_no_toolkit(decide):
    with pytest.warns(UserWarning, match="no CUDA kernels: built without a CUDA toolkit"):
        module = decide("13.0", None)
    assert "nvcc was neither" in _cxx(module)
    with pytest.raises(SystemExit, match="nvcc was neither"):
        decide("13.0", None, FORCE_CUDA="1")


def test_another_major(make_toolkit, decide):
    make_toolkit("12.4")
    found = toolkit.find()
    with pytest.warns(UserWarning, match=r"torch is built for CUDA 13.0 and the toolkit is CUDA 12.4"):
        decide("13.0", found)
    for name in ("L2L_FAST_REQUIRE_EXT", "FORCE_CUDA"):
        with pytest.raises(SystemExit, match="the majors must agree"):
            decide("13.0", found, **{name: "1"})
