"""A whole training step of the MNIST network, forward, backward and the optimizer's step, with each optimizer."""

import pytest
import torch
from torch import nn

import cases
import ours
import rivals

WAYS = (*ours.STEPS, "nn.LSTMCell", "nn.LSTM", *rivals.HAND_DESIGNED)


def _training_step(way: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10)).to(cases.device)
    images, labels = torch.rand(128, 784).to(cases.device), torch.randint(10, (128,)).to(cases.device)
    params = list(model.parameters())
    if way in ours.STEPS:
        optimizer = ours.optimizer(way, params)
    elif way in rivals.LEARNED:
        optimizer = rivals.LEARNED[way](cases.network(), params)
    else:
        optimizer = rivals.hand_designed(way, params)

    def step() -> None:
        for param in params:
            param.grad = None
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step, cases.count(params)


@pytest.mark.parametrize("way", WAYS)
def test_training_step(way, race):
    step, coordinates = _training_step(way)
    beside = None if way == "ours" else _training_step("ours")[0]
    race(
        "training step, MNIST network", step, kind="training-step", case="MNIST network", way=way, beside=beside,
        coordinates=coordinates,
    )  # fmt: skip
