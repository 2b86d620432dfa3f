"""One step of the optimizer on tensors whose gradients are there: ours, the same in plain PyTorch, torch.optim's."""

import pytest
import torch

import cases
import costs
import ours
import parity
import rivals
from l2l_fast import _native

ALL = torch.get_num_threads()


def _rows():
    for size in cases.SIZES:
        for threads in sorted({1, ALL}) if size == "1M" else [ALL]:
            learned = () if size == "10M" else rivals.LEARNED  # they take more than 8 GB there
            for way in (*ours.STEPS, *learned, *rivals.HAND_DESIGNED):
                marks = [pytest.mark.full] if way == "torch.compile" else []  # half a minute to compile
                yield pytest.param(size, threads, way, id=f"{size}-{threads}-{way}", marks=marks)


@pytest.mark.parametrize(("size", "threads", "way"), list(_rows()))
def test_step(size, threads, way, race):
    torch.set_num_threads(threads)
    tensors = cases.params(cases.SIZES[size])
    network, moved = cases.network(), None
    if way in ours.STEPS:
        optimizer, (name, state_dtype) = ours.optimizer(way, tensors), ours.STEPS[way]
        network = cases.network(name)
        moved = costs.step_bytes(network.config, state_dtype)
    elif way in rivals.LEARNED:
        optimizer = rivals.LEARNED[way](network, tensors)
        moved = costs.step_bytes(network.config)
    else:
        optimizer = rivals.hand_designed(way, tensors)
        moved = costs.HAND_DESIGNED[way.split()[0]]
    learned = way not in rivals.HAND_DESIGNED
    if way == "torch.compile":
        _compile_or_skip(optimizer)
    beside = None if way == "ours" else ours.optimizer("ours", cases.params(cases.SIZES[size])).step
    optimizer.step()  # makes the state
    race(
        f"step, {size}, threads {threads}", optimizer.step, kind="step", case=size, way=way, beside=beside,
        coordinates=cases.count(tensors), tensors=len(tensors), state_bytes=cases.state_bytes(optimizer),
        moved=moved, multiply_adds=costs.step_multiply_adds(network.config) if learned else 0,
    )  # fmt: skip


@pytest.mark.skipif(
    not (_native.extension and _native.extension.cpu_bf16_isas()), reason="no instructions for products in bfloat16"
)
@pytest.mark.parametrize(("size", "threads"), [pytest.param("1M", n, id=f"1M-{n}") for n in sorted({1, ALL})])
def test_bfloat16_products(size, threads, race):
    """Beside float32 arithmetic, whose ceilings these may pass."""
    torch.set_num_threads(threads)
    tensors, network = cases.params(cases.SIZES[size]), cases.network()
    optimizer, beside = (ours.optimizer("ours", some) for some in (tensors, cases.params(cases.SIZES[size])))
    with ours.bfloat16_products() as isa:
        error = parity.step_error(network)

    def step():
        with ours.bfloat16_products():
            optimizer.step()

    step()
    race(
        f"step, {size}, threads {threads}", step, kind="step", case=size, way=ours.BFLOAT16, beside=beside.step,
        coordinates=cases.count(tensors), state_bytes=cases.state_bytes(optimizer), isa=isa, error_to_float64=error,
        moved=costs.step_bytes(network.config), multiply_adds=costs.step_multiply_adds(network.config),
    )  # fmt: skip


def _compile_or_skip(optimizer) -> None:
    try:
        optimizer.step()
    except Exception as error:
        pytest.skip(f"torch.compile: {str(error).splitlines()[0]}")
