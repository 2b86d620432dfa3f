"""A whole meta-update: a window of 20 steps, its meta-gradient and the meta-optimizer's step. A coordinate is a
coordinate-step."""

import os

import pytest
import torch

import cases
import rivals
from l2l_fast import MetaTrainer, tasks
from l2l_fast.data import Dataset
from l2l_fast.tasks import Classifier, Quadratic


def _mnist() -> Classifier:
    """The mnist-mlp task; without its files on noise, which is more work, since no pixel stays black."""
    if "L2L_FAST_DATA" in os.environ:
        return tasks.get("mnist-mlp")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2048, 28, 28, generator=generator)
    return Classifier(Dataset("noise", images, torch.randint(10, (2048,), generator=generator), 10))


CASES = {"quadratic": (Quadratic, 128, 10), "mnist-mlp": (_mnist, 1, 15_910)}

# Small, so that no way leads its optimizees to where gradients vanish and there is less to compute.
UPDATES = {"output_scale": 1e-3}


@pytest.mark.parametrize("way", ["ours", "autograd, nn.LSTMCell"])
@pytest.mark.parametrize("case", CASES)
def test_meta_update(case, way, race):
    make, instances, size = CASES[case]
    task = make()
    trainer = MetaTrainer(
        cases.network(**UPDATES), task, unroll=cases.UNROLL, horizon=100, instances=instances, progress=False,
        device=cases.device,
    )  # fmt: skip
    ours = trainer.step  # fit() also validates at its end, which is no part of a meta-update
    call = ours if way == "ours" else rivals.MetaUpdate(cases.network(**UPDATES), task, instances, cases.UNROLL).step
    race(
        f"meta-update, {case}", call, kind="meta-update", case=case, way=way, data=task.name,
        beside=None if way == "ours" else ours, coordinates=cases.UNROLL * instances * size, unroll=cases.UNROLL,
        instances=instances,
    )  # fmt: skip
