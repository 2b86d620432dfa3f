"""One meta-gradient of an unroll of 20 on random gradients, and its memory. A coordinate is a coordinate-step."""

import functools

import pytest
import torch

import cases
import costs
import memory
import ours
import rivals

SIZES = {"16k": 15_910, "100k": 100_000}
WAYS = ("ours", "ours, backward alone", "autograd, nn.LSTMCell", "autograd, torch.compile")


def _rows():
    for case in SIZES:
        for way in WAYS:
            slow = case == "100k" or way.endswith("compile")
            yield pytest.param(case, way, id=f"{case}-{way}", marks=[pytest.mark.full] if slow else [])


@pytest.mark.parametrize(("case", "way"), list(_rows()))
def test_meta_gradient(case, way, race):
    size, network = SIZES[case], cases.network()
    (source,) = cases.params([(cases.UNROLL + 1, size)])
    grads = source.grad
    calls = {
        "ours": lambda: ours.meta_gradient(network, grads),
        "ours, backward alone": lambda: ours.meta_gradient(network, grads, forward=False),
        "autograd, nn.LSTMCell": functools.partial(rivals.meta_gradient, rivals.Cells(network), grads),
    }
    if way.endswith("compile"):
        calls[way] = functools.partial(rivals.meta_gradient, rivals.Compiled(network), grads)
        try:
            calls[way]()
        except Exception as error:
            pytest.skip(f"torch.compile: {str(error).splitlines()[0]}")
    race(
        f"meta-gradient, {case}", calls[way], kind="meta-gradient", case=case, way=way,
        beside=None if way == "ours" else calls["ours"], coordinates=cases.UNROLL * size, unroll=cases.UNROLL,
        moved=costs.meta_bytes(network.config, cases.UNROLL),
        multiply_adds=costs.meta_multiply_adds(network.config),
    )  # fmt: skip


@pytest.mark.parametrize("way", ["ours", "autograd"])
def test_memory(way, benchmark, request):
    """Peak extra memory, on the CPU in a process of its own; autograd at an eighth of the size."""
    size = 100_000 if request.config.getoption("--quick") else 400_000
    size = size // 8 if way == "autograd" else size
    measured = {"ours": "suffix", "autograd": "autograd"}[way]
    measure = memory.measure_gpu if cases.device.type == "cuda" else memory.measure
    benchmark.group = "meta-gradient, memory"
    extra = benchmark.pedantic(measure, args=(measured, size, cases.UNROLL), rounds=1)
    benchmark.extra_info.update(
        kind="memory", case=f"unroll {cases.UNROLL}", way=way, coordinates=size, unroll=cases.UNROLL,
        threads=torch.get_num_threads(), peak_extra_bytes=extra, peak_extra_bytes_per_coordinate=extra / size,
    )  # fmt: skip
