"""Hugging Face Accelerate: prepare, accumulate, save_state, and a restart that goes on to the last bit."""

import pytest
import torch
from same import same
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason="pip install l2l_fast[frameworks]")

STEPS_AN_EPOCH = 6


class Run:
    """All objects of a training, made anew as a new process would; dropout and shuffling draw random numbers."""

    def __init__(self, make_optimizer, precision):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for kept in (AcceleratorState, GradientState, PartialState):  # a process has one of each
            kept._reset_state()
        accelerate.utils.set_seed(0)
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=2, mixed_precision=precision, step_scheduler_with_optimizer=False
        )
        model = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1))
        optimizer = make_optimizer(model.parameters())
        schedule = CosineAnnealingLR(optimizer, STEPS_AN_EPOCH)
        x = torch.randn(8 * STEPS_AN_EPOCH, 10)
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8, shuffle=True)
        self.parts = self.accelerator.prepare(model, optimizer, loader, schedule)

    def epoch(self):
        model, optimizer, loader, schedule = self.parts
        losses = []
        for x, y in loader:
            with self.accelerator.accumulate(model):
                loss = F.mse_loss(model(x).float(), y)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                if self.accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_restart_goes_on_to_the_last_bit(make_optimizer, precision, tmp_path):
    run = Run(make_optimizer, precision)
    run.epoch()
    run.accelerator.save_state(tmp_path / "saved")
    losses = run.epoch()
    state = run.parts[1].state_dict()
    again = Run(make_optimizer, precision)
    again.accelerator.load_state(tmp_path / "saved")
    assert same(again.epoch(), losses)
    assert same(list(again.parts[0].parameters()), list(run.parts[0].parameters()))
    assert same(again.parts[1].state_dict(), state)
    # Two batches a step, and two epochs.
    assert {float(entry["step"]) for entry in state["state"].values()} == {STEPS_AN_EPOCH}
