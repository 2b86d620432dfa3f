"""The CUDA kernels on a GPU, or on the CPU where L2L_FAST_EMULATED names a library of them built with emulator.h.

test_emulated.py builds that library and runs these tests in it; without a GPU and without it they are skipped.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

import l2l_fast  # noqa: F401  # defines the ops that the library implements

HERE = Path(__file__).parent

# Without it cuBLAS refuses to run under use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

EMULATED = os.environ.get("L2L_FAST_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)


def pytest_collection_modifyitems(items):
    built = torch._C._dispatch_has_kernel_for_dispatch_key("l2l_fast::lstm_step_", "CUDA")
    for item in items:  # those of the whole session, other folders' too
        if HERE in item.path.parents and item.get_closest_marker("cuda") and torch.cuda.is_available() and not built:
            item.add_marker(pytest.mark.skip(reason="no compiled CUDA kernels"))


# What a GPU says when memory was touched that is not a kernel's, or a kernel broke: nothing works in the process then.
STICKY = ("illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A process that such a fault has spoilt ends, having said which test it was; xdist goes on with a fresh one."""
    report = yield
    if report.failed and any(text in str(report.longrepr) for text in STICKY):
        print(f"\n{item.nodeid} has left the GPU unusable:\n{report.longrepr}", file=sys.stderr, flush=True)
        os._exit(70)
    return report


@pytest.fixture
def device() -> str:
    return "cpu" if EMULATED else "cuda"


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    """Every test here."""
