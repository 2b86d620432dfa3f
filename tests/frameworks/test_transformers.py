"""Hugging Face Trainer: a small causal language model, stopped and resumed to the last bit. Nothing is downloaded."""

import pytest
import torch
from same import same
from torch.optim.lr_scheduler import LambdaLR

transformers = pytest.importorskip("transformers", reason="pip install l2l_fast[frameworks]")
pytest.importorskip("accelerate", reason="its Trainer needs it: pip install l2l_fast[frameworks]")

STEPS = 6


class Recording(transformers.Trainer):
    """The log has losses in fewer digits."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.detach().clone()]
        return loss


def make_trainer(make_optimizer, folder, precision):
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
    )  # fmt: skip
    optimizer = make_optimizer(model.parameters())
    schedule = LambdaLR(optimizer, cosine)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Recording(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule))


def cosine(step):
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resume_from_checkpoint_goes_on_to_the_last_bit(make_optimizer, precision, tmp_path):
    trainer = make_trainer(make_optimizer, tmp_path, precision)
    trainer.train()
    assert len(trainer.losses) == 2 * STEPS
    again = make_trainer(make_optimizer, tmp_path, precision)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(again.losses, trainer.losses[STEPS:])
    assert same(again.model.state_dict(), trainer.model.state_dict())
    assert same(again.optimizer.state_dict(), trainer.optimizer.state_dict())
    assert again.state.global_step == STEPS
    weight = again.model.transformer.wte.weight
    assert weight is again.model.lm_head.weight
