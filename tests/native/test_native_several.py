"""The steps of several networks at once, weights [K, W]: each network's part is what it is by itself."""

import pytest
import torch
from problems import (
    CONFIGS,
    LAYOUTS,
    LINEAR,
    PAPER,
    RNNPROP,
    close,
    config_id,
    make_grads,
    make_state,
    make_weights,
    step_both,
)  # fmt: skip

from l2l_fast import arguments, ops
from l2l_fast.config import state_size

COUNTS = [1, 3, 17]


def make_networks(config, count, dtype=torch.float32):
    return torch.stack([make_weights(config, seed, dtype) for seed in range(count)])


def problem(config, count, *shape, canonical=True, dtype=torch.float32):
    """Parameters [K, *shape], gradients and states of K networks."""
    param = torch.randn(count, *shape)
    state = ops.new_state(param, config, dtype, several=canonical)
    for k in range(count):
        state[k] = make_state(param[k].numel(), config, k, dtype).view(state[k].shape)
    return param, make_grads(count, *shape), state


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [0, 1, 5, 16, 33, 64, 129])
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_sizes(isa, config, size, count):
    param, grad, state = problem(config, count, size)
    params, states = step_both([param], [grad], [state], config, weights=make_networks(config, count))
    close(param, params[0])
    close(state, states[0])


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_every_option(config):
    param, grad, state = problem(config, 3, 35)
    weights = make_networks(config, 3)
    options = {"weight_decay": 0.3, "maximize": True, "number": 7}
    params, states = step_both([param], [grad.clamp_(-1, 1)], [state], config, weights=weights, **options)
    close(param, params[0])
    close(state, states[0])


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("shapes", [[(5,), (), (2, 0), (3, 40)], [(3000,)], [(7, 9, 2), (1,)]])
def test_groups_of_tensors_and_threads(shapes, threads):
    """Every network is what it is alone, to the last bit, however the work is shared."""
    count, weights, before = 5, make_networks(PAPER, 5), torch.get_num_threads()
    problems = [problem(PAPER, count, *shape) for shape in shapes]
    params, grads, states = zip(*problems, strict=True)
    alone = [[tensor.clone() for tensor in tensors] for tensors in (params, states)]
    steps, lr = [torch.tensor(3.0)] * len(shapes), torch.tensor(0.7)
    for k in range(count):
        parts = [tensor[k] for tensor in alone[0]], [grad[k] for grad in grads], [tensor[k] for tensor in alone[1]]
        ops.lstm_step_(*parts, weights[k], lr, steps, PAPER, weight_decay=0.1)
    torch.set_num_threads(threads)
    try:
        ops.lstm_step_(params, grads, states, weights, lr, steps, PAPER, weight_decay=0.1)
    finally:
        torch.set_num_threads(before)
    for found, expected in zip([*params, *states], [*alone[0], *alone[1]], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "scalar"])
def test_strides(isa, layout, canonical):
    param = LAYOUTS[layout]()
    grad = torch.empty(param.shape).copy_(make_grads(*param.shape))
    state = ops.new_state(param, PAPER) if canonical else torch.empty(*param.shape, state_size(PAPER))
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9))
    weights = make_networks(PAPER, len(param))
    params, states = step_both([param], [grad], [state], PAPER, weights=weights)
    close(param, params[0])
    close(state, states[0])


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype, weights_dtype):
    param, grad, state = problem(LINEAR, 4, 70, dtype=dtype)
    weights = make_networks(LINEAR, 4, weights_dtype)
    alone = param.clone(), state.clone()
    lr, steps = torch.tensor(0.7), [torch.tensor(3.0)]
    ops.lstm_step_([param], [grad], [state], weights, lr, steps, LINEAR)
    for k in range(4):
        ops.lstm_step_([alone[0][k]], [grad[k]], [alone[1][k]], weights[k], lr, steps, LINEAR)
    assert torch.equal(param, alone[0])
    assert torch.equal(state, alone[1])


@pytest.mark.parametrize("native", [True, False])
def test_updates_scaled_over_each_networks_tensor(native):
    param, grad, state = problem(LINEAR, 4, 70)
    weights, alone = make_networks(LINEAR, 4), (param.clone(), state.clone())
    op = torch.ops.l2l_fast.lstm_step_scaled_ if native else ops.REFERENCE["lstm_step_scaled_"]
    rest = torch.tensor(0.7), [torch.tensor(3.0)], *arguments.codes(LINEAR), 0.1, False, 0.6, [], 0.6
    op([param], [grad], [state], weights, *rest)
    for k in range(4):
        op([alone[0][k]], [grad[k]], [alone[1][k]], weights[k], *rest)
    assert torch.equal(param, alone[0])
    assert torch.equal(state, alone[1])


def test_no_networks_move_nothing():
    config = PAPER
    ops.lstm_step_(
        [torch.empty(0, 3)], [torch.empty(0, 3)], [torch.empty(0, 3, state_size(config))], make_networks(config, 1)[:0],
        torch.tensor(1.0), [torch.tensor(1.0)], config,
    )  # fmt: skip
