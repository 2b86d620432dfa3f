"""What the machine can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

import cases
from l2l_fast import _native

REPEATS = 5


def _fastest(call) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        cases.finished()
        begun = time.perf_counter()
        call()
        cases.finished()
        times.append(time.perf_counter() - begun)
    return min(times)


def sgemm(rows: int = 1536, inner: int = 1536, columns: int = 1536) -> float:
    """FLOP/s of float32 torch.mm, [rows x inner] x [inner x columns]."""
    a, b = torch.randn(rows, inner, device=cases.device), torch.randn(inner, columns, device=cases.device)
    out = torch.empty(rows, columns, device=cases.device)
    return 2 * rows * inner * columns / _fastest(lambda: torch.mm(a, b, out=out))


def fma(rounds: int = 2_000_000) -> float:
    """FLOP/s of float32 multiply-adds on registers alone: no sgemm is faster, and some machines' is much slower."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        made = threads * _native.extension.multiply_adds(1)
        return 2 * rounds * made / _fastest(lambda: list(pool.map(_native.extension.multiply_adds, [rounds] * threads)))


def copy(megabytes: int = 512) -> float:
    """Bytes/s that a copy far larger than the caches reads and writes together."""
    source = torch.ones(megabytes * 2**18, device=cases.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _fastest(lambda: target.copy_(source))


def tf32(size: int = 8192) -> float:
    """FLOP/s of torch.mm on a GPU's matrix units, float32 rounded to 10 bits of fraction."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        return sgemm(size, size, size)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def measure() -> dict[str, float]:
    """With as many threads as torch has now; about half a second."""
    if cases.device.type == "cuda":
        rates = {"sgemm_flops": sgemm(8192, 8192, 8192), "tf32_flops": tf32()}
        return {**rates, "copy_bytes_per_second": copy(4096)}
    found = {"sgemm_flops": sgemm(), "copy_bytes_per_second": copy()}
    return found | {"fma_flops": fma()} if _native.extension else found


def gate_products() -> dict[str, float]:
    """FLOP/s of sgemm at the shapes of the paper network's two layers, for a tile of 4096 coordinates."""
    return {"layer 0, [80x22] x [22x4096]": sgemm(80, 22, 4096), "layer 1, [80x40] x [40x4096]": sgemm(80, 40, 4096)}
