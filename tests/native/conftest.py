"""Parity of the compiled kernels with the float64 reference; skipped where there are no compiled kernels."""

import pytest
import torch

from l2l_fast import _native, ops, reference
from l2l_fast.reference import Config

PAPER = Config("log_sign", 20, 2, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8)
RNNPROP = Config("moments", 20, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8)


def pytest_collection_modifyitems(items):
    if _native.extension is None:
        for item in items:
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
def poisoned_memory():
    """Uninitialised memory is NaN, so that an output nobody wrote is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def make_weights(config: Config, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = config.hidden_size**-0.5
    return torch.empty(reference.num_weights(config), dtype=dtype).uniform_(-size, size, generator=generator)


def make_grads(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gradients of every magnitude from 1e-8 to 1e2, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.pow(10.0, torch.empty(shape, dtype=torch.float64).uniform_(-8, 2, generator=generator))
    sign = torch.randint(-1, 2, shape, generator=generator)
    return (magnitude * sign).to(dtype)


def make_state(count: int, config: Config, seed: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A state [count, S] such as a run might have reached, laid out as new_state does."""
    generator = torch.Generator().manual_seed(seed)
    state = ops.new_state(torch.empty(count), config, dtype)
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9, generator=generator))
    if reference.has_moments(config):
        state[:, 1].abs_()
    return state
