"""A training run that is killed in its midst: ``python killed.py KIND FOLDER LOSSES STEPS_UNTIL_KILLED``.

Nine steps in epochs of three, saved after each epoch, every loss written to the file LOSSES at once. A run that finds
what was saved in FOLDER goes on from there. After the given number of steps (0: never) the process gets a SIGKILL: no
handler, no ``finally`` and no flush comes after that. tests/frameworks/test_killed.py runs it.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import l2l_fast as l2l

STEPS, EPOCH = 9, 3
warnings.simplefilter("ignore")


class Recorder:
    """Writes losses to the last bit, and ends the process where it is told to."""

    def __init__(self, path: Path, until: int) -> None:
        self.file, self.until, self.count = path.open("w"), until, 0

    def loss(self, loss: torch.Tensor) -> None:
        print(loss.item().hex(), file=self.file, flush=True)

    def stepped(self) -> None:
        """After a step: the kill comes between this one and the next."""
        self.count += 1
        if self.count == self.until:
            os.kill(os.getpid(), signal.SIGKILL)


def make_optimizer(params):
    return l2l.LSTMOptimizer(params, lr=3e-3, weight_decay=0.1)


def make_model(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(32), nn.Linear(32, 1))


def make_loader(shuffle: bool = False) -> DataLoader:
    x = torch.randn(8 * EPOCH, 10, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=8, shuffle=shuffle)


def own_loop(folder: Path, recorder: Recorder) -> None:
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    parts = {"model": model, "optimizer": optimizer, "schedule": CosineAnnealingLR(optimizer, STEPS)}
    path, first = folder / "run.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        first = saved["epoch"]
    for epoch in range(first, STEPS // EPOCH):
        for x, y in make_loader(shuffle=True):
            loss = F.mse_loss(model(x), y)
            recorder.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parts["schedule"].step()
            recorder.stepped()
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**saved, "random": torch.get_rng_state(), "epoch": epoch + 1}, folder / "next.pt")
        os.replace(folder / "next.pt", path)


def accelerate(folder: Path, recorder: Recorder) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    schedule = CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, make_loader(shuffle=True), schedule)
    found = sorted(folder.glob("epoch-*"))
    if found:
        accelerator.load_state(found[-1])
    for epoch in range(len(found), STEPS // EPOCH):
        for x, y in loader:
            loss = F.mse_loss(model(x), y)
            recorder.loss(loss)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            recorder.stepped()
        accelerator.save_state(folder / "next")
        os.rename(folder / "next", folder / f"epoch-{epoch}")


def trainer(folder: Path, recorder: Recorder) -> None:
    import transformers

    class Recording(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            recorder.loss(loss)
            return loss

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, arguments, state, control, **kwargs):
            if state.global_step and state.global_step != first:
                recorder.stepped()  # of the step before, which is saved by now

    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(64, (4 * EPOCH, 16), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=EPOCH, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], disable_tqdm=True, lr_scheduler_type="cosine", weight_decay=0.1, logging_strategy="no",
    )  # fmt: skip
    run = Recording(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(l2l.LSTMOptimizer, {"lr": 3e-3}), callbacks=[Steps()],
    )  # fmt: skip
    saved = transformers.trainer_utils.get_last_checkpoint(str(folder))
    first = int(saved.rpartition("-")[2]) if saved else 0
    run.train(resume_from_checkpoint=saved)


def lightning(folder: Path, recorder: Recorder) -> None:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = make_model(dropout=0.0)  # its checkpoints hold no random states

        def training_step(self, batch, _):
            x, y = batch
            loss = F.mse_loss(self.model(x), y)
            recorder.loss(loss)
            return loss

        def on_train_batch_end(self, *_):
            recorder.stepped()

        def configure_optimizers(self):
            optimizer = make_optimizer(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, STEPS // EPOCH)}

    saves = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    found = sorted(folder.glob("*.ckpt"))
    lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=STEPS // EPOCH, default_root_dir=folder, logger=False,
        callbacks=[saves], enable_progress_bar=False, enable_model_summary=False,
    ).fit(Module(), make_loader(), ckpt_path=found[-1] if found else None)  # fmt: skip


if __name__ == "__main__":
    kinds = {"own loop": own_loop, "Accelerate": accelerate, "Trainer": trainer, "Lightning": lightning}
    kind, folder, losses, until = sys.argv[1:]
    torch.set_num_threads(1)
    kinds[kind](Path(folder), Recorder(Path(losses), int(until)))
