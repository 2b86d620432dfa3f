"""No call loses memory of the native heap, which torch's own counters and Python's do not see."""

import heap
import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, arguments, ops

CALLS = 20_000


def _optimizer(features):
    theta = torch.nn.Parameter(torch.zeros(10))
    theta.grad = torch.ones(10)
    return LSTMOptimizer([theta], CoordinatewiseLSTM(features, 4, 1)).step


def _op(name):
    def make(features):
        network, one = CoordinatewiseLSTM(features, 4, 1), torch.tensor(1.0)
        codes, weights = arguments.codes(network.config), network.flat_weights().detach()
        grads, state = torch.randn(2, 10), ops.new_state(torch.empty(10), network.config)
        op = getattr(torch.ops.l2l_fast, name)
        if name == "lstm_step_":
            return lambda: op([torch.zeros(10)], [grads[0]], [state], weights, one, [one], *codes, 0.0, False)
        if name == "lstm_unroll":
            return lambda: op(grads, state, weights, one, *codes)
        return lambda: op(grads, state, grads, state, weights, one, *codes, True, True, True)

    return make


def _autograd(features):
    network = CoordinatewiseLSTM(features, 4, 1)
    grads, weights = torch.randn(2, 10), network.flat_weights().detach().requires_grad_()
    state = network.init_state(grads[0])
    return lambda: torch.autograd.grad(ops.lstm_unroll(grads, state, weights, network.config)[0].sum(), weights)


@pytest.mark.parametrize("features", ["log_sign", "both"])
@pytest.mark.parametrize(
    "make",
    [_optimizer, _op("lstm_step_"), _op("lstm_unroll"), _op("lstm_unroll_backward"), _autograd],
    ids=["optimizer", "step", "unroll", "backward", "autograd"],
)
def test_calls_lose_no_memory(make, features):
    call = make(features)
    for _ in range(1000):
        call()
    before = heap.in_use()
    for _ in range(CALLS):
        call()
    assert (heap.in_use() - before) / CALLS < 1
