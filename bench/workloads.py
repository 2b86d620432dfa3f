"""The default network in AdamW's place: the same rates, the same schedule, four small workloads that it never met.

    python bench/workloads.py --out docs/results/workloads.json

Every optimizer has warm-up over 5% of the steps and a cosine to 0, weight decay 0.01 and the same five rates, tried on
seed 0; the one with the lowest mean training loss is shown on the other seeds. Starts and batches are the same for all.
``l2l-base-v1`` has no rate: it takes its own steps, lr 1 all along. A row more has the default network at the rate that
was AdamW's best: nothing about it is tuned. No data are downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l2l_fast as l2l

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
DECAY = {"weight_decay": 0.01}
OPTIMIZERS = {
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr, **DECAY),
    "l2l-base": lambda params, lr: l2l.LSTMOptimizer(params, "l2l-base", lr, **DECAY),
    "l2l-base, orthogonalize": lambda params, lr: l2l.LSTMOptimizer(
        params, "l2l-base", lr, **DECAY, orthogonalize=True
    ),
}
SWAP = "l2l-base at AdamW's rate"
UNTUNED = "l2l-base-v1, lr 1"
NAMES = (*OPTIMIZERS, SWAP, UNTUNED)


class Transformer(nn.Module):
    """One block over characters; ids [B, L] to logits [B, L, characters]."""

    def __init__(self, characters: int, width: int = 48, length: int = 48) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(characters, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(self.embedding(ids) + self.place, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


class Text:
    """A language model of characters, on what Python's own manual says (``pydoc_data``); its last tenth validates."""

    name, length, batch = "transformer LM, text", 48, 16

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))[:300_000]
        alphabet = sorted(set(text))
        ids = torch.tensor([alphabet.index(character) for character in text])
        self.train, self.held_out, self.characters = ids[:270_000], ids[270_000:], len(alphabet)

    def model(self) -> nn.Module:
        return Transformer(self.characters, length=self.length)

    def _windows(self, ids: Tensor, starts: Tensor) -> Tensor:
        return ids[starts[:, None] + torch.arange(self.length + 1)]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def sample(self, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.train) - self.length, (self.batch,), generator=generator)
        return self._windows(self.train, starts)

    def validation(self) -> Tensor:
        return self._windows(self.held_out, torch.arange(0, len(self.held_out) - self.length - 1, 97))


class Rows:
    """Minibatches of rows of a table, the last fifth of which validates."""

    def __init__(self, name: str, inputs: Tensor, targets: Tensor, model, loss_fn, batch: int = 64) -> None:
        self.name, self.model, self.loss_fn, self.batch = name, model, loss_fn, batch
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        cut = len(inputs) * 4 // 5
        self.rows, self.table, self.held_out = order[:cut], (inputs, targets), order[cut:]

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        inputs, targets = (column[rows] for column in self.table)
        return self.loss_fn(model(inputs), targets)

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.rows[torch.randint(len(self.rows), (self.batch,), generator=generator)]

    def validation(self) -> Tensor:
        return self.held_out


def workloads() -> list:
    from sklearn.datasets import load_digits

    images = load_digits()
    pixels = torch.tensor(images.data, dtype=torch.float32).div(16)
    labels = torch.tensor(images.target)

    def mlp():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def cnn():
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(96, 10),
        )  # fmt: skip

    def regressor():
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    # Friedman's function of five of ten inputs, in its own standard deviations, with noise.
    x = torch.rand(2500, 10, generator=torch.Generator().manual_seed(0))
    y = 10 * (math.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5).square() + 10 * x[:, 3] + 5 * x[:, 4]
    y = y + torch.randn(len(y), generator=torch.Generator().manual_seed(1))
    y = ((y - y.mean()) / y.std())[:, None]
    return [
        Text(),
        Rows("ReLU MLP, digits", pixels, labels, mlp, F.cross_entropy),
        Rows("CNN with BatchNorm, digits", pixels, labels, cnn, F.cross_entropy),
        Rows("ReLU MLP, tabular regression", x, y, regressor, F.mse_loss),
    ]


def run(workload, make, lr: float | None, seed: int, steps: int) -> dict[str, float]:
    """Mean training loss over all steps, over the last twentieth, and the validation loss."""
    torch.manual_seed(seed)
    model, generator = workload.model(), torch.Generator().manual_seed(1000 + seed)
    optimizer = make(model.parameters()) if lr is None else make(model.parameters(), lr)
    losses, begun = [], time.perf_counter()
    warm = max(1, steps // 20)
    for step in range(steps):
        if lr is not None:
            share = (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))
            for group in optimizer.param_groups:
                group["lr"] = lr * share
        loss = workload.loss(model, workload.sample(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - begun
    losses = torch.stack(losses)
    model.eval()
    with torch.no_grad():
        held_out = workload.loss(model, workload.validation()).item()
    last = max(1, steps // 20)
    return {"mean": losses.mean().item(), "last": losses[-last:].mean().item(), "validation": held_out,
            "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3, help="shown; seed 0 chooses the rates and is not among them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for workload in workloads():
        rows = found[workload.name] = {}
        for name in NAMES:
            make, tuning = OPTIMIZERS.get(name, OPTIMIZERS["l2l-base"]), {}
            best = rows["AdamW"]["lr"] if name == SWAP else None
            if name == UNTUNED:
                make = lambda params: l2l.LSTMOptimizer(params, "l2l-base-v1")  # noqa: E731
            if name in OPTIMIZERS:
                tuning = {lr: run(workload, make, lr, 0, options.steps)["mean"] for lr in RATES}
                best = min(tuning, key=lambda lr: tuning[lr] if math.isfinite(tuning[lr]) else math.inf)
            shown = [run(workload, make, best, seed, options.steps) for seed in range(1, options.seeds + 1)]
            rows[name] = {"lr": best, "tuning": tuning, "seeds": shown}
            columns = {key: [one[key] for one in shown] for key in shown[0]}
            texts = [
                f"{key} {sum(values) / len(values):.4f} ({min(values):.4f}..{max(values):.4f})"
                for key, values in columns.items()
            ]
            print(f"{workload.name:<30} {name:<26} lr {best}  {'  '.join(texts)}", flush=True)
    for key in ("mean", "last", "validation"):
        for name in NAMES:
            ratios = [
                math.log(sum(one[key] for one in rows[name]["seeds"]) / sum(one[key] for one in rows["AdamW"]["seeds"]))
                for rows in found.values()
            ]
            print(f"{key:<10} {name:<26} over AdamW's, geometric mean {math.exp(sum(ratios) / len(ratios)):.3f}")
    if options.out:
        facts = {"torch": torch.__version__, "native": l2l.build_info()["native"], "steps": options.steps}
        options.out.write_text(json.dumps({**facts, "workloads": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
