"""A LightningModule whose configure_optimizers returns LSTMOptimizer with a schedule.

    pip install l2l_fast[frameworks]
    python examples/lightning_module.py [--epochs 5] [--lr 0.003]

A regression of the sine of a sum; a checkpoint holds the optimizer's state, and ckpt_path= goes on from it.
"""

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import l2l_fast as l2l


class Regression(lightning.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 1))
        self.losses = []

    def training_step(self, batch, _):
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        optimizer = l2l.LSTMOptimizer(self.parameters(), lr=self.lr, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.003, help="in AdamW's units")
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    inputs = torch.randn(2048, 4)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True).sin())
    module = Regression(arguments.lr)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
    print(f"loss {module.losses[0]:.3f} at the first step, {module.losses[-1]:.3f} at the last of {len(module.losses)}")


if __name__ == "__main__":
    main()
