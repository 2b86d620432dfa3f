"""Judges rules for any network on four tasks that neither their meta-training nor the report of workloads has.

    l2l-fast meta-train --recipe bench/general.json --network l2l-base --out runs/general
    python bench/general.py AdamW Muon l2l-base runs/general/network

A line for each optimizer: of every task, at two rates, the mean of the logarithm over two seeds of the mean, last and
validation loss; and the mean over all. Needs MNIST; a minute for each optimizer.
"""

from __future__ import annotations

import argparse

import torch

import l2l_fast as l2l
from l2l_fast.reproduce import workloads
from l2l_fast.tasks import get

RATES, SEEDS = (6e-3, 2e-2), (55, 56)
TASKS = {
    "images": ("mnist-small-mlp", {"pool": 2, "hidden": (48, 32), "activation": "gelu", "batch_size": 48}),
    "regression": ("small-regression", {"inputs": 9, "outputs": 2, "hidden": (48, 48), "batch_size": 48,
                                        "noise": 0.15, "rows": 8000, "seed": 77}),
    "text": ("small-text-mlp", {"length": 5, "width": 12, "hidden": (40, 40), "activation": "silu", "batch_size": 48}),
    "transformer": ("small-transformer", {"width": 20, "length": 20, "heads": 2, "batch_size": 12}),
}  # fmt: skip


def maker(name: str):
    """Parameters and a rate -> optimizer, of a rival's name or a network's."""
    if name in ("AdamW", "Muon"):
        return workloads.rivals()[name].make
    network = l2l.CoordinatewiseLSTM.from_pretrained(name)
    return lambda params, lr: l2l.LSTMOptimizer(params, network, lr, weight_decay=workloads.WEIGHT_DECAY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="+", help="AdamW, Muon, networks' names or folders")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {label: get(name, **options) for label, (name, options) in TASKS.items()}
    for name in arguments.optimizers:
        make, cells, whole = maker(name), [], torch.zeros(3)
        for label, task in tasks.items():
            runs = [[workloads.train(task, make, lr, seed, arguments.steps) for seed in SEEDS] for lr in RATES]
            found = torch.tensor([[[run[metric] for metric in workloads.METRICS] for run in row] for row in runs])
            logs = found.log().mean(1)
            whole += logs.mean(0) / len(tasks)
            cells.append(f"{label} " + " ".join("/".join(f"{value:.3f}" for value in row) for row in logs))
        print(f"{name}: {'; '.join(cells)}; all {' / '.join(f'{value:.4f}' for value in whole)}", flush=True)


if __name__ == "__main__":
    main()
