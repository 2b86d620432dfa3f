"""Long runs take no more memory than short ones: 100,000 steps and 2,000 meta-steps."""

import gc
import statistics

import heap
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2l_fast as l2l
from l2l_fast.tasks import captured

pytestmark = pytest.mark.slow
MEGABYTE = 2**20


class Watch:
    """Looks at the memory while something runs; :meth:`growth` is from the second tenth of the looks to the last."""

    def __init__(self):
        self.heap, self.resident = [], []

    def __call__(self, *_):
        gc.collect()
        self.heap.append(heap.in_use())
        self.resident.append(heap.resident())

    def growth(self):
        tenth = len(self.heap) // 10
        assert tenth >= 3
        return [
            statistics.median(values[-tenth:]) - statistics.median(values[tenth : 2 * tenth])
            for values in (self.heap, self.resident)
        ]


STEPS = 100_000
KINDS = {
    "default": {},
    "reference": {"fused": False},
    "checked, bfloat16 state": {"error_if_nonfinite": True, "state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_an_optimizer(kind):
    """A scheduler, a state_dict now and then, parameters that come and go without a gradient: what training does."""
    steps = STEPS if kind == "default" else STEPS // 10  # plain PyTorch takes many times as long
    model, watch = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), Watch()
    optimizer = l2l.LSTMOptimizer(model.parameters(), network="l2l-small", **KINDS[kind])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x = torch.randn(16, 4)
    y = x.sum(1, keepdim=True).sin()
    for step in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if step % 3 == 0:
            model[0].bias.grad = None
        optimizer.step()
        schedule.step()
        if step % (steps // 100) == 0:
            optimizer.load_state_dict(optimizer.state_dict())
            watch()
    native, resident = watch.growth()
    assert native / steps < 0.5, f"{native} bytes of the native heap in {steps} steps"
    assert resident < 8 * MEGABYTE


RUNS = {
    "plain": {},
    "whatever there is": {"imitation": 0.3, "scaling": 1.0, "average": 0.9, "meta_optimizer": "soap", "parallel": 2},
    "second derivatives": {"second_derivatives": True},
}


@pytest.mark.parametrize("run", RUNS)
def test_meta_steps(run, tmp_path, monkeypatch):
    """With checkpoints, validations and trajectories that end."""
    monkeypatch.setattr(captured, "AFTER", 5)  # what is captured is there before memory is looked at, once and for all
    meta_steps = 2_000 if run == "plain" else 1_000
    network, watch = l2l.CoordinatewiseLSTM("moments", 8, 1), Watch()
    trainer = l2l.MetaTrainer(
        network, ["quadratic", "digits-mlp"], unroll=5, horizon=20, validate_every=50, validation_instances=2,
        checkpoint=tmp_path, checkpoint_every=50, progress=False, **RUNS[run],
    )  # fmt: skip

    def look(step):
        if step % 20 == 0:
            watch()

    trainer.fit(meta_steps, on_step=look)
    native, resident = watch.growth()
    assert native / meta_steps < 100, f"{native} bytes of the native heap in {meta_steps} meta-steps"
    assert resident < 16 * MEGABYTE
