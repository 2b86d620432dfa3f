"""Gradients that are finite and too large for a finite state: to every op they are what NaN is, to the last bit."""

import itertools

import torch

from l2l_fast import arguments, ops
from l2l_fast.config import Config, gradient_limit, has_moments, num_weights

DTYPES = list(itertools.product((torch.float32, torch.float64), (torch.float32, torch.bfloat16, torch.float64)))
CONFIG = Config("both", 4, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8)


def check_step(op, config, dtype, state_dtype, device="cpu", size=70):
    """A step of parameters, one in five of which has a huge gradient; then the state in the long run.

    Args:
        op: ``lstm_step_`` of some backend, with the schema's arguments.
        config: not of "log_sign", which takes any gradient that is finite.
        dtype: of the weights, and so of the arithmetic.
    """
    weights, (grad, state), huge = _problem(config, dtype, state_dtype, size)
    states = []
    for this in (grad, grad.masked_fill(huge, torch.nan)):
        param, held = torch.ones(size, dtype=dtype, device=device), _placed(state, device)
        before = param.clone(), held.clone()
        _step(op, param, this.to(device), held, weights.to(device), config)
        states.append((param, held))
        assert torch.equal(param[huge], before[0][huge])
        assert torch.equal(held[huge], before[1][huge])
        assert (param[~huge] != before[0][~huge]).all()
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])

    # The largest that counts leaves a finite state, also with large weights, and is forgotten again.
    largest = torch.full((size,), gradient_limit(config, dtype, state_dtype) * 0.999, dtype=dtype)
    param, held = torch.zeros(size, dtype=dtype, device=device), _placed(state, device)
    for this in (largest, largest, -largest):
        _step(op, param, this.to(device), held, 200 * weights.to(device), config)
    assert held.isfinite().all()
    assert param.isfinite().all()
    if has_moments(config):
        highest = held[:, 1].clone()
        for _ in range(50):
            _step(op, param, torch.ones(size, dtype=dtype, device=device), held, weights.to(device), config)
        assert (held[:, 1] < 0.1 * highest).all()


def check_unroll(unroll, backward, config, dtype, state_dtype, device="cpu", size=70):
    """Forward and backward through time of the same; ``unroll`` and ``backward`` have the schemas' arguments."""
    weights, (row, state), huge = _problem(config, dtype, state_dtype, size)
    grads = torch.stack([torch.ones_like(row), row, row.roll(1), torch.ones_like(row)])
    spikes = torch.stack([huge & False, huge, huge.roll(1), huge & False])
    results = []
    for these in (grads, grads.masked_fill(spikes, torch.nan)):
        args = [these.to(device), _placed(state, device), weights.to(device), torch.tensor(2.0, device=device)]
        args += arguments.codes(config)
        updates, last = unroll(*args)
        d_last = torch.linspace(-1, 1, last.numel(), dtype=state_dtype, device=device).view(last.shape)
        results.append([updates, last, *backward(torch.ones_like(updates), d_last, *args, True, True, True)])
        assert updates[spikes].eq(0).all()
        assert all(result.isfinite().all() for result in results[-1])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def _problem(config, dtype, state_dtype, size):
    generator = torch.Generator().manual_seed(0)
    weights = torch.empty(num_weights(config)).uniform_(-0.5, 0.5, generator=generator).to(dtype)
    grad, huge = torch.randn(size, generator=generator).to(dtype), torch.arange(size) % 5 == 0
    limit, most = gradient_limit(config, dtype, state_dtype), torch.finfo(dtype).max
    grad[huge] = torch.tensor([limit, -limit, 11.0 * limit, most, -most], dtype=dtype).repeat(size)[: int(huge.sum())]
    state = ops.new_state(grad, config, state_dtype)
    return weights, (grad, state), huge


def _placed(state, device):
    return torch.empty_strided(state.shape, state.stride(), dtype=state.dtype, device=device).copy_(state)


def _step(op, param, grad, state, weights, config):
    one = torch.tensor(1.0, device=param.device)
    op([param], [grad], [state], weights, one, [one], *arguments.codes(config), 0.1, False)
