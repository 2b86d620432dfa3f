"""Judges rules for any network on four tasks that neither their meta-training nor the report of workloads has.

    l2l-fast meta-train --recipe bench/general.json --network l2l-base --out runs/general
    python bench/general.py AdamW Muon "Muon, sized" l2l-base runs/general/network

A line for each optimizer: of every task, at two rates, the mean of the logarithm over two seeds of the mean, last and
validation loss; and the mean over all. Needs MNIST; a minute for each optimizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

import l2l_fast as l2l
from l2l_fast.reproduce import workloads
from l2l_fast.tasks import get
from l2l_fast.tasks.workloads import WORKLOADS

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
    if name in ("AdamW", "Muon", "Muon, sized"):
        return workloads.rivals()[name].make
    network = l2l.CoordinatewiseLSTM.from_pretrained(name)
    return lambda params, lr: l2l.LSTMOptimizer(params, network, lr, weight_decay=workloads.WEIGHT_DECAY)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to judge on, of the scripts that try forms of a rule."""
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workload", nargs="+", default=[], choices=WORKLOADS, help="in place of the four tasks")


def logarithms(make: Callable, rates=RATES, seeds=SEEDS, steps: int = 1000) -> Iterator[tuple[str, torch.Tensor]]:
    """Of each task its label and, [rates, 3], the mean logarithms of mean, last and validation loss.

    make: makes the optimizer from a list of parameters and a rate.
    """
    for label, (name, options) in TASKS.items():
        task = get(name, **options)
        runs = [[workloads.train(task, make, lr, seed, steps) for seed in seeds] for lr in rates]
        found = torch.tensor([[[run[metric] for metric in workloads.METRICS] for run in row] for row in runs])
        yield label, found.log().mean(1)


def judge(make: Callable, options: argparse.Namespace) -> None:
    """Print the logarithms of each task and their mean, or the losses on workloads, a line for each run."""
    torch.set_num_threads(1)
    for name in options.workload:
        for lr in options.rates:
            for seed in options.seeds:
                run = workloads.train(name, make, lr, seed, options.steps)
                print(name, lr, seed, *(f"{run[metric]:.4g}" for metric in workloads.METRICS), flush=True)
    if options.workload:
        return
    whole = torch.zeros(3)
    for label, logs in logarithms(make, options.rates, options.seeds, options.steps):
        whole += logs.mean(0) / len(TASKS)
        print(label, *("/".join(f"{value:.3f}" for value in row) for row in logs), flush=True)
    print("all", " / ".join(f"{value:.4f}" for value in whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="+", help="AdamW, Muon, 'Muon, sized', networks' names or folders")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.optimizers:
        cells, whole = [], torch.zeros(3)
        for label, logs in logarithms(maker(name), steps=arguments.steps):
            whole += logs.mean(0) / len(TASKS)
            cells.append(f"{label} " + " ".join("/".join(f"{value:.3f}" for value in row) for row in logs))
        print(f"{name}: {'; '.join(cells)}; all {' / '.join(f'{value:.4f}' for value in whole)}", flush=True)


if __name__ == "__main__":
    main()
