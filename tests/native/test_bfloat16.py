"""The step's products in bfloat16, for who asks for them: how far they are from the reference in float64."""

import pytest
import torch
from problems import (
    CONFIGS,
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
from test_loading import PRINT, run

from l2l_fast import _native, ops, reference
from l2l_fast.arguments import codes

ALL = ("amx_bf16", "avx512_bf16")
# bfloat16 keeps eight bits: a weight and an activation are each wrong by 2^-9 of themselves at most.
TOLERANCE = 2e-2


@pytest.fixture(params=ALL, autouse=True)
def name(request):
    """Every mode that this machine can run."""
    before = _native.extension.cpu_isa()
    try:
        _native.extension.use_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _native.extension.use_cpu_isa(before)


def near(actual, expected):
    """Within the tolerance of the largest value, but never closer than it to 1: gates and states are of that size."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE * scale)


def test_only_who_asks_gets_it(name):
    assert _native.build_info()["cpu_isa"] == name
    assert name in _native.extension.cpu_bf16_isas()
    assert name not in _native.extension.cpu_isas()
    assert f"'cpu_isa': '{name}'" in run(PRINT, L2L_FAST_CPU_ISA=name).stdout
    assert name not in run(PRINT).stdout


def test_bf16_is_the_fastest_of_them():
    _native.extension.use_cpu_isa("bf16")
    assert _native.extension.cpu_isa() == _native.extension.cpu_bf16_isas()[0]


@pytest.mark.parametrize(
    ("config", "update_error", "states_error"),
    [(PAPER, 3.5e-3, 3.5e-3), (RNNPROP, 3.5e-3, 4e-2)],
    ids=["paper", "rnnprop"],
)
def test_the_stated_error(config, update_error, states_error):
    """One step's largest errors, as csrc/README.md states them: of the largest update, and of the states."""
    for seed in range(5):
        weights = make_weights(config, seed)
        param, grad = torch.zeros(20_000), make_grads(20_000, seed=seed).clamp(-1, 1)
        state = make_state(20_000, config, seed)
        params, states = step_both([param], [grad], [state], config, weights=weights)
        assert (param - params[0]).abs().max() <= update_error * params[0].abs().max()
        assert (state - states[0]).abs().max() <= states_error


def test_opcheck():
    args = [torch.zeros(70)], [make_grads(70)], [make_state(70, PAPER)], make_weights(PAPER)
    torch.library.opcheck(
        torch.ops.l2l_fast.lstm_step_.default,
        (*args, torch.tensor(1.0), [torch.tensor(1.0)], *codes(PAPER), 0.0, False),
    )


@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 100_003])
def test_sizes(size):
    param, grad, state = torch.zeros(size), make_grads(size), make_state(size, PAPER)
    params, states = step_both([param], [grad], [state], PAPER)
    near(param, params[0])
    near(state, states[0])


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_options(config):
    param, grad, state = torch.randn(70), make_grads(70).clamp(-1, 1), make_state(70, config)
    params, states = step_both([param], [grad], [state], config, weight_decay=0.3, maximize=True)
    near(param, params[0])
    near(state, states[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_dtypes(dtype):
    param, grad, state = torch.randn(99), make_grads(99), make_state(99, PAPER, dtype=dtype)
    params, states = step_both([param], [grad], [state], PAPER)
    near(param, params[0])
    near(state, states[0])


def test_bad_numbers():
    param, grad, state = torch.randn(65), make_grads(65), make_state(65, PAPER)
    grad[0], before = float("nan"), param[0].clone()
    params, _ = step_both([param], [grad], [state], PAPER)
    assert torch.equal(param[0], before)
    near(param, params[0])
    weights = make_weights(PAPER)
    weights[100] = float("nan")
    ops.lstm_step_([param], [torch.ones(65)], [state], weights, torch.tensor(1.0), [torch.tensor(1.0)], PAPER)
    assert param.isnan().all()


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_a_thousand_steps(config):
    """On a quadratic; as in test_step.py both get the gradient of the float64 run."""
    curvature, theta = torch.logspace(-2, 1, 50), torch.linspace(-1, 1, 50)
    state, weights = ops.new_state(theta, config), make_weights(config)
    theta64, state64, lr = theta.double(), state.double(), torch.tensor(0.01)
    for number in range(1, 1001):
        step = [torch.tensor(float(number))]
        grad = (curvature * theta64).float()
        ops.lstm_step_([theta], [grad], [state], weights, lr, step, config)
        reference.lstm_step_(
            [theta64], [grad.double()], [state64], weights.double(), lr.double(), step, *config, 0.0, False
        )
    near(theta, theta64)
    near(state, state64)


def test_unrolls_stay_float32():
    weights, grads = make_weights(PAPER), make_grads(4, 33)
    state = make_state(33, PAPER)
    updates, last = ops.lstm_unroll(grads, state, weights, PAPER)
    wanted = ops.lstm_unroll(grads.double(), state.double(), weights.double(), PAPER)
    close(updates, wanted[0])
    close(last, wanted[1])
