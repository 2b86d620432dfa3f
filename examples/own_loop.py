"""A training loop of your own, with l2l-base in AdamW's place: the same schedule and weight decay, beside AdamW.

    python examples/own_loop.py [--steps 300] [--lr 0.03] [--adamw-lr 0.03]

A classifier of the 8x8 digits (pip install l2l_fast[data]); the last 297 of 1,797 images are not trained on.
"""

import argparse

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import l2l_fast as l2l


def train(make_optimizer, images, labels, steps):
    """The trained model, and the mean of the last ten losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = make_optimizer(model.parameters())
    warmup = max(1, steps // 20)
    schedule = SequentialLR(
        optimizer,
        [LinearLR(optimizer, 0.1, total_iters=warmup), CosineAnnealingLR(optimizer, max(1, steps - warmup))],
        milestones=[warmup],
    )
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return model, torch.stack(losses[-10:]).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.03, help="of l2l-base, in AdamW's units")
    parser.add_argument("--adamw-lr", type=float, default=0.03, help="the best of 0.003, 0.01 and 0.03 for AdamW")
    arguments = parser.parse_args()
    data = l2l.data.digits()
    optimizers = {
        "l2l-base": lambda params: l2l.LSTMOptimizer(params, lr=arguments.lr, weight_decay=0.01),
        "AdamW": lambda params: torch.optim.AdamW(params, lr=arguments.adamw_lr, weight_decay=0.01),
    }
    for name, make_optimizer in optimizers.items():
        model, loss = train(make_optimizer, data.inputs[:1500], data.targets[:1500], arguments.steps)
        right = (model(data.inputs[1500:]).argmax(1) == data.targets[1500:]).float().mean()
        print(f"{name:<10} last ten losses {loss:.4f}, accuracy on images not trained on {100 * right:.1f}%")


if __name__ == "__main__":
    main()
