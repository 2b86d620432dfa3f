"""The CUDA ops against the reference in float64, at the tolerances that the CPU kernels are held to."""

import itertools
import os

import overflow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import (
    CONFIGS,
    IDENTITY,
    LAYOUTS,
    LINEAR,
    PAPER,
    RNNPROP,
    config_id,
    make_grads,
    make_state,
    make_weights,
)  # fmt: skip

from l2l_fast import ops, reference
from l2l_fast.arguments import codes
from l2l_fast.config import FEATURES, OUTPUTS, Config, state_size

EMULATED = bool(os.environ.get("L2L_FAST_EMULATED"))
pytestmark = [] if EMULATED else [pytest.mark.cuda]

OP = torch.ops.l2l_fast
TINY = Config("log_sign", 2, 1, False, "linear", 0.1, 10.0, 0.95, 0.95, 1e-8)
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65] + [100_003] * (not EMULATED)
both_networks = pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])


def placed(tensor, device):
    """A copy on the device with the very strides of the tensor, gaps included."""
    if tensor.device.type == device and not EMULATED:
        return tensor
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    copy = torch.zeros(size, dtype=tensor.dtype, device=device).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor)


def close(actual, expected, rtol=2e-5, atol=2e-6):
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=atol)


def close_scaled(actual, expected, tolerance=2e-4):
    """Within the tolerance of each element or of the tensor's own scale."""
    scale = expected.abs().mean().item() if expected.numel() else 0.0
    close(actual, expected, rtol=tolerance, atol=tolerance * scale + 1e-12)


def step_both(device, params, grads, states, config, *, lr=0.7, number=3, weights=None, **options):
    """Both steps from CPU tensors; returns the kernel's (params, states), then the float64 reference's."""
    weights = make_weights(config) if weights is None else weights
    found = [placed(p, device) for p in params], [placed(s, device) for s in states]
    expected = [p.double().clone() for p in params], [s.double().clone() for s in states]
    steps = [torch.tensor(float(number)) for _ in params]
    reference.lstm_step_(
        expected[0], [g.double() for g in grads], expected[1], weights.double(), torch.tensor(lr, dtype=torch.float64),
        steps, *config, options.get("weight_decay", 0.0), options.get("maximize", False),
    )  # fmt: skip
    ops.lstm_step_(
        found[0], [placed(g, device) for g in grads], found[1], weights.to(device), torch.tensor(lr, device=device),
        [step.to(device) for step in steps], config, **options,
    )  # fmt: skip
    return found, expected


def check_step(*args, rtol=2e-5, atol=2e-6, **options):
    (params, states), (params64, states64) = step_both(*args, **options)
    for actual, expected in zip(params + states, params64 + states64, strict=True):
        close(actual, expected, rtol, atol)
    return params, states


def largest_features(grad, state64, config, number):
    """[N]: the larger ratio of the moments of each coordinate, from its state after the step; 0 without moments."""
    if config.features not in ("moments", "both"):
        return torch.zeros(len(grad), dtype=torch.float64)
    m, v = state64[:, 0] / (1 - config.beta1**number), state64[:, 1] / (1 - config.beta2**number)
    return torch.maximum(m.abs(), grad.double().nan_to_num(0, 0, 0).abs()) / (v.sqrt() + config.eps)


def check_rounded_step(device, params, grads, states, config, *, lr=0.7, number=3, **options):
    """check_step, each tensor as exactly as its state is kept.

    With a state of bfloat16 the matrix units take factors in float16 and gates are the special-function unit's tanh. An
    update is within 1e-3 of the largest there can be. h and c are within 1e-3 and 1e-4 of the coordinate's largest
    feature, which may be in the hundreds, beyond the rounding of what is stored.
    """
    found, expected = step_both(device, params, grads, states, config, lr=lr, number=number, **options)
    half, moments = torch.finfo(torch.bfloat16).eps / 2, 2 if config.features in ("moments", "both") else 0
    for param, grad, state, param64, state64 in zip(found[0], grads, found[1], *expected, strict=True):
        if state.dtype is not torch.bfloat16:
            close(param, param64)
            close(state, state64)
            continue
        state = state.cpu().double()
        close(param, param64, atol=1e-3 * lr * config.output_scale)
        close(state[..., :moments], state64[..., :moments], rtol=2e-5 + half)
        cell, cell64 = state[..., moments:], state64[..., moments:]
        allowed = half * cell64.abs() + 1e-3 + 1e-4 * largest_features(grad, state64, config, number)[:, None]
        beyond = (cell - cell64).abs() - allowed
        assert (beyond <= 0).all(), f"h or c off by {beyond.max():.2e} more than allowed, at {beyond.argmax()}"
    return found


# ---------------------------------------------------------------- lstm_step_


@both_networks
@pytest.mark.parametrize("size", SIZES)
def test_step_of_every_size(device, config, size):
    check_step(device, [torch.randn(size)], [make_grads(size)], [make_state(size, config)], config)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_step_with_every_option(device, config):
    grad = make_grads(35).clamp(-1, 1)
    check_step(
        device, [torch.randn(35)], [grad], [make_state(35, config)], config, weight_decay=0.3, maximize=True, number=7
    )


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("networks", [1, 3, 60])
@pytest.mark.parametrize("size", [3, 32, 70])
@both_networks
def test_step_of_several_networks(device, config, size, networks, state_dtype):
    """Each with its own weights; 60 of 70 coordinates are more tiles than teams take."""
    weights = torch.stack([make_weights(config, seed) for seed in range(networks)])
    params = [torch.randn(networks, size), torch.randn(networks, 2, 5)]
    states = [ops.new_state(param, config, state_dtype, several=True) for param in params]
    for state in states:
        for k in range(networks):
            flat = make_state(state[k][..., 0].numel(), config, seed=k, dtype=state_dtype)
            state[k] = flat.view(state[k].shape)
    grads = [make_grads(*param.shape) for param in params]
    found = check_rounded_step_of(device, params, grads, states, config, weights)
    alone = []
    for k in range(networks):
        parts = [[tensor[k] for tensor in tensors] for tensors in (params, grads, states)]
        alone.append(step_both(device, *parts, config, weights=weights[k])[0])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if state_dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for k in range(networks):
        for part in (0, 1):
            for several, one in zip(found[part], alone[k][part], strict=True):
                torch.testing.assert_close(several[k], one, **tolerance)


def check_rounded_step_of(device, params, grads, states, config, weights):
    """check_rounded_step of tensors of several networks, for coordinates in a row."""
    found, expected = step_both(device, params, grads, states, config, weights=weights)
    for actual, wanted in zip(found[0], expected[0], strict=True):
        loose = states[0].dtype is torch.bfloat16
        close(actual, wanted, atol=1e-3 * 0.7 * config.output_scale if loose else 2e-6)
    return found


@pytest.mark.parametrize("grad_like_param", [True, False])
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_of_any_strides(device, layout, canonical, grad_like_param):
    param = LAYOUTS[layout]()
    grad = torch.empty_like(param) if grad_like_param else torch.empty(param.shape)
    grad.copy_(make_grads(*param.shape))
    state = ops.new_state(param, TINY) if canonical else torch.empty(*param.shape, state_size(TINY))
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9))
    check_step(device, [param], [grad], [state], TINY)


def test_step_of_more_dimensions_than_a_table_holds(device):
    param = torch.randn(3, 2, 4, 3, 2, 5).permute(3, 1, 5, 0, 4, 2)[:, :, ::2]
    grad = make_grads(*param.shape)
    state = torch.empty(*param.shape, state_size(TINY)).uniform_(-0.9, 0.9)
    check_step(device, [param], [grad], [state], TINY)


def test_step_leaves_neighbours_in_memory(device):
    whole = torch.randn(12, 14, device=device)
    before, window = whole.clone(), whole[2:9, 3:11]
    state, one = ops.new_state(window, TINY), torch.tensor(1.0, device=device)
    ops.lstm_step_(
        [window], [torch.randn(window.shape, device=device)], [state], make_weights(TINY).to(device), one, [one], TINY
    )
    changed = whole != before
    assert changed[2:9, 3:11].all()
    changed[2:9, 3:11] = False
    assert not changed.any()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_step_of_every_dtype(device, param_dtype, grad_dtype, state_dtype):
    param, grad = torch.randn(37).to(param_dtype), make_grads(37).to(grad_dtype)
    state = make_state(37, TINY, dtype=state_dtype)
    (params, states), (params64, states64) = step_both(device, [param], [grad], [state], TINY)
    # Half a unit in the last place of what is stored, over the float32 arithmetic.
    close(params[0], params64[0], rtol=2e-5 + torch.finfo(param_dtype).eps / 2)
    close(states[0], states64[0], rtol=2e-5 + torch.finfo(state_dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_lr_and_steps_of_every_dtype(device, dtype):
    param, grad, state = torch.randn(5), make_grads(5), make_state(5, RNNPROP)
    expected = [param.double().clone()], [state.double().clone()]
    reference.lstm_step_(
        expected[0], [grad.double()], expected[1], make_weights(RNNPROP).double(), torch.tensor(2.0).double(),
        [torch.tensor(4.0)], *RNNPROP, 0.0, False,
    )  # fmt: skip
    found, state = param.to(device, copy=True), placed(state, device)
    lr, step = torch.tensor(2, dtype=dtype, device=device), torch.tensor(4, dtype=dtype, device=device)
    ops.lstm_step_([found], [grad.to(device)], [state], make_weights(RNNPROP).to(device), lr, [step], RNNPROP)
    close(found, expected[0][0])
    close(state, expected[1][0])


def test_a_float64_parameter_is_not_rounded_to_float32(device):
    param = torch.full((3,), 1.0 + 2.0**-40, dtype=torch.float64, device=device)
    before, one = param.clone(), torch.tensor(1.0, device=device)
    state, weights = placed(make_state(3, TINY), device), make_weights(TINY).to(device)
    ops.lstm_step_([param], [torch.ones(3, device=device)], [state], weights, 0 * one, [one], TINY)
    assert torch.equal(param, before)


@both_networks
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_that_are_not_finite_change_nothing(device, config, state_dtype):
    param, grad, state = torch.randn(35), make_grads(35), make_state(35, config, dtype=state_dtype)
    bad = [0, 3, 31, 34]
    grad[bad] = torch.tensor([float("nan"), float("inf"), float("-inf"), float("nan")])
    params, states = check_rounded_step(device, [param], [grad], [state], config, weight_decay=0.1)
    assert torch.equal(params[0][bad].cpu(), param[bad])
    assert torch.equal(states[0][bad].cpu(), state[bad])


def test_a_nan_in_the_weights_is_seen(device):
    weights, one = make_weights(PAPER), torch.tensor(1.0, device=device)
    weights[100] = float("nan")
    param, state = torch.zeros(5, device=device), placed(make_state(5, PAPER), device)
    ops.lstm_step_([param], [torch.ones(5, device=device)], [state], weights.to(device), one, [one], PAPER)
    assert param.isnan().all()


@both_networks
def test_float64_weights_give_float64(device, config):
    param, grad = torch.randn(33, dtype=torch.float64), make_grads(33, dtype=torch.float64)
    state, weights = make_state(33, config, dtype=torch.float64), make_weights(config, dtype=torch.float64)
    check_step(device, [param], [grad], [state], config, weights=weights, lr=0.5, rtol=1e-9, atol=1e-11)


# What the emulator's blocks may have: nothing fits, or backward's rows in float32 or float64 without the weights; and
# the network that does the same (for float32) on an H100.
@pytest.mark.parametrize(("shared", "hidden", "layers"), [(1000, 200, 2), (23_000, 48, 1), (44_000, 48, 1)])
def test_a_network_whose_tile_needs_a_workspace(device, monkeypatch, shared, hidden, layers):
    monkeypatch.setenv("L2L_EMULATED_SHARED", str(shared))
    hidden, layers = (5, 2) if EMULATED else (hidden, layers)
    config = Config("both", hidden, layers, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path=True)
    param, grad = torch.randn(70, dtype=torch.float64), make_grads(70, dtype=torch.float64).clamp(-1, 1)
    state, weights = make_state(70, config, dtype=torch.float64), make_weights(config, dtype=torch.float64)
    check_step(device, [param], [grad], [state], config, weights=weights, lr=0.5, rtol=1e-9, atol=1e-11)
    for actual, expected in zip(*unroll_both(device, config, 3, 70, dtype=torch.float64), strict=True):
        close_scaled(actual, expected, 1e-9)
    for actual, expected in zip(*unroll_both(device, config, 3, 70), strict=True):
        close_scaled(actual, expected, 3e-4)


def test_groups_of_more_tensors_than_a_table_holds(device):
    """Dense and strided ones, some empty, of several dtypes: all step once."""
    params, grads, states = [], [], []
    for i in range(700):
        param = torch.randn(i % 4) if i % 5 else torch.randn(2, 3).t()
        params.append(param.to(torch.bfloat16) if i % 3 == 0 else param)
        grads.append(make_grads(*param.shape, seed=i))
        states.append(torch.zeros(*param.shape, state_size(TINY)) if i % 2 else ops.new_state(param, TINY))
    check_step(device, params, grads, states, TINY, rtol=2e-5 + torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tensors_give_what_one_does(device, dtype):
    cuts = [0, 1, 4, 60, 70, 71, 130]
    pieces = list(itertools.pairwise(cuts))
    whole, grad, state = torch.randn(130, dtype=dtype), make_grads(130, dtype=dtype), make_state(130, PAPER, 2, dtype)
    weights, lr = make_weights(PAPER, dtype=dtype).to(device), torch.tensor(1.0, device=device)
    params = [whole[a:b].to(device, copy=True) for a, b in pieces]
    states = [placed(state[a:b], device) for a, b in pieces]
    whole, grad, state = whole.to(device), grad.to(device), placed(state, device)
    ops.lstm_step_(params, [grad[a:b] for a, b in pieces], states, weights, lr, [lr] * len(pieces), PAPER)
    ops.lstm_step_([whole], [grad], [state], weights, lr, [lr], PAPER)
    # In float32 a piece may be stepped by another kernel than the whole.
    tolerance = {"rtol": 2e-5, "atol": 2e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(torch.cat(params), whole, **tolerance)
    torch.testing.assert_close(torch.cat(states), state, **tolerance)


def test_more_tiles_than_blocks(device):
    """A block's second tile must not begin before its first has ended."""
    size = 1500 if EMULATED else 500_000
    param, grad, state = torch.randn(size), make_grads(size).clamp(-1, 1), make_state(size, TINY)
    check_step(device, [param], [grad], [state], TINY)
    for actual, expected in zip(*unroll_both(device, TINY, 2, size), strict=True):
        close_scaled(actual, expected)


# ---------------------------------------------------------------- lstm_unroll and its backward


def unroll_both(device, config, horizon, count, *, d_last=True, number=2, grads=None, dtype=torch.float32,
                state_dtype=None, seed=0, fresh=True):  # fmt: skip
    """(updates, last, d_grads, d_state, d_weights) of the kernels and of the float64 reference."""
    weights = make_weights(config, seed, dtype)
    grads = make_grads(horizon, count, seed=seed, dtype=dtype).clamp(-1, 1) if grads is None else grads
    state = make_state(count, config, seed, state_dtype or dtype, fresh=fresh)
    generator = torch.Generator().manual_seed(seed)
    d_updates = torch.randn(horizon, count, generator=generator, dtype=dtype)
    d_last = torch.randn(state.shape, generator=generator).to(state.dtype) if d_last else None
    step = torch.tensor(float(number))
    there = [None if t is None else placed(t, device) for t in (d_updates, d_last, grads, state, weights, step)]
    actual = (
        *OP.lstm_unroll(*there[2:], *codes(config)),
        *OP.lstm_unroll_backward(*there, *codes(config), True, True, True),
    )
    double = [None if t is None else t.double() for t in (d_updates, d_last, grads, state, weights)]
    expected = (
        *reference.lstm_unroll_forward(*double[2:], step, *config),
        *reference.lstm_unroll_backward(*double, step, *config, True, True, True),
    )
    return actual, expected


@both_networks
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 65] + [1003, 40_001] * (not EMULATED))
def test_unroll_of_every_size(device, config, size):
    for actual, expected in zip(*unroll_both(device, config, 2, size), strict=True):
        close_scaled(actual, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_unroll_with_every_option(device, config):
    for actual, expected in zip(*unroll_both(device, config, 3, 37), strict=True):
        close_scaled(actual, expected, 3e-4)


@pytest.mark.parametrize("horizon", [0, 1, 2, 20] + [200] * (not EMULATED))
@pytest.mark.parametrize(
    "config", [TINY, TINY._replace(features="both", projection=True, num_layers=2), TINY._replace(linear_path=True)]
)
def test_unroll_of_every_length(device, config, horizon):
    for d_last in (True, False):
        results = unroll_both(device, config, horizon, 40, d_last=d_last, number=1000)
        for actual, expected in zip(*results, strict=True):
            assert actual.shape == expected.shape
            close_scaled(actual, expected, 5e-4)


@both_networks
def test_unroll_with_gradients_that_are_not_finite(device, config):
    grads = make_grads(5, 6)
    grads[0, 0], grads[2, 3], grads[4, 3], grads[3, 4] = float("nan"), float("inf"), float("-inf"), float("nan")
    actual, expected = unroll_both(device, config, 5, 6, grads=grads)
    for a, e in zip(actual, expected, strict=True):
        close_scaled(a, e)
    assert actual[0][0, 0] == 0
    assert actual[2][2, 3] == 0


def test_unroll_in_float64_is_exact(device):
    for config in (PAPER, RNNPROP, LINEAR, PAPER._replace(features="both", projection=True, hidden_size=5)):
        for actual, expected in zip(*unroll_both(device, config, 3, 11, dtype=torch.float64), strict=True):
            close_scaled(actual, expected, 1e-9)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float64])
def test_unroll_of_every_state_dtype(device, state_dtype):
    found, expected = unroll_both(device, PAPER, 3, 33, state_dtype=state_dtype)
    (updates, last, *gradients), (updates64, last64, *gradients64) = found, expected
    close_scaled(updates, updates64, 5e-5)
    assert last.dtype == gradients[1].dtype == state_dtype
    close(last, last64, rtol=torch.finfo(state_dtype).eps + 1e-4, atol=1e-5)
    close_scaled(gradients[2], gradients64[2], 5e-5)


def test_unroll_of_any_strides(device):
    weights, step = make_weights(PAPER).to(device), torch.tensor(1.0, device=device)
    grads = make_grads(6, 80).to(device)[::2, ::2]
    state = make_state(80, PAPER).to(device)[::2]
    d_updates, paper = torch.randn(40, 3, device=device).t(), codes(PAPER)
    strided = OP.lstm_unroll_backward(d_updates, None, grads, state, weights, step, *paper, True, True, True)
    plain = [t.contiguous() for t in (d_updates, grads, state)]
    dense = OP.lstm_unroll_backward(plain[0], None, plain[1], plain[2], weights, step, *paper, True, True, True)
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)
    forward = OP.lstm_unroll(grads, state, weights, step, *paper), OP.lstm_unroll(*plain[1:], weights, step, *paper)
    for a, b in zip(*forward, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needed", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_what_is_not_needed_is_empty_and_changes_nothing(device, needed):
    for config in (PAPER._replace(hidden_size=6), RNNPROP._replace(hidden_size=6), LINEAR._replace(hidden_size=6)):
        args = torch.randn(3, 40), None, make_grads(3, 40), make_state(40, config)
        args = [*args, make_weights(config), torch.tensor(1.0)]
        args = [None if t is None else placed(t, device) for t in args] + list(codes(config))
        full = OP.lstm_unroll_backward(*args, True, True, True)
        part = OP.lstm_unroll_backward(*args, *map(bool, needed))
        for a, b, need in zip(part, full, needed, strict=True):
            assert torch.equal(a, b) if need else a.numel() == 0


def test_weight_gradients_are_the_same_in_every_run(device):
    """Of more tiles than blocks take, or of several tiles."""
    config, count = (TINY, 32 * 520) if EMULATED else (PAPER, 100_003)
    args = torch.randn(2, count), None, make_grads(2, count), make_state(count, config)
    args = [*args, make_weights(config), torch.tensor(1.0)]
    there = [None if t is None else placed(t, device) for t in args]
    there += [*codes(config), False, False, True]
    runs = [OP.lstm_unroll_backward(*there)[2] for _ in range(2 if EMULATED else 5)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    expected = reference.lstm_unroll_backward(
        *(None if t is None else t.double() for t in args[:5]), args[5], *config, False, False, True
    )
    close_scaled(runs[0], expected[2])


def test_unroll_is_steps(device):
    for config in (PAPER, RNNPROP, LINEAR):
        grads, state = make_grads(3, 40).to(device), placed(make_state(40, config), device)
        weights, one = make_weights(config).to(device), torch.tensor(1.0, device=device)
        updates, last = ops.lstm_unroll(grads, state, weights, config, step=3)
        theta = torch.zeros(40, device=device)
        for t, grad in enumerate(grads):
            ops.lstm_step_([theta], [grad], [state], weights, one, [one * (3 + t)], config)
        close(theta, updates.cpu().double().sum(0))
        close(state, last.cpu().double(), 1e-5)


# ---------------------------------------------------------------- whatever may come


@settings(
    max_examples=40 if EMULATED else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the device is the same for all examples
)
@given(
    features=st.sampled_from(sorted(FEATURES)),
    hidden=st.integers(1, 64),
    layers=st.integers(1, 3),
    projection=st.booleans(),
    linear_path=st.booleans(),
    output=st.sampled_from(OUTPUTS),
    horizon=st.integers(0, 3 if EMULATED else 6),
    sizes=st.lists(st.integers(0, 70 if EMULATED else 140), min_size=1, max_size=3),
    d_last=st.booleans(),
    number=st.integers(1, 1000),
    seed=st.integers(0, 2**16),
)
def test_any_network(
    device, features, hidden, layers, projection, linear_path, output, horizon, sizes, d_last, number, seed
):
    config = Config(features, hidden, layers, projection, output, 0.1, 10.0, 0.9, 0.95, 1e-8, linear_path)
    torch.manual_seed(seed)  # an example that fails does so again
    params = [torch.randn(size) for size in sizes]
    grads = [make_grads(size, seed=seed + i).clamp(-1, 1) for i, size in enumerate(sizes)]
    states = [make_state(size, config, seed=seed + i) for i, size in enumerate(sizes)]
    check_step(device, params, grads, states, config, number=number)
    results = unroll_both(device, config, horizon, sizes[0], d_last=d_last, seed=seed, number=number, fresh=False)
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        close_scaled(actual, expected, 5e-4)


# ---------------------------------------------------------------- as PyTorch sees them


def test_gradcheck(device):
    config = Config("both", 2, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path=True)
    grads = torch.randn(2, 2, dtype=torch.float64).to(device).requires_grad_()
    state = make_state(2, config, dtype=torch.float64)
    state[:, 1] += 0.1
    state = state.to(device).requires_grad_()
    weights = make_weights(config, dtype=torch.float64).to(device).requires_grad_()
    torch.use_deterministic_algorithms(False)
    assert torch.autograd.gradcheck(
        lambda g, s, w: ops.lstm_unroll(g, s, w, config, 2), (grads, state, weights), fast_mode=EMULATED
    )


@pytest.mark.parametrize("op", ["lstm_step_", "lstm_unroll", "lstm_unroll_backward"])
def test_opcheck(device, op):
    config = TINY._replace(features="both", projection=True, linear_path=True)
    grads = make_grads(3, 6).clamp(-1, 1).to(device)
    state, weights = make_state(6, config).to(device), make_weights(config).to(device)
    one, fields = torch.tensor(1.0, device=device), codes(config)
    if op == "lstm_step_":
        args = ([torch.zeros(6, device=device)], [grads[0]], [state], weights, one, [one], *fields, 0.01, False)
    elif op == "lstm_unroll":
        args = (grads.requires_grad_(), state.requires_grad_(), weights.requires_grad_(), one, *fields)
    else:
        args = (torch.randn_like(grads), None, grads, state, weights, one, *fields, True, True, True)
    torch.library.opcheck(getattr(OP, op).default, args)


def test_errors_say_what_is_wrong(device):
    one, weights = torch.tensor(1.0, device=device), make_weights(TINY).to(device)
    args = [torch.zeros(3, device=device)], [torch.zeros(4, device=device)], [ops.new_state(torch.empty(3), TINY)]
    with pytest.raises(RuntimeError, match=r"a gradient has shape \[4\], its parameter \[3\]"):
        ops.lstm_step_(args[0], args[1], [args[2][0].to(device)], weights, one, [one], TINY)
    with pytest.raises(RuntimeError, match="weights must be a vector"):
        OP.lstm_unroll(torch.zeros(2, 3, device=device), args[2][0].to(device), weights[1:], one, *codes(TINY))


@pytest.mark.parametrize(
    "config",
    [RNNPROP, LINEAR, overflow.CONFIG, overflow.CONFIG._replace(hidden_size=5), IDENTITY._replace(linear_path=True)],
    ids=config_id,
)
@pytest.mark.parametrize(("dtype", "state_dtype"), overflow.DTYPES)
def test_gradients_too_large_for_a_finite_state_are_not_finite(device, config, dtype, state_dtype):
    overflow.check_step(OP.lstm_step_, config, dtype, state_dtype, device, size=35)
    overflow.check_unroll(OP.lstm_unroll, OP.lstm_unroll_backward, config, dtype, state_dtype, device, size=35)
