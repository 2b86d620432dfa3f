"""The step of K networks in one call against that of one network over as many coordinates, and against K calls.

    python bench/perturbed_steps.py

Of one network the weights are packed once and nothing else differs: its time is that of the arithmetic. All take turns,
on one thread; of each the median of the rounds.
"""

from __future__ import annotations

import statistics
import time

import torch

from l2l_fast import CoordinatewiseLSTM, ops

NETWORKS, ROUNDS = 16, 25
SIZES = (256, 1510, 15_910)  # coordinates of a network: a small problem, a layer on digits, the paper's on MNIST
SHAPES = {"1 x 20": (20, 1), "2 x 20": (20, 2)}


def problem(network: CoordinatewiseLSTM, *shape: int, several: bool) -> tuple:
    """Arguments of a step, of fresh tensors."""
    theta = torch.zeros(shape)
    state = ops.new_state(theta, network.config, several=several)
    return [theta], [torch.randn(shape)], [state]


def main() -> None:
    torch.set_num_threads(1)
    lr, step = torch.tensor(1e-3), [torch.tensor(3.0)]
    heads = ("LSTM", "<8"), ("coordinates", ">12"), ("K in one call", ">16"), ("one, K times as many", ">22")
    print("".join(format(*head) for head in (*heads, ("K calls", ">12"), ("ratios", ">16"))))
    for name, (hidden, layers) in SHAPES.items():
        network = CoordinatewiseLSTM("both", hidden, layers)
        flat = network.flat_weights().detach()
        weights = flat + 0.01 * torch.randn(NETWORKS, len(flat))
        for size in SIZES:
            together = problem(network, NETWORKS, size, several=True)
            one = problem(network, NETWORKS * size, several=False)
            each = [problem(network, size, several=False) for _ in range(NETWORKS)]

            def k_calls(each=each, weights=weights, network=network):
                for arguments, row in zip(each, weights, strict=True):
                    ops.lstm_step_(*arguments, row, lr, step, network.config)

            ways = {
                "several": lambda: ops.lstm_step_(*together, weights, lr, step, network.config),  # noqa: B023
                "one": lambda: ops.lstm_step_(*one, flat, lr, step, network.config),  # noqa: B023
                "calls": k_calls,
            }
            seconds = {way: [] for way in ways}
            for number in range(ROUNDS + 3):
                for way, run in ways.items():
                    begun = time.perf_counter()
                    run()
                    if number >= 3:
                        seconds[way].append(time.perf_counter() - begun)
            found = {way: 1e3 * statistics.median(times) for way, times in seconds.items()}
            ratios = f"{found['several'] / found['one']:.2f} {found['several'] / found['calls']:.2f}"
            print(
                f"{name:<8}{size:>12,}{found['several']:>13.2f} ms{found['one']:>19.2f} ms{found['calls']:>9.2f} ms"
                f"{ratios:>16}"
            )


if __name__ == "__main__":
    main()
