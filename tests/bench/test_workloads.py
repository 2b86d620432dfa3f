"""bench/workloads.py: every workload is trained by every optimizer, from the same start on the same batches."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import workloads

WORKLOADS = {workload.name: workload for workload in workloads.workloads()}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_run_learns_and_repeats(name):
    make = workloads.OPTIMIZERS["l2l-base"]
    first, again, other = (workloads.run(WORKLOADS[name], make, 1e-2, seed, 25) for seed in (0, 0, 1))
    for key in ("mean", "last", "validation"):
        assert math.isfinite(first[key])
        assert first[key] == again[key] != other[key]
    assert first["last"] < first["mean"]


def test_every_optimizer_starts_from_the_same_point():
    workload, losses = WORKLOADS["ReLU MLP, digits"], []
    makers = [*workloads.OPTIMIZERS.values()]
    for make in makers:
        losses.append(workloads.run(workload, make, 1e-12, 0, 1)["mean"])
    assert len(set(losses)) == 1


def test_validation_is_of_rows_that_are_not_trained_on():
    for workload in list(WORKLOADS.values())[1:]:
        assert not set(workload.rows.tolist()) & set(workload.validation().tolist())
    text = WORKLOADS["transformer LM, text"]
    assert len(text.train) + len(text.held_out) == 300_000
    assert text.validation().shape[1] == text.sample(torch.Generator()).shape[1] == text.length + 1
