import os
from pathlib import Path

import pytest
import torch

import l2l_fast
from l2l_fast import CoordinatewiseLSTM

# Processes that tests start have the package that the tests have, wherever they run.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(l2l_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def network():
    """A small network of the paper's form."""
    return CoordinatewiseLSTM(hidden_size=4, num_layers=2)


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN, so that an output nobody wrote is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


def pytest_collection_modifyitems(items):
    """Tests marked cuda or mnist are skipped, with the reason, where there is no device or no data."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("mnist") and not os.environ.get("L2L_FAST_DATA"):
            item.add_marker(pytest.mark.skip(reason="no MNIST: L2L_FAST_DATA is not set"))
