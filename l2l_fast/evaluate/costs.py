"""What a learned optimizer costs a coordinate: memory, arithmetic, time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch

from l2l_fast.config import state_size, weight_shapes
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.optim import LSTMOptimizer

COORDINATES, ROUNDS = 2**18, 9


@dataclass(frozen=True)
class Cost:
    """Of one step, for each coordinate.

    Attributes:
        bytes: of state, float32.
        multiply_adds: in the weight matrices.
        nanoseconds: of wall-clock time, with as many threads as torch has.
    """

    bytes: int
    multiply_adds: int
    nanoseconds: float


def measure_cost(network: CoordinatewiseLSTM, device: torch.device | str = "cpu") -> Cost:
    """Counted, but for the time, which is the median of nine steps of 262,144 coordinates.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.evaluate.costs import measure_cost
        >>> cost = measure_cost(l2l.CoordinatewiseLSTM("moments", hidden_size=4, num_layers=1))
        >>> cost.bytes, cost.multiply_adds, cost.nanoseconds > 0
        (40, 100, True)
    """
    shapes = weight_shapes(network.config).values()
    param = torch.zeros(COORDINATES, dtype=torch.float32, device=device, requires_grad=True)
    param.grad = torch.randn(COORDINATES, dtype=torch.float32, device=device)
    optimizer, times = LSTMOptimizer([param], network=network), []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        optimizer.step()
        if param.is_cuda:
            torch.cuda.synchronize(param.device)
        times.append(time.perf_counter() - start)
    return Cost(
        bytes=4 * state_size(network.config),
        multiply_adds=sum(math.prod(shape) for shape in shapes if len(shape) == 2),
        nanoseconds=1e9 * statistics.median(times[1:]) / COORDINATES,  # the first makes the state
    )
