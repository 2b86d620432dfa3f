"""lstm_step_scaled_ and the rule that it is held to, for the tests of every backend."""

import torch
from problems import make_weights

from l2l_fast import arguments, reference
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
    weights, steps = (
        make_weights(config).to(params[0].device),
        [torch.tensor(3.0, device=params[0].device)] * len(params),
    )
    fields = *arguments.codes(config), RMS, slow, most
    return torch.ops.l2l_fast.lstm_update_sizes_(params, grads, states, weights, steps, *fields)
