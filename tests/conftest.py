import os

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def network():
    """A small network of the paper's form."""
    return CoordinatewiseLSTM(hidden_size=4, num_layers=2)


def pytest_collection_modifyitems(items):
    """Tests marked cuda or mnist are skipped, with the reason, where there is no device or no data."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("mnist") and not os.environ.get("L2L_FAST_DATA"):
            item.add_marker(pytest.mark.skip(reason="no MNIST: L2L_FAST_DATA is not set"))
