"""The step on the matrix units: both of its kernels, at every hidden size, against the reference in float64."""

import os

import pytest
import torch
from problems import LINEAR, PAPER, RNNPROP, make_grads, make_state, make_weights
from test_parity import check_rounded_step, check_step, step_both

from l2l_fast import ops, reference
from l2l_fast.config import Config, split_weights, state_size

pytestmark = [] if os.environ.get("L2L_FAST_EMULATED") else [pytest.mark.cuda]

# Up to five tiles of 32 for each multiprocessor go to teams of warps. The emulator has two, so the larger count gives
# each warp of the persistent grid one tile or two, a GPU's takes the other kernel.
TEAMS, STREAMS = 70, 1000 if os.environ.get("L2L_FAST_EMULATED") else 300_001
both_kernels = pytest.mark.parametrize("count", [TEAMS, STREAMS])
both_states = pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])


def problem(config, count, state_dtype=torch.float32, seed=0):
    grad = make_grads(count, seed=seed).clamp(-1, 1)
    return [torch.randn(count)], [grad], [make_state(count, config, dtype=state_dtype, seed=seed + 1)]


def rounding(dtype):
    return 2e-5 + torch.finfo(dtype).eps / 2


@both_kernels
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("hidden", [4, 8, 12, 16, 20, 32])
def test_every_size(device, hidden, layers, projection, count):
    features, output = ("both", "tanh") if hidden % 8 else ("identity", "linear")
    linear_path = (layers + projection) % 2 == 0
    config = Config(features, hidden, layers, projection, output, 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path)
    check_step(device, *problem(config, count), config, weight_decay=0.3, maximize=True)


@both_kernels
@both_states
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
@pytest.mark.parametrize("rest", [-1, 0, 1, 4])
def test_around_whole_tiles(device, config, count, state_dtype, rest):
    count = count // 32 * 32 + rest
    check_rounded_step(device, *problem(config, count, state_dtype), config)


@both_states
@pytest.mark.parametrize("tiles", [24, 25, 73])
def test_warps_of_several_tiles_prefetch_the_right_ones(device, tiles, state_dtype):
    """Tensors that end within and between tiles; the emulator's grid is of 24 warps."""
    sizes = [32 * tiles - 200, 1, 31, 64, 100]
    problems = [problem(PAPER, size, state_dtype, seed) for seed, size in enumerate(sizes)]
    params, grads, states = ([one[k][0] for one in problems] for k in range(3))
    check_rounded_step(device, params, grads, states, PAPER)


@both_kernels
def test_states_of_both_dtypes_in_one_group(device, count):
    first, second = problem(PAPER, count), problem(PAPER, count, torch.bfloat16)
    check_rounded_step(device, *(a + b for a, b in zip(first, second, strict=True)), PAPER)


@both_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_and_gradients(device, count, dtype):
    params, grads, states = problem(RNNPROP, count)
    found = step_both(device, [params[0].to(dtype)], [grads[0].to(dtype)], states, RNNPROP, weight_decay=0.1)
    (params, states), (params64, states64) = found
    torch.testing.assert_close(params[0].cpu().double(), params64[0], rtol=rounding(dtype), atol=2e-6)
    torch.testing.assert_close(states[0].cpu().double(), states64[0], rtol=2e-5, atol=2e-6)


@both_kernels
@both_states
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_gradients_that_are_not_finite_change_nothing(device, config, state_dtype, count):
    params, grads, states = problem(config, count, state_dtype)
    bad = [0, 3, 31, 33, count - 1]
    grads[0][bad] = torch.tensor([float("nan"), float("inf"), float("-inf"), float("nan"), float("nan")])
    found = check_rounded_step(device, params, grads, states, config, weight_decay=0.1)
    assert torch.equal(found[0][0][bad].cpu(), params[0][bad])
    assert torch.equal(found[1][0][bad].cpu(), states[0][bad])


def test_a_state_that_is_not_aligned_takes_the_general_kernel(device):
    state = torch.empty(71 * state_size(PAPER) + 1)[1:].view(state_size(PAPER), 71).t()
    state.uniform_(-0.9, 0.9)
    check_step(device, [torch.randn(71)], [make_grads(71)], [state], PAPER)


@both_kernels
@pytest.mark.parametrize("hidden", [12, 20])
def test_large_features(device, hidden, count):
    """Ratios of the moments in the hundreds, so that plain float32 is off by up to half of the usual tolerance as well.

    The matrix units cut their sums where float32 rounds them: three times its largest error is allowed.
    """
    config = RNNPROP._replace(features="both", hidden_size=hidden)
    params, grads, states = problem(config, count)
    states[0][:, 1] *= 1e-5
    plain = params[0].clone(), states[0].clone()
    (_, found), (_, expected) = step_both(device, params, grads, states, config)
    number, lr = torch.tensor(3.0), torch.tensor(0.7)
    reference.lstm_step_([plain[0]], grads, [plain[1]], make_weights(config), lr, [number], *config, 0.0, False)
    own = (plain[1].double() - expected[0]).abs().max().item()
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=5e-5, atol=max(5e-6, 3 * own))


@both_kernels
@pytest.mark.parametrize("size", [1e5, 1e9, 1e30])
def test_factors_beyond_float16(device, size, count):
    """The small products are formed in float16; what it cannot hold leaves tf32's accuracy and no infinity."""
    config = PAPER._replace(features="identity")
    params, grads, states = problem(config, count)
    weights = make_weights(config)
    rows = split_weights(weights, config)["weight_ih_l0"]
    rows /= size
    grads[0] *= size
    found, expected = step_both(device, params, grads, states, config, weights=weights)
    torch.testing.assert_close(found[1][0].cpu().double(), expected[1][0], rtol=1e-3, atol=3e-4)
    rows *= size * 1e6
    found, _ = step_both(device, params, grads, states, config, weights=weights)
    assert found[0][0].isfinite().all()
    assert found[1][0].isfinite().all()


def test_a_coordinate_does_not_depend_on_its_place(device):
    """Wherever in a tile it stands, and from either kernel."""
    params, grads, states = problem(PAPER, STREAMS)
    found, _ = step_both(device, params, grads, states, PAPER)
    for first, last in [(0, 64), (64, 101), (STREAMS // 64 * 64, STREAMS)]:
        state = ops.new_state(params[0][first:last], PAPER).copy_(states[0][first:last])
        some, _ = step_both(device, [params[0][first:last]], [grads[0][first:last]], [state], PAPER)
        torch.testing.assert_close(some[0][0], found[0][0][first:last], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(some[1][0], found[1][0][first:last], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("hidden", [4, 8, 12, 16, 20, 32])
def test_unroll_of_every_size(device, hidden, layers, projection, steps):
    features, output = ("both", "tanh") if hidden % 8 else ("log_sign", "linear")
    linear_path = (layers + projection) % 2 == 0
    config = Config(features, hidden, layers, projection, output, 0.1, 10.0, 0.95, 0.95, 1e-8, linear_path)
    found, expected = unroll(device, config, make_grads(steps, 45).clamp(-1, 1))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_unroll_skips_gradients_that_are_not_finite(device, config):
    grads = make_grads(5, 400)
    grads[1, [0, 3, 31]], grads[2, 40], grads[4, 399] = float("nan"), float("inf"), float("-inf")
    found, expected = unroll(device, config, grads)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=2e-5, atol=2e-6)
    assert found[0][1, 3] == 0


def unroll(device, config, grads):
    """Updates and last state, the kernel's and the float64 reference's."""
    state, weights, step = make_state(grads.shape[1], config), make_weights(config), torch.tensor(3.0)
    wanted = reference.lstm_unroll(grads.double(), state.double(), weights.double(), step.double(), *config)
    placed = [tensor.to(device) for tensor in (grads, state, weights)]
    return ops.lstm_unroll(*placed, config, step.to(device)), wanted
