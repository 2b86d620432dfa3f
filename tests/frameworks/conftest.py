"""Every flow here is held to the same for LSTMOptimizer and for AdamW: what AdamW keeps to the last bit, it keeps."""

import functools
import os

import pytest
import torch

import l2l_fast as l2l

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):  # nothing here needs a hub
    os.environ[name] = "1"

OPTIMIZERS = {
    "l2l-base": functools.partial(l2l.LSTMOptimizer, lr=3e-3, weight_decay=0.1),
    "l2l-base-v1": functools.partial(l2l.LSTMOptimizer, network="l2l-base-v1", lr=0.1, weight_decay=0.1),
    "l2l-small, bfloat16 state": functools.partial(
        l2l.LSTMOptimizer, network="l2l-small", lr=0.1, weight_decay=0.1, state_dtype=torch.bfloat16
    ),
    "AdamW": functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "frameworks":
            # Frameworks warn of their own versions and of small machines; the package's warnings have their own tests.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    """Makes an optimizer of parameters or param groups."""
    return OPTIMIZERS[request.param]
