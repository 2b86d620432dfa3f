"""Parity of the compiled kernels with the float64 reference; skipped where there are no compiled kernels."""

from pathlib import Path

import pytest
import torch

from l2l_fast import _native

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if _native.extension is None:
        for item in items:  # those of the whole session, other folders' too
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"no compiled kernels: {_native.build_info()['reason']}"))


def isas() -> list[str]:
    return _native.extension.cpu_isas() if _native.extension else ["none"]


@pytest.fixture(params=isas())
def isa(request):
    """Every instruction set that this machine can run."""
    before = _native.extension.cpu_isa()
    _native.extension.use_cpu_isa(request.param)
    yield request.param
    _native.extension.use_cpu_isa(before)


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    """Every test here."""


@pytest.fixture(autouse=True)
def _two_threads():
    """Kernels share their tiles among threads, however few the environment allows to tests that run beside others."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
