"""A whole meta-update: a window of 20 steps, its meta-gradient and the meta-optimizer's step. A coordinate is a
coordinate-step."""

import pytest
import torch

import cases
import rivals
from l2l_fast import MetaTrainer
from l2l_fast.data import Dataset
from l2l_fast.tasks import Classifier, Quadratic


def _mnist_shaped() -> Classifier:
    """The mnist-mlp task on noise: the same work, and no files."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2048, 28, 28, generator=generator)
    return Classifier(Dataset("noise", images, torch.randint(10, (2048,), generator=generator), 10))


CASES = {"quadratic": (Quadratic, 128, 10), "mnist-mlp": (_mnist_shaped, 1, 15_910)}


@pytest.mark.parametrize("way", ["ours", "autograd, nn.LSTMCell"])
@pytest.mark.parametrize("case", CASES)
def test_meta_update(case, way, race):
    make, instances, size = CASES[case]
    task = make()
    trainer = MetaTrainer(
        cases.network(), task, unroll=cases.UNROLL, horizon=100, instances=instances, progress=False,
        device=cases.device,
    )  # fmt: skip
    ours = trainer._step  # fit() also validates at its end, which is no part of a meta-update
    call = ours if way == "ours" else rivals.MetaUpdate(cases.network(), task, instances, cases.UNROLL).step
    race(
        f"meta-update, {case}", call, kind="meta-update", case=case, way=way, beside=None if way == "ours" else ours,
        coordinates=cases.UNROLL * instances * size, unroll=cases.UNROLL, instances=instances,
    )  # fmt: skip
