"""Hugging Face's Trainer with LSTMOptimizer: a small language model from scratch, checkpoints and resume included.

    pip install l2l_fast[frameworks]
    python examples/hf_trainer.py [--steps 200] [--out runs/hf] [--resume]

Its data are sequences in which each token follows from the one before; nothing is downloaded.
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import l2l_fast as l2l


def sequences(count, length=32, tokens=64):
    """Rows in which a token is 5 times the one before, plus 1, modulo 64."""
    rows = [torch.randint(tokens, (count,), generator=torch.Generator().manual_seed(0))]
    for _ in range(length - 1):
        rows.append((5 * rows[-1] + 1) % tokens)
    return [{"input_ids": row, "labels": row} for row in torch.stack(rows, 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.003, help="in AdamW's units")
    parser.add_argument("--out", default="runs/hf")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = l2l.LSTMOptimizer(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 20, arguments.steps)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            arguments.out, max_steps=arguments.steps, save_steps=max(1, arguments.steps // 2), logging_steps=1,
            per_device_train_batch_size=16, report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        ),
        train_dataset=sequences(512),
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=arguments.resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {float(losses[0]):.3f} at the first step, {float(losses[-1]):.3f} at the last of {len(losses)}")


if __name__ == "__main__":
    main()
