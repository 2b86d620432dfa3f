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
ON_GPU = cases.device.type == "cuda"
LEARNED = rivals.LEARNED | (rivals.TUNED if ON_GPU else {})
GRAPHS = ("ours", "ours bf16 state", "Adam fused", "Adam foreach", "RMSprop foreach")


def _learned(size: str) -> list[str]:
    """Not where they take more than 8 GB of a CPU's memory, or long to compile for little to learn."""
    if not ON_GPU:
        return [] if size == "10M" else list(LEARNED)
    compiled = {"torch.compile": ("16k", "10M"), "torch.compile max-autotune": ("10M",)}
    return [way for way in LEARNED if size in compiled.get(way, (size,))]


def _rows():
    for size in cases.SIZES:
        for threads in sorted({1, ALL}) if size == "1M" and not ON_GPU else [ALL]:
            # Last what may run out of memory, and leave a GPU unusable behind it.
            for way in sorted((*ours.STEPS, *_learned(size), *rivals.HAND_DESIGNED), key=lambda way: way == "nn.LSTM"):
                marks = [pytest.mark.full] if "compile" in way else []  # half a minute to compile
                yield pytest.param(size, threads, way, id=f"{size}-{threads}-{way}", marks=marks)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("way", GRAPHS)
@pytest.mark.parametrize("size", ["1k", "16k"])
def test_step_in_a_graph(size, way, race):
    """Small models are bound by launches; in a graph only the kernels are left."""

    def captured(way):
        tensors = cases.params(cases.SIZES[size])
        if way in ours.STEPS:
            return ours.captured(ours.optimizer(way, tensors).step)
        return ours.captured(rivals.hand_designed(way, tensors, capturable=True).step)

    race(
        f"step in a CUDA graph, {size}", captured(way), kind="step in a graph", case=size, way=way,
        beside=None if way == "ours" else captured("ours"),
        coordinates=cases.count(cases.params(cases.SIZES[size])), tensors=len(cases.SIZES[size]),
    )  # fmt: skip


@pytest.mark.parametrize(("size", "threads", "way"), list(_rows()))
def test_step(size, threads, way, race):
    torch.set_num_threads(threads)
    tensors = cases.params(cases.SIZES[size])
    network, moved = cases.network(), None
    if way in ours.STEPS:
        optimizer, (name, state_dtype) = ours.optimizer(way, tensors), ours.STEPS[way]
        network = cases.network(name)
        moved = costs.step_bytes(network.config, state_dtype)
    elif way in LEARNED:
        optimizer = LEARNED[way](network, tensors)
        moved = costs.step_bytes(network.config)
    else:
        optimizer = rivals.hand_designed(way, tensors)
        moved = costs.HAND_DESIGNED[way.split()[0]]
    learned = way not in rivals.HAND_DESIGNED
    if way in LEARNED:
        _run_or_skip(optimizer)
    beside = None if way == "ours" else ours.optimizer("ours", cases.params(cases.SIZES[size])).step
    optimizer.step()  # makes the state
    race(
        f"step, {size}, threads {threads}", optimizer.step, kind="step", case=size, way=way, beside=beside,
        coordinates=cases.count(tensors), tensors=len(tensors), state_bytes=cases.state_bytes(optimizer),
        moved=moved, multiply_adds=costs.step_multiply_adds(network.config) if learned else 0,
    )  # fmt: skip


@pytest.mark.skipif(
    ON_GPU or not (_native.extension and _native.extension.cpu_bf16_isas()),
    reason="no instructions of a CPU for products in bfloat16",
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


def _run_or_skip(optimizer) -> None:
    try:
        optimizer.step()
        cases.finished()
    except Exception as error:
        if not ON_GPU and not isinstance(getattr(optimizer, "move", None), rivals.Compiled):
            raise  # nothing to compile, nothing to run out of
        pytest.skip(str(error).splitlines()[0])
