"""Peak extra memory of one meta-gradient: suffix sums and the tiled backward, beside autograd through nn.LSTMCell.

    python bench/memory.py [--coordinates 1000000] [--unroll 20]

Each measurement is a process of its own: the growth of its peak resident memory from just before the meta-gradient
(with parameters and optimizer state in place) to its end. Autograd at full size does not fit into most machines, so it
is measured at an eighth and at a sixteenth of it; both are printed per coordinate, and the larger is scaled up.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import l2l_fast as l2l
import rivals
from l2l_fast.meta.estimators import TruncatedBackpropagation
from l2l_fast.meta.unroll import Rule, Trajectory


class Bowl:
    """f(x) = mean((x - 1)^2): a task that takes no memory to speak of."""

    name, resample = "bowl", False

    def __init__(self, size: int) -> None:
        self.size = size

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.randn(self.size, generator=generator)}

    def sample(self, generator: torch.Generator) -> Tensor:
        return torch.ones(())

    def loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (params["x"] - batch).square().mean()


def autograd(trajectory: Trajectory, move: rivals.Cells, state: list, length: int) -> None:
    """The meta-gradient as public implementations form it: a graph through every step, gradients detached."""
    theta, grad, total = trajectory.theta, trajectory.grad, 0.0
    for _ in range(length):
        updates, state = move(grad.view(-1), state)
        theta = theta + updates
        loss = trajectory.instances.losses(trajectory.instances.unflatten(theta), trajectory.instances.draw())
        (grad,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
        grad, total = grad.detach(), total + loss.sum()
    total.backward()


def forget_peak() -> None:
    """Give freed memory back and let the high-water mark be what is resident now (Linux; elsewhere it stays)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """High-water mark of resident memory; ru_maxrss would count what the parent had when it started this process."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(way: str, coordinates: int, length: int) -> int:
    """Extra bytes, in a process of its own."""
    command = [sys.executable, __file__, "--child", way, "--coordinates", str(coordinates), "--unroll", str(length)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_gpu(way: str, coordinates: int, length: int) -> int:
    """Extra bytes of the GPU's memory."""
    run = prepared(way, coordinates, length, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def child(way: str, coordinates: int, length: int) -> int:
    run = prepared(way, coordinates, length, "cpu")
    forget_peak()
    before = peak()
    run()
    return peak() - before


def prepared(way: str, coordinates: int, length: int, device: str):
    """One meta-gradient as a call, everything that it starts from in place."""
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM().to(device)
    rule = Rule.of(network)
    small = Trajectory(l2l.tasks.Instances(Bowl(64), [0], device), rule.config)
    estimator = TruncatedBackpropagation(rule)
    estimator.prepare(small, 2)()  # what loads on first use does not count
    trajectory = Trajectory(l2l.tasks.Instances(Bowl(coordinates), [0], device), rule.config)
    if way != "autograd":
        return lambda: estimator.prepare(trajectory, length)()
    cells = rivals.Cells(network)
    state = cells.new_state(coordinates)
    return lambda: autograd(trajectory, cells, state, length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinates", type=int, default=1_000_000)
    parser.add_argument("--unroll", type=int, default=20)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(child(arguments.child, arguments.coordinates, arguments.unroll))
        return
    rows = [("suffix sums", "suffix", arguments.coordinates)]
    rows += [("autograd", "autograd", arguments.coordinates // part) for part in (16, 8)]
    print(f"peak extra memory of a meta-gradient, paper network, unroll {arguments.unroll}")
    print(f"{'way':<14}{'coordinates':>13}{'MiB':>10}{'bytes a coordinate':>21}")
    found = {}
    for label, way, size in rows:
        extra = measure(way, size, arguments.unroll)
        found[way] = extra / size
        print(f"{label:<14}{size:>13,}{extra / 2**20:>10.0f}{extra / size:>21.0f}")
    whole = found["autograd"] * arguments.coordinates / 2**30
    print(f"autograd at {arguments.coordinates:,} coordinates would take {whole:.1f} GiB")
    print(f"ratio, suffix sums to autograd: {found['suffix'] / found['autograd']:.3f}")


if __name__ == "__main__":
    main()
