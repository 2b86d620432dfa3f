"""lstm_step_ against the reference in float64."""

import itertools

import overflow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    CONFIGS,
    IDENTITY,
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

from l2l_fast import _native, ops, reference
from l2l_fast.config import FEATURES, OUTPUTS, Config, state_size

# One below, at and above the widths of every tile: 2 to 64 coordinates.
SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 100_003]


def test_kernel_is_what_runs(isa):
    assert _native.build_info()["native"]
    assert _native.build_info()["cpu_isa"] == isa


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_sizes(isa, config, size):
    param, grad, state = torch.randn(size), make_grads(size), make_state(size, config)
    params, states = step_both([param], [grad], [state], config)
    close(param, params[0])
    close(state, states[0])


def test_a_million_and_three():
    """Step and unroll; coordinates are independent, so the reference runs on some and on the ragged end."""
    size, step = 1_000_003, torch.tensor(3.0)
    some = torch.cat([torch.randint(size, (2000,), generator=torch.Generator().manual_seed(0)), torch.arange(-70, 0)])
    param, grad, state, weights = torch.zeros(size), make_grads(size), make_state(size, PAPER), make_weights(PAPER)
    updates, last = ops.lstm_unroll(grad[None], state, weights, PAPER, step=3)
    few = state[some].double()
    wanted, wanted_last = reference.lstm_unroll(grad[None, some].double(), few, weights.double(), step, *PAPER)
    close(updates[:, some], wanted)
    close(last[some], wanted_last)
    ops.lstm_step_([param], [grad], [state], weights, torch.tensor(1.0), [step], PAPER)
    close(param[some], wanted[0])
    close(state[some], wanted_last)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_options(isa, config):
    param, grad, state = torch.randn(70), make_grads(70), make_state(70, config)
    grad = grad.clamp(-1, 1)
    params, states = step_both([param], [grad], [state], config, weight_decay=0.3, maximize=True)
    close(param, params[0])
    close(state, states[0])


@settings(max_examples=60, deadline=None)
@given(
    features=st.sampled_from(sorted(FEATURES)),
    hidden=st.integers(1, 64),
    layers=st.integers(1, 3),
    projection=st.booleans(),
    linear_path=st.booleans(),
    output=st.sampled_from(OUTPUTS),
    sizes=st.lists(st.integers(0, 140), max_size=4),
    number=st.integers(1, 1000),
    seed=st.integers(0, 2**16),
)
def test_any_network_and_group(features, hidden, layers, projection, linear_path, output, sizes, number, seed):
    config = Config(features, hidden, layers, projection, output, 0.1, 10.0, 0.9, 0.95, 1e-8, linear_path)
    torch.manual_seed(seed)  # an example that fails does so again
    params = [torch.randn(size) for size in sizes]
    grads = [make_grads(size, seed=seed + i).clamp(-1, 1) for i, size in enumerate(sizes)]
    states = [make_state(size, config, seed=seed + i) for i, size in enumerate(sizes)]
    expected = step_both(params, grads, states, config, number=number)
    for actual, wanted in zip(params + states, expected[0] + expected[1], strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("grad_like_param", [True, False])
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa, layout, canonical, grad_like_param):
    param = LAYOUTS[layout]()
    grad = torch.empty_like(param) if grad_like_param else torch.empty(param.shape)
    grad.copy_(make_grads(*param.shape))
    state = ops.new_state(param, PAPER) if canonical else torch.empty(*param.shape, state_size(PAPER))
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9))
    params, states = step_both([param], [grad], [state], PAPER)
    close(param, params[0])
    close(state, states[0])


def test_neighbours_in_memory_stay():
    whole = torch.randn(12, 14)
    before, window = whole.clone(), whole[2:9, 3:11]
    state = ops.new_state(window, PAPER)
    step_both([window], [torch.randn(window.shape)], [state], PAPER)
    changed = whole != before
    assert changed[2:9, 3:11].all()
    changed[2:9, 3:11] = False
    assert not changed.any()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(isa, param_dtype, grad_dtype, state_dtype):
    param, grad = torch.randn(99).to(param_dtype), make_grads(99).to(grad_dtype)
    state = make_state(99, PAPER, dtype=state_dtype)
    params, states = step_both([param], [grad], [state], PAPER)
    # Half a unit in the last place of what is stored, over the float32 arithmetic.
    close(param, params[0], rtol=2e-5 + torch.finfo(param_dtype).eps / 2)
    close(state, states[0], rtol=2e-5 + torch.finfo(state_dtype).eps / 2)


def test_a_float64_parameter_is_not_rounded_to_float32():
    param, state = torch.full((3,), 1.0 + 2.0**-40, dtype=torch.float64), make_state(3, PAPER)
    before = param.clone()
    ops.lstm_step_(
        [param], [torch.ones(3)], [state], make_weights(PAPER), torch.tensor(0.0), [torch.tensor(1.0)], PAPER
    )
    assert torch.equal(param, before)


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
@pytest.mark.parametrize("size", [1, 64, 65])
def test_gradients_that_are_not_finite_change_nothing(isa, config, size):
    for bad in (float("nan"), float("inf"), float("-inf")):
        param, grad, state = torch.randn(size), make_grads(size), make_state(size, config)
        grad[0] = bad
        before = param.clone(), state.clone()
        params, states = step_both([param], [grad], [state], config, weight_decay=0.1)
        assert torch.equal(param[0], before[0][0])
        assert torch.equal(state[0], before[1][0])
        close(param, params[0])
        close(state, states[0])


def test_a_nan_in_the_weights_is_seen(isa):
    weights = make_weights(PAPER)
    weights[100] = float("nan")
    param, state = torch.zeros(5), make_state(5, PAPER)
    ops.lstm_step_([param], [torch.ones(5)], [state], weights, torch.tensor(1.0), [torch.tensor(1.0)], PAPER)
    assert param.isnan().all()


def test_float64_weights_give_float64():
    param, grad = torch.randn(33, dtype=torch.float64), make_grads(33, dtype=torch.float64)
    state = make_state(33, PAPER, dtype=torch.float64)
    weights = make_weights(PAPER, dtype=torch.float64)
    params, states = step_both([param], [grad], [state], PAPER, weights=weights, lr=0.5)
    close(param, params[0], rtol=1e-9, atol=1e-11)
    close(state, states[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps(isa, config, state_dtype):
    """The state is a fading memory, so errors do not pile up: the run stays with that in float64."""
    curvature = torch.logspace(-2, 1, 50)
    theta = torch.linspace(-1, 1, 50)
    state = ops.new_state(theta, config, state_dtype)
    theta64, state64 = theta.double(), state.double()
    weights = make_weights(config)
    for number in range(1, 1001):
        step = [torch.tensor(float(number))]
        # Both get the gradient of the float64 run: two chaotic runs would part however small the errors.
        grad = (curvature * theta64).float()
        ops.lstm_step_([theta], [grad], [state], weights, torch.tensor(0.01), step, config)
        reference.lstm_step_(
            [theta64],
            [grad.double()],
            [state64],
            weights.double(),
            torch.tensor(0.01).double(),
            step,
            *config,
            0.0,
            False,
        )
    tolerance = 1e-4 if state_dtype is torch.float32 else 2e-2
    torch.testing.assert_close(theta.double(), theta64, rtol=tolerance, atol=tolerance)
    if state_dtype is torch.float32:
        close(state, state64, rtol=1e-3, atol=1e-4)


def test_many_tensors_give_what_one_does(isa):
    whole, grad, state = torch.randn(1000), make_grads(1000), make_state(1000, PAPER)
    cuts = [0, 1, 4, 60, 300, 301, 1000]
    pieces = list(itertools.pairwise(cuts))
    params = [whole[a:b].clone() for a, b in pieces]
    states = [state[a:b].clone() for a, b in pieces]
    weights, lr, one = make_weights(PAPER), torch.tensor(1.0), torch.tensor(1.0)
    ops.lstm_step_(params, [grad[a:b] for a, b in pieces], states, weights, lr, [one] * len(pieces), PAPER)
    ops.lstm_step_([whole], [grad], [state], weights, lr, [one], PAPER)
    assert torch.equal(torch.cat(params), whole)
    assert torch.equal(torch.cat(states), state)


def test_threads_do_not_matter():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        param, grad, state = torch.ones(20_000), make_grads(20_000), make_state(20_000, PAPER)
        step_both([param], [grad], [state], PAPER)
        results.append((param, state))
    torch.set_num_threads(before)
    assert all(torch.equal(r[0], results[0][0]) and torch.equal(r[1], results[0][1]) for r in results)


@pytest.mark.parametrize(
    "config", [RNNPROP, LINEAR, overflow.CONFIG, IDENTITY, IDENTITY._replace(linear_path=True)], ids=config_id
)
@pytest.mark.parametrize(("dtype", "state_dtype"), overflow.DTYPES)
def test_gradients_too_large_for_a_finite_state_are_not_finite(isa, config, dtype, state_dtype):
    op = torch.ops.l2l_fast
    overflow.check_step(op.lstm_step_, config, dtype, state_dtype)
    overflow.check_unroll(op.lstm_unroll, op.lstm_unroll_backward, config, dtype, state_dtype)
