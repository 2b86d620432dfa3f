"""lstm_step_scaled_ and the rule that it is held to, for the tests of every backend."""

import torch
from problems import LAYOUTS, make_grads, make_weights

from l2l_fast import arguments, ops, reference
from l2l_fast.config import gradient_limit

RMS = 0.6


def step(params, grads, states, config, *, lr=0.7, weights=None, weight_decay=0.0, maximize=False, slow=(), most=RMS):
    """The third step of all of them.

    slow: v of each, where their sizes follow their gradients; most: the largest size.
    """
    device = params[0].device
    weights = (make_weights(config) if weights is None else weights).to(device)
    steps = [torch.tensor(3.0, device=device) for _ in params]
    fields = *arguments.codes(config), weight_decay, maximize, RMS, list(slow), most
    lr = torch.tensor(lr, device=device)
    torch.ops.l2l_fast.lstm_step_scaled_(params, grads, states, weights, lr, steps, *fields)


def expected(param, grad, state, config, *, lr=0.7, weights=None, weight_decay=0.0, maximize=False, slow=(), most=RMS):
    """The rule as a sentence, in float64: (param, state), and v after it where there is one."""
    weights = (make_weights(config) if weights is None else weights).double()
    g = (-grad if maximize else grad).double()
    rows = state.double().reshape(-1, state.shape[-1])
    updates, last = reference.lstm_unroll(g.reshape(1, -1), rows, weights, torch.tensor(3.0), *config)
    held = ~(g.abs() < gradient_limit(config, torch.float32, state.dtype))
    theta, size, after = param.double(), RMS, ()
    if slow:
        size, *after = reference.update_size(g, last[..., 0], slow[0].double(), 3, config, RMS, most)
    moved = theta - lr * weight_decay * theta + lr * reference.scale_to_rms(updates.view(param.shape), size)
    return torch.where(held, theta, moved), last.view(state.shape), *after


def sizes(params, grads, states, config, slow, most):
    """r of all of them, after their third step."""
    device = params[0].device
    steps = [torch.tensor(3.0, device=device) for _ in params]
    fields = *arguments.codes(config), RMS, slow, most
    return torch.ops.l2l_fast.lstm_update_sizes_(params, grads, states, make_weights(config).to(device), steps, *fields)


def expected_sizes(grads, states, config, slow, most):
    """r of all of them, and v after the step, in float64."""
    found = [
        reference.update_size(grad.double().cpu(), state[..., 0].double().cpu(), v.double().cpu(), 3, config, RMS, most)
        for grad, state, v in zip(grads, states, slow, strict=True)
    ]
    return map(torch.stack, zip(*found, strict=True))


def of_all_kinds(config, dtype):
    """Params, gradients, states and mean squares of tensors in any layout, an empty one and one of several blocks;
    one gradient is not finite."""
    params = [make() for make in LAYOUTS.values()] + [torch.zeros(0, 3), torch.tensor(1.0), torch.zeros(9000)]
    grads = [make_grads(*param.shape, seed=i).to(dtype) for i, param in enumerate(params)]
    grads[2][0] = float("nan")
    states = [ops.new_state(param, config) for param in params]
    for state in states:
        state.copy_(torch.rand(state.shape))
    return params, grads, states, [torch.tensor(1e-3 * i) for i in range(len(params))]
