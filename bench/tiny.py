"""Models of small tensors, where a step is Python, the dispatcher and little arithmetic: step() beside torch's AdamW.

    python bench/tiny.py [--threads 1]

Medians of one process, the optimizers in turn, so that a machine's other work falls on all alike.
"""

import argparse
import statistics
import time

import torch

import l2l_fast as l2l

RIVAL = "AdamW(foreach=True)"
RULES = {
    RIVAL: lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "l2l-base": lambda params: l2l.LSTMOptimizer(params, lr=1e-3, weight_decay=0.01),
    "l2l-base-v1": lambda params: l2l.LSTMOptimizer(params, "l2l-base-v1", weight_decay=0.01),
}


def few() -> list[int]:
    """Four small tensors: what is left is the call itself."""
    return [16, 4, 8, 2]


def many(count: int = 10_000) -> list[int]:
    """Tensors of 1 to 16 coordinates, as of norms and biases."""
    return torch.randint(1, 17, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def medians(sizes: list[int], rounds: int, rules=tuple(RULES)) -> dict[str, float]:
    """Seconds of a step by optimizer."""
    generator = torch.Generator().manual_seed(1)
    steps, times = {}, {name: [] for name in rules}
    for name in rules:
        params = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        steps[name] = RULES[name](params).step
        for _ in range(2):  # makes the state
            steps[name]()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    for label, sizes, rounds in (("4 small tensors", few(), 2000), ("10,000 tensors of 1 to 16", many(), 15)):
        found = medians(sizes, rounds)
        for name, seconds in found.items():
            print(f"{label:<26} {name:<20} {seconds * 1e6:10.1f} us   {seconds / found[RIVAL]:.2f} of {RIVAL}")


if __name__ == "__main__":
    main()
