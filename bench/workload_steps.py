"""What a step with its gradient costs on the two transformers of the workloads, one thread.

    python bench/workload_steps.py

Optimizers take turns; of each the median of the processor's time over the rounds.
"""

from __future__ import annotations

import statistics
import time

import torch

from l2l_fast.reproduce.workloads import rivals
from l2l_fast.tasks import get

STEPS, ROUNDS = 10, 5
OPTIMIZERS = ("AdamW", "Muon", "learned", "learned, coordinatewise")


def milliseconds(task, make) -> float:
    """Of one step, after four that warm up."""
    generator = torch.Generator().manual_seed(0)
    model = task.module(generator)
    optimizer = make(list(model.parameters()), 1e-3)
    for step in range(4 + STEPS):
        if step == 4:
            begun = time.process_time()
        inputs, *targets = (tensor[rows] for rows in [task.sample(generator)] for tensor in task.data)
        optimizer.zero_grad()
        task.loss_fn(model(inputs), *targets).backward()
        optimizer.step()
    return (time.process_time() - begun) / STEPS * 1e3


def main() -> None:
    torch.set_num_threads(1)
    for name in ("transformer-lm", "vision-transformer"):
        task, found = get(name), {}
        for _ in range(ROUNDS):
            for optimizer in OPTIMIZERS:
                found.setdefault(optimizer, []).append(milliseconds(task, rivals()[optimizer].make))
        base = statistics.median(found["AdamW"])
        for optimizer, times in found.items():
            print(f"{name:<20}{optimizer:<26}{statistics.median(times):6.1f} ms  {statistics.median(times) / base:.2f}")


if __name__ == "__main__":
    main()
