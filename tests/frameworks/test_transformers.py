"""Hugging Face Trainer: a small causal language model, stopped and resumed to the last bit. Nothing is downloaded."""

import pytest
import torch
from same import same
from torch.optim.lr_scheduler import LambdaLR

import l2l_fast as l2l

transformers = pytest.importorskip("transformers", reason="pip install l2l_fast[frameworks]")
pytest.importorskip("accelerate", reason="its Trainer needs it: pip install l2l_fast[frameworks]")

STEPS = 6


class Recording(transformers.Trainer):
    """The log has losses in fewer digits."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.detach().clone()]
        return loss


def make_trainer(folder, precision="float32", make_optimizer=None, **options):
    """Dropout as GPT-2 has it, tied embeddings, two batches a step."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, save_steps=3, per_device_train_batch_size=4, logging_steps=1,
        gradient_accumulation_steps=2, use_cpu=True, bf16=precision == "bf16", report_to=[], disable_tqdm=True,
        lr_scheduler_type="cosine", weight_decay=0.1,
    )  # fmt: skip
    if make_optimizer:
        optimizer = make_optimizer(model.parameters())
        options["optimizers"] = optimizer, LambdaLR(optimizer, cosine)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Recording(model=model, args=arguments, train_dataset=rows, **options)


def cosine(step):
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item())


def check_resume(make, folder):
    trainer = make()
    trainer.train()
    assert len(trainer.losses) == 2 * STEPS
    again = make()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert same(again.losses, trainer.losses[STEPS:])
    assert same(again.model.state_dict(), trainer.model.state_dict())
    assert same(again.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert again.state.global_step == STEPS
    assert again.model.transformer.wte.weight is again.model.lm_head.weight
    return again


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resume_from_checkpoint_goes_on_to_the_last_bit(make_optimizer, precision, tmp_path):
    check_resume(lambda: make_trainer(tmp_path, precision, make_optimizer), tmp_path)


def test_the_trainer_makes_the_optimizer_itself(tmp_path):
    """With groups of its own: biases and norms without weight decay."""
    kind = l2l.LSTMOptimizer, {"lr": 3e-3}
    again = check_resume(lambda: make_trainer(tmp_path, optimizer_cls_and_kwargs=kind), tmp_path)
    groups = again.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(param.ndim > 1 for param in groups[0]["params"])
    assert {group["initial_lr"] for group in groups} == {3e-3}
