"""What the machine can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from l2l_fast import _native

REPEATS = 5


def _fastest(call) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def sgemm(rows: int = 1536, inner: int = 1536, columns: int = 1536) -> float:
    """FLOP/s of float32 torch.mm, [rows x inner] x [inner x columns]."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    return 2 * rows * inner * columns / _fastest(lambda: torch.mm(a, b, out=out))


def fma(rounds: int = 2_000_000) -> float:
    """FLOP/s of float32 multiply-adds on registers alone: no sgemm is faster, and some machines' is much slower."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        made = threads * _native.extension.multiply_adds(1)
        return 2 * rounds * made / _fastest(lambda: list(pool.map(_native.extension.multiply_adds, [rounds] * threads)))


def copy(megabytes: int = 512) -> float:
    """Bytes/s that a copy far larger than the caches reads and writes together."""
    source = torch.ones(megabytes * 2**18)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source))


def measure() -> dict[str, float]:
    """With as many threads as torch has now; about half a second."""
    found = {"sgemm_flops": sgemm(), "copy_bytes_per_second": copy()}
    return found | {"fma_flops": fma()} if _native.extension else found


def gate_products() -> dict[str, float]:
    """FLOP/s of sgemm at the shapes of the paper network's two layers, for a tile of 4096 coordinates."""
    return {"layer 0, [80x22] x [22x4096]": sgemm(80, 22, 4096), "layer 1, [80x40] x [40x4096]": sgemm(80, 40, 4096)}
