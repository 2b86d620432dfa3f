"""The operators as PyTorch sees them: schema, shapes, gradients, compilation."""

import pytest
import torch
from torch.library import opcheck

from l2l_fast import CoordinatewiseLSTM, ops, reference
from l2l_fast.reference import FEATURES

OPS = torch.ops.l2l_fast


def arguments(features="both", dtype=torch.float64, steps=3, size=6, projection=True):
    network = CoordinatewiseLSTM(features, 3, 2, projection=projection, output="tanh").to(dtype)
    weights = network.flat_weights().detach()
    grads = torch.randn(steps, size, dtype=dtype)
    state = ops.new_state(torch.empty(size), network.config, dtype) + 0.1
    return network.config, weights, grads, state


@pytest.mark.parametrize("features", FEATURES)
def test_step_passes_opcheck(features):
    config, weights, grads, state = arguments(features, torch.float32)
    params, lr, steps = torch.zeros(6), torch.tensor(1.0), [torch.tensor(1.0)]
    opcheck(OPS.lstm_step_, ([params], [grads[0]], [state], weights, lr, steps, *config, 0.01, False))


@pytest.mark.parametrize("features", FEATURES)
def test_unroll_passes_opcheck(features):
    config, weights, grads, state = arguments(features)
    tensors = [tensor.requires_grad_() for tensor in (grads, state, weights)]
    opcheck(OPS.lstm_unroll, (*tensors, torch.tensor(1.0), *config))


@pytest.mark.parametrize("needed", [(True, True, True), (False, False, True), (True, False, False)])
def test_unroll_backward_passes_opcheck(needed):
    config, weights, grads, state = arguments()
    opcheck(
        OPS.lstm_unroll_backward,
        (torch.randn_like(grads), torch.randn_like(state), grads, state, weights, torch.tensor(1.0), *config, *needed),
    )


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("projection", [False, True])
def test_unroll_passes_gradcheck(features, projection):
    config, weights, grads, state = arguments(features, projection=projection)
    tensors = [tensor.requires_grad_() for tensor in (grads, state, weights)]
    assert torch.autograd.gradcheck(lambda g, s, w: ops.lstm_unroll(g, s, w, config, 2), tensors)


def test_second_derivatives_are_refused_with_the_cure():
    config, weights, grads, state = arguments()
    weights.requires_grad_()
    updates, _ = ops.lstm_unroll(grads, state, weights, config)
    (gradient,) = torch.autograd.grad(updates.sum(), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.lstm_unroll"):
        gradient.sum().backward()


def test_gradients_not_needed_are_not_formed():
    config, weights, grads, state = arguments()
    d_grads, d_state, d_weights = ops.lstm_unroll_backward(
        torch.randn_like(grads), None, grads, state, weights, config, torch.tensor(1.0)
    )
    assert (d_grads.numel(), d_state.numel(), d_weights.shape) == (0, 0, weights.shape)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("size", [0, 1, 9])
def test_steps_in_place_equal_the_unroll(steps, size):
    config, weights, grads, state = arguments(steps=steps, size=size)
    updates, last = ops.lstm_unroll(grads, state, weights, config)
    theta, states = torch.zeros(size, dtype=torch.float64), state.clone()
    for t in range(steps):
        ops.lstm_step_([theta], [grads[t]], [states], weights, torch.tensor(1.0), [torch.tensor(t + 1.0)], config)
    torch.testing.assert_close(theta, updates.sum(0))
    torch.testing.assert_close(states, last)


def test_step_applies_lr_decay_and_maximize():
    config, weights, grads, state = arguments("log_sign", steps=1)
    theta = torch.randn(6, dtype=torch.float64)
    for maximize in (False, True):
        sign = -1 if maximize else 1
        updates, _ = ops.lstm_unroll(sign * grads, state, weights, config)
        moved, args = theta.clone(), ([grads[0]], [state.clone()], weights, torch.tensor(0.5), [torch.tensor(1.0)])
        ops.lstm_step_([moved], *args, config, weight_decay=0.1, maximize=maximize)
        torch.testing.assert_close(moved, theta - 0.5 * 0.1 * theta + 0.5 * updates[0])


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "expanded_grad"])
def test_step_takes_any_strides(layout):
    config, weights, *_ = arguments(dtype=torch.float32)
    make = {
        "transposed": lambda: torch.randn(5, 4).T,
        "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(8, 6)[::2, 1::2],
        "expanded_grad": lambda: torch.randn(4, 5),
    }[layout]
    theta, grad = make(), make()
    if layout == "expanded_grad":
        grad = torch.randn(1, 5).expand(4, 5)
    plain = theta.clone(memory_format=torch.contiguous_format)
    lr, steps = torch.tensor(1.0), [torch.tensor(1.0)]
    ops.lstm_step_([theta], [grad], [ops.new_state(theta, config)], weights, lr, steps, config)
    ops.lstm_step_([plain], [grad.contiguous()], [ops.new_state(plain, config)], weights, lr, steps, config)
    torch.testing.assert_close(theta, plain)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (16,), (3, 5), (2**12,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_has_the_parameters_shape_and_contiguous_rows(shape, dtype):
    config = arguments()[0]
    param = torch.empty(shape)
    state = ops.new_state(param, config, dtype)
    assert state.shape == (*shape, reference.state_size(config))
    assert state.dtype == dtype
    assert not state.any()
    row_bytes = state.stride(-1) * dtype.itemsize
    assert row_bytes % 64 == 0
    assert (row_bytes // 64) % 2 == 1
    if param.numel() > 1:
        assert state.stride()[:-1] == param.stride()


def test_state_follows_the_parameters_memory_order():
    param = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = ops.new_state(param, arguments()[0])
    assert state.stride()[:-1] == param.stride()


def test_unroll_compiles_without_a_graph_break():
    config, weights, grads, state = arguments(dtype=torch.float32)
    compiled = torch.compile(lambda g, s, w: ops.lstm_unroll(g, s, w, config), fullgraph=True, backend="aot_eager")
    weights.requires_grad_()
    torch.testing.assert_close(compiled(grads, state, weights), ops.lstm_unroll(grads, state, weights, config))
