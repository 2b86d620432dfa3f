"""Ours, in the forms that the benches compare: the optimizer's variants and the meta-gradient of an unroll."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

import cases
from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, _native, ops
from l2l_fast.meta.unroll import suffix_sums

BFLOAT16 = "ours bf16 products"  # the paper network, where the machine has instructions for it
STEPS = {
    "ours": ("paper", torch.float32),
    "ours bf16 state": ("paper", torch.bfloat16),
    "ours moments": ("moments", torch.float32),
}


def optimizer(way: str, params) -> LSTMOptimizer:
    name, state_dtype = STEPS[way]
    return LSTMOptimizer(params, cases.network(name), state_dtype=state_dtype)


@contextlib.contextmanager
def bfloat16_products():
    """The step's products in bfloat16; yields the instruction set's name."""
    before = _native.extension.cpu_isa()
    _native.extension.use_cpu_isa("bf16")
    try:
        yield _native.extension.cpu_isa()
    finally:
        _native.extension.use_cpu_isa(before)


@torch.no_grad()
def meta_gradient(network: CoordinatewiseLSTM, grads: Tensor, *, forward: bool = True) -> Tensor:
    """That of ``rivals.meta_gradient``: T in-place steps, suffix sums, one backward.

    Args:
        network: the optimizer.
        grads: [T + 1, N].
        forward: make the steps too; without them this is the backward alone.
    """
    length, size = len(grads) - 1, grads.shape[1]
    device = grads.device
    weights, theta, lr = network.flat_weights(), torch.zeros(size, device=device), torch.ones((), device=device)
    counts = torch.arange(1.0, length + 1, device=device)
    state = ops.new_state(theta, network.config)
    if forward:
        first_state = state.clone(memory_format=torch.preserve_format)
        for t in range(length):
            ops.lstm_step_([theta], [grads[t]], [state], weights, lr, [counts[t]], network.config)
        state = first_state
    sums = suffix_sums(grads[1:, None], torch.ones(length, 1, device=device)).view(length, size)
    *_, found = ops.lstm_unroll_backward(sums, None, grads[:-1], state, weights, network.config, counts[0])
    return found


def captured(step):
    """A call of a step that has its memory already, as a CUDA graph: one launch, no Python in between."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(kept=step) -> None:  # the graph holds addresses, not tensors
        graph.replay()

    return replay
