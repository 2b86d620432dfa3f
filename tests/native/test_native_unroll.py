"""lstm_unroll and its backward against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CONFIGS, LINEAR, PAPER, RNNPROP, config_id, make_grads, make_state, make_weights

from l2l_fast import ops, reference
from l2l_fast.arguments import codes
from l2l_fast.config import FEATURES, OUTPUTS, Config

SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1003]


def close(actual, expected, tolerance=5e-5):
    """Within the tolerance of each element or of the tensor's own scale."""
    scale = expected.abs().mean().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale + 1e-12)


def both(config, horizon, count, *, d_last=True, seed=0, number=2, grads=None, dtype=torch.float32, state_dtype=None,
         fresh=True):  # fmt: skip
    """(updates, last, d_grads, d_state, d_weights) of the kernel and of the float64 reference."""
    weights = make_weights(config, seed, dtype)
    grads = make_grads(horizon, count, seed=seed, dtype=dtype).clamp(-1, 1) if grads is None else grads
    state = make_state(count, config, seed, state_dtype or dtype, fresh=fresh)
    generator = torch.Generator().manual_seed(seed)
    d_updates = torch.randn(horizon, count, generator=generator, dtype=dtype)
    d_last = torch.randn(state.shape, generator=generator).to(state.dtype) if d_last else None
    step = torch.tensor(float(number))
    op = torch.ops.l2l_fast
    actual = (
        *op.lstm_unroll(grads, state, weights, step, *codes(config)),
        *op.lstm_unroll_backward(d_updates, d_last, grads, state, weights, step, *codes(config), True, True, True),
    )
    double = [None if t is None else t.double() for t in (d_updates, d_last, grads, state, weights)]
    expected = (
        *reference.lstm_unroll_forward(*double[2:], step, *config),
        *reference.lstm_unroll_backward(*double, step, *config, True, True, True),
    )
    return actual, expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_sizes(isa, config, size):
    for actual, expected in zip(*both(config, 3, size), strict=True):
        close(actual, expected, 2e-4)


@pytest.mark.parametrize("count", [1, 64, 65, 1003])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_coordinates_whose_updates_have_no_gradient_are_left_out(isa, config, share, count):
    generator = torch.Generator().manual_seed(0)
    left_out = torch.rand(count, generator=generator) < share
    d_updates = torch.randn(4, count, generator=generator).masked_fill(left_out, 0)
    d_updates[0, ~left_out] = 0  # a gradient at one step is enough
    weights, grads, state = make_weights(config), make_grads(4, count).clamp(-1, 1), make_state(count, config)

    def d_weights(backward, *tensors):
        *tensors, weights = tensors
        step = torch.tensor(2.0)
        return backward(tensors[0], None, *tensors[1:], weights, step, *codes(config), False, False, True)[2]

    op = torch.ops.l2l_fast.lstm_unroll_backward
    actual = d_weights(op, d_updates, grads, state, weights)
    tensors = (d_updates.double(), grads.double(), state.double(), weights.double())
    close(actual, d_weights(reference.lstm_unroll_backward, *tensors), 2e-4)
    kept = ~left_out
    assert torch.equal(actual, d_weights(op, d_updates[:, kept], grads[:, kept], state[kept], weights))


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_options(isa, config):
    for actual, expected in zip(*both(config, 3, 37), strict=True):
        close(actual, expected, 3e-4)


@settings(max_examples=60, deadline=None)
@given(
    features=st.sampled_from(sorted(FEATURES)),
    hidden=st.integers(1, 64),
    layers=st.integers(1, 3),
    projection=st.booleans(),
    linear_path=st.booleans(),
    output=st.sampled_from(OUTPUTS),
    horizon=st.integers(0, 6),
    count=st.integers(0, 140),
    d_last=st.booleans(),
    number=st.integers(1, 1000),
    seed=st.integers(0, 2**16),
)
def test_any_network_and_truncation(
    features, hidden, layers, projection, linear_path, output, horizon, count, d_last, number, seed
):
    config = Config(features, hidden, layers, projection, output, 0.1, 10.0, 0.9, 0.95, 1e-8, linear_path)
    results = both(config, horizon, count, d_last=d_last, seed=seed, number=number, fresh=False)
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        close(actual, expected, 5e-4)


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_a_long_truncation(isa, config):
    """Tiles become narrower, so that a truncation stays in cache."""
    for actual, expected in zip(*both(config, 200, 70), strict=True):
        close(actual, expected, 5e-4)


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
@pytest.mark.parametrize("size", [5, 70])
def test_gradients_that_are_not_finite(isa, config, size):
    grads = make_grads(5, size)
    grads[0, 0], grads[2, 3], grads[4, 3], grads[3, 4] = float("nan"), float("inf"), float("-inf"), float("nan")
    actual, expected = both(config, 5, size, grads=grads)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 2e-4)
    assert actual[0][0, 0] == 0
    assert actual[2][2, 3] == 0


def test_float64_is_exact(isa):
    for config in (PAPER, RNNPROP, LINEAR, PAPER._replace(features="both", projection=True)):
        for actual, expected in zip(*both(config, 4, 11, dtype=torch.float64), strict=True):
            close(actual, expected, 1e-9)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float64])
def test_state_dtypes(isa, state_dtype):
    (updates, last, *gradients), (updates64, last64, *gradients64) = both(PAPER, 4, 70, state_dtype=state_dtype)
    close(updates, updates64)
    assert last.dtype == gradients[1].dtype == state_dtype
    torch.testing.assert_close(last.double(), last64, rtol=torch.finfo(state_dtype).eps + 1e-4, atol=1e-5)
    close(gradients[2], gradients64[2])


def test_strides_are_free(isa):
    """Every matrix transposed, or a window of a larger one."""
    grads, state = make_grads(70, 5).t(), torch.empty(70, 80).uniform_(-0.9, 0.9)
    d_updates, d_last = torch.randn(5, 200)[:, ::2][:, :70], torch.randn(80, 90)[:, :70].t()
    weights, step = torch.stack([make_weights(PAPER)] * 2, 1)[:, 0], torch.tensor(1.0)
    args = (codes(PAPER), (True, True, True))
    outputs = [
        torch.ops.l2l_fast.lstm_unroll_backward(*tensors, step, *args[0], *args[1])
        for tensors in (
            (d_updates, d_last, grads, state, weights),
            [t.contiguous() for t in (d_updates, d_last, grads, state, weights)],
        )
    ]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        ops.lstm_unroll(grads, state, weights, PAPER)[0], ops.lstm_unroll(grads.contiguous(), state, weights, PAPER)[0]
    )


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
@pytest.mark.parametrize("size", [10, 5003])
def test_weight_gradients_are_the_same_for_any_number_of_threads(isa, config, size):
    grads, state, weights = make_grads(7, size), make_state(size, config), make_weights(config)
    d_updates, before, found = torch.randn(7, size), torch.get_num_threads(), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(ops.lstm_unroll_backward(d_updates, None, grads, state, weights, config, torch.tensor(1.0))[2])
    torch.set_num_threads(before)
    assert all(torch.equal(d_weights, found[0]) for d_weights in found)


@pytest.mark.parametrize("needed", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_what_is_not_needed_is_empty_and_changes_nothing(needed):
    for config in (PAPER, RNNPROP, LINEAR):
        args = torch.randn(3, 40), None, make_grads(3, 40), make_state(40, config), make_weights(config)
        args = (*args, torch.tensor(1.0), *codes(config))
        full = torch.ops.l2l_fast.lstm_unroll_backward(*args, True, True, True)
        part = torch.ops.l2l_fast.lstm_unroll_backward(*args, *map(bool, needed))
        for a, b, need in zip(part, full, needed, strict=True):
            assert torch.equal(a, b) if need else a.numel() == 0


def test_unroll_is_steps(isa):
    for config in (PAPER, RNNPROP, LINEAR):
        grads, state, weights = make_grads(4, 70), make_state(70, config), make_weights(config)
        updates, last = ops.lstm_unroll(grads, state, weights, config, step=3)
        theta = torch.zeros(70)
        for t, grad in enumerate(grads):
            ops.lstm_step_([theta], [grad], [state], weights, torch.tensor(1.0), [torch.tensor(3.0 + t)], config)
        close(theta, updates.double().sum(0))
        close(state, last.double(), 1e-5)


def test_gradcheck():
    config = Config("both", 3, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path=True)
    grads = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    state = make_state(5, config, dtype=torch.float64)
    state[:, 1] += 0.1
    state.requires_grad_()
    weights = make_weights(config, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda g, s, w: ops.lstm_unroll(g, s, w, config, 2), (grads, state, weights))


@pytest.mark.parametrize("config", [PAPER, LINEAR], ids=["paper", "linear"])
@pytest.mark.parametrize("op", ["lstm_unroll", "lstm_unroll_backward"])
def test_opcheck(op, config):
    grads, state, weights = make_grads(3, 6).clamp(-1, 1), make_state(6, config), make_weights(config)
    if op == "lstm_unroll":
        args = (grads.requires_grad_(), state.requires_grad_(), weights.requires_grad_(), torch.tensor(1.0))
        args += codes(config)
    else:
        args = torch.randn(3, 6), None, grads, state, weights, torch.tensor(1.0), *codes(config), True, True, True
    torch.library.opcheck(getattr(torch.ops.l2l_fast, op).default, args)
