"""Lightning's Trainer and Fabric: saved, made anew and gone on with to the last bit."""

import pytest
import torch
from same import same
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="pip install l2l_fast[frameworks]")

PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]
BATCHES = 6


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 1))


def loader():
    x = torch.randn(8 * BATCHES, 10, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8)


class Module(lightning.LightningModule):
    def __init__(self, make_optimizer):
        super().__init__()
        self.model, self.make_optimizer, self.losses = make_model(), make_optimizer, []

    def training_step(self, batch, _):
        x, y = batch
        loss = F.mse_loss(self.model(x).float(), y.float())
        self.losses.append(loss.detach().clone())
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.model.parameters())
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 2)}


def make_trainer(epochs, precision, folder):
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, precision=precision, accumulate_grad_batches=2, gradient_clip_val=1.0,
        default_root_dir=folder, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_trainers_checkpoint_goes_on_to_the_last_bit(make_optimizer, precision, tmp_path):
    whole, half, rest = (Module(make_optimizer) for _ in range(3))
    unbroken = make_trainer(2, precision, tmp_path)
    unbroken.fit(whole, loader())
    first = make_trainer(1, precision, tmp_path)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = make_trainer(2, precision, tmp_path)
    second.fit(rest, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(whole.losses) == 2 * BATCHES
    assert same(half.losses + rest.losses, whole.losses)
    assert same(rest.state_dict(), whole.state_dict())
    assert same(second.optimizers[0].state_dict(), unbroken.optimizers[0].state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fabrics_checkpoint_goes_on_to_the_last_bit(make_optimizer, precision, tmp_path):
    def start():
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        fabric.launch()
        plain = make_model()
        model, optimizer = fabric.setup(plain, make_optimizer(plain.parameters()))
        schedule = CosineAnnealingLR(optimizer, 2 * BATCHES)
        return fabric, {"model": model, "optimizer": optimizer, "schedule": schedule}

    def epoch(fabric, model, optimizer, schedule):
        losses = []
        for x, y in loader():
            loss = F.mse_loss(model(x).float(), y.float())
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
        return losses

    fabric, run = start()
    epoch(fabric, **run)
    fabric.save(tmp_path / "half.ckpt", run)
    losses = epoch(fabric, **run)
    fabric, again = start()
    fabric.load(tmp_path / "half.ckpt", again)
    assert same(epoch(fabric, **again), losses)
    for name in run:
        assert same(again[name].state_dict(), run[name].state_dict())
