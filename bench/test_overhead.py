"""What Python and the dispatcher add to the kernel, on the four tensors of the MNIST network."""

import statistics

import torch

import cases
from l2l_fast import LSTMOptimizer, arguments


def _op(optimizer, tensors, network):
    """The op that the optimizer calls, on the same memory, its arguments ready."""
    grads = [tensor.grad for tensor in tensors]
    states = [optimizer.state[tensor]["lstm"] for tensor in tensors]
    weights, lr = network.flat_weights().detach(), torch.ones((), device=cases.device)
    steps = [torch.ones((), device=cases.device) for _ in tensors]
    op = torch.ops.l2l_fast.lstm_step_
    codes = arguments.codes(network.config)
    return lambda: op(tensors, grads, states, weights, lr, steps, *codes, 0.0, False)


def test_optimizer(race, benchmark):
    """LSTMOptimizer.step() less the op: the Python side. ``ours_seconds`` is here the op's own time."""
    network, tensors = cases.network(), cases.params(cases.SIZES["16k"])
    optimizer = LSTMOptimizer(tensors, network)
    optimizer.step()  # makes the state
    op_times = race("overhead, 16k", optimizer.step, kind="overhead", case="16k", way="step() beside the op",
                    coordinates=cases.count(tensors), beside=_op(optimizer, tensors, network))  # fmt: skip
    pairs = zip(benchmark.stats.stats.data, op_times, strict=True)
    benchmark.extra_info["overhead_seconds"] = statistics.median(step - op for step, op in pairs)


def test_dispatch(race):
    """step() on four tensors of no elements: everything but the kernel's arithmetic."""
    tensors = [torch.zeros(0, device=cases.device) for _ in cases.SIZES["16k"]]
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
    optimizer = LSTMOptimizer(tensors, cases.network())
    race("overhead, 16k", optimizer.step, kind="overhead", case="16k", way="step() of empty tensors", coordinates=0)
