"""lstm_step_scaled_ on CUDA: five launches for a group, against the reference in float64."""

import pytest
import torch
from problems import LAYOUTS, LINEAR, PAPER, RNNPROP, make_grads, make_state, make_weights
from scaled import RMS, expected, expected_sizes, of_all_kinds, sizes, step
from test_parity import EMULATED, SIZES, close, placed

from l2l_fast import arguments, normalize, ops
from l2l_fast.config import state_size

pytestmark = [] if EMULATED else [pytest.mark.cuda]
CHUNK = 8192  # of scaled.cu
SLOW = 25 if EMULATED else 1


def check(device, param, grad, state, config, rtol=2e-5, **options):
    wanted = expected(param, grad, state, config, **options)
    found = [placed(tensor, device) for tensor in (param, grad, state)]
    slow = [v.clone().to(device) for v in options.pop("slow", ())]
    step(*([tensor] for tensor in found), config, slow=slow, **options)
    close(found[0], wanted[0], rtol=rtol, atol=4e-6)
    close(found[2], wanted[1])
    for v, after in zip(slow, wanted[2:], strict=True):
        close(v, after)
    return [*found, *slow]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "maximize": True}], ids=["plain", "decay"])
@pytest.mark.parametrize("size", [*SIZES, CHUNK // SLOW + 1])
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_sizes(device, config, size, options):
    check(device, torch.randn(size), make_grads(size), make_state(size, config), config, **options)


def test_a_tensor_of_several_chunks(device):
    """One unit, so that the emulator can bear it."""
    config = RNNPROP._replace(hidden_size=1, num_layers=1)
    size = 2 * CHUNK + 77
    check(device, torch.randn(size), make_grads(size), make_state(size, config), config, weight_decay=0.1)


@pytest.mark.parametrize("before", [0.0, 1e-9, 3.0])
@pytest.mark.parametrize("size", [*(size for size in SIZES if size), CHUNK // SLOW + 1])
@pytest.mark.parametrize("config", [RNNPROP, LINEAR], ids=["rnnprop", "linear"])
def test_sizes_of_updates_that_follow_the_gradients(device, config, size, before):
    for most, maximize in ((2 * RMS, False), (6.0, True)):
        options = {"slow": [torch.tensor(before)], "most": most, "maximize": maximize, "weight_decay": 0.1}
        check(device, torch.randn(size), make_grads(size), make_state(size, config), config, **options)


def test_they_follow_all_chunks_of_a_tensor(device):
    config = RNNPROP._replace(hidden_size=1, num_layers=1)
    size = 2 * CHUNK + 77
    options = {"slow": [torch.tensor(1e-4)], "most": 6.0}
    check(device, torch.randn(size), make_grads(size), make_state(size, config), config, **options)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_follow_strided_gradients_of_any_dtype(device, layout, dtype, canonical):
    param = LAYOUTS[layout]()
    grad = torch.empty(param.shape).copy_(make_grads(*param.shape)).to(dtype)
    state = ops.new_state(param, LINEAR) if canonical else torch.empty(*param.shape, state_size(LINEAR))
    state.copy_(torch.empty(state.shape).uniform_(0, 0.9))
    check(device, param, grad, state, LINEAR, slow=[torch.tensor(1e-3)], most=10.0)


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_what_the_gradients_were(device, worst):
    grad, v = make_grads(70), torch.tensor(1e-3)
    grad[::7] = worst
    *_, after = check(device, torch.randn(70), grad, make_state(70, LINEAR), LINEAR, slow=[v], most=10.0)
    torch.testing.assert_close(after.cpu() / (1 - 0.999**3), v / (1 - 0.999**2))


def test_a_gradient_of_nothing_moves_nothing(device):
    param = torch.randn(20)
    options = {"slow": [torch.tensor(0.0)], "most": 10.0}
    found, *_, v = check(device, param, torch.zeros(20), make_state(20, LINEAR), LINEAR, **options)
    assert v == 0
    assert torch.equal(found.cpu(), param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_alone_are_those_of_the_scaled_step(device, dtype):
    """Of tensors of all kinds at once, one with an expanded gradient; states are read only."""
    given = [[placed(tensor, device) for tensor in tensors] for tensors in of_all_kinds(LINEAR, dtype)]
    params, grads, states, slow = given
    grads[0] = grads[0].mean().expand(grads[0].shape)
    before = [state.clone() for state in states]
    wanted, after = expected_sizes(grads, states, LINEAR, slow, 9.0)
    close(sizes(params, grads, states, LINEAR, slow, 9.0), wanted)
    close(torch.stack(slow), after)
    assert all(torch.equal(one, two) for one, two in zip(states, before, strict=True))


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, layout, canonical):
    param = LAYOUTS[layout]()
    grad = torch.empty(param.shape).copy_(make_grads(*param.shape))
    state = ops.new_state(param, PAPER) if canonical else torch.empty(*param.shape, state_size(PAPER))
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9))
    check(device, param, grad, state, PAPER, weight_decay=0.1)


@pytest.mark.parametrize("slow", [[], [torch.tensor(1e-3)]], ids=["one size", "own sizes"])
def test_more_dimensions_than_an_entry_holds(device, slow):
    """The sums and moves are then of several entries; the root mean square is of the whole."""
    param = torch.randn(2, 3, 2, 3, 2, 3).permute(5, 1, 3, 0, 4, 2)[:, ::2, :, :, :, ::2]
    grad = make_grads(*param.shape)
    grad = grad.permute(3, 1, 5, 0, 4, 2).contiguous().permute(3, 1, 5, 0, 4, 2)
    state = make_state(param.numel(), LINEAR).reshape(*param.shape, -1)
    check(device, param, grad, state, LINEAR, weight_decay=0.1, slow=slow, most=6.0)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(device, param_dtype, state_dtype):
    param, state = torch.randn(99).to(param_dtype), make_state(99, PAPER).to(state_dtype)
    grad, weights = make_grads(99), make_weights(PAPER)
    wanted, _ = expected(param, grad, state, PAPER, weights=weights, weight_decay=0.1)
    found = [placed(tensor, device) for tensor in (param, grad, state)]
    step(*([tensor] for tensor in found), PAPER, weights=weights, weight_decay=0.1)
    # bfloat16 states have the kernels of half precision products.
    rtol = torch.finfo(param_dtype).eps / 2 + (2e-5 if state_dtype == torch.float32 else 2e-2)
    close(found[0], wanted, rtol=rtol, atol=4e-6 if state_dtype == torch.float32 else 2e-2)


def test_float64_throughout(device):
    param, grad = torch.randn(33, dtype=torch.float64), make_grads(33, dtype=torch.float64)
    state, weights = make_state(33, PAPER, dtype=torch.float64), make_weights(PAPER, dtype=torch.float64)
    wanted = expected(param, grad, state, PAPER, lr=0.5, weights=weights, weight_decay=0.1)
    found = [placed(tensor, device) for tensor in (param, grad, state)]
    step(*([tensor] for tensor in found), PAPER, lr=0.5, weights=weights, weight_decay=0.1)
    close(found[0], wanted[0], rtol=1e-9, atol=1e-11)
    close(found[2], wanted[1], rtol=1e-9, atol=1e-11)


def test_what_is_not_finite_keeps_its_value_and_counts_as_0(device):
    param, grad, state = torch.randn(70), make_grads(70), make_state(70, PAPER)
    grad[::7] = float("nan")
    found = check(device, param, grad, state, PAPER, weight_decay=0.3)
    assert torch.equal(found[0].cpu()[::7], param[::7])
    assert torch.equal(found[2].cpu()[::7], state[::7])


def test_an_update_of_0_leaves_only_weight_decay(device):
    param, weights = torch.randn(40), torch.zeros_like(make_weights(PAPER))
    found = placed(param, device)
    parts = [placed(make_grads(40), device)], [placed(make_state(40, PAPER), device)]
    step([found], *parts, PAPER, lr=0.5, weights=weights, weight_decay=0.1)
    torch.testing.assert_close(found.cpu(), param * 0.95)


def test_a_nan_in_the_weights_is_seen(device):
    weights = make_weights(PAPER)
    weights[100] = float("nan")
    param = torch.zeros(5, device=device)
    step([param], [torch.ones(5, device=device)], [make_state(5, PAPER).to(device)], PAPER, weights=weights)
    assert param.isnan().all()


@pytest.mark.parametrize("own_sizes", [False, True])
def test_many_tensors_of_all_kinds_give_what_each_alone_does(device, own_sizes):
    """More than one table holds, with and without a common memory order; bit for bit, and again."""
    shapes = [(1 + i % 5, 3) for i in range(120 if EMULATED else 1200)] + [(0,), (), (7, 9)]

    def made():
        params = [torch.ones(shape, device=device) for shape in shapes]
        params[3::4] = [torch.ones(shape[::-1], device=device).T for shape in shapes[3::4]]
        grads = [placed(make_grads(*shape, seed=i), device) for i, shape in enumerate(shapes)]
        slow = [torch.tensor(0.0, device=device) for _ in params] if own_sizes else []
        return params, grads, [ops.new_state(param, RNNPROP) for param in params], slow

    options = {"weight_decay": 0.1, "most": 2 * RMS}
    *parts, slow = made()
    step(*parts, RNNPROP, slow=slow, **options)
    for other in (True, False):
        *twins, squares = made()
        if other:
            step(*twins, RNNPROP, slow=squares, **options)
        else:
            for i, alone in enumerate(zip(*twins, strict=True)):
                step(*([part] for part in alone), RNNPROP, slow=squares[i : i + 1], **options)
        pairs = zip([*parts[0], *slow], [*twins[0], *squares], strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("own_sizes", [False, True])
def test_the_kernel_is_what_is_done_around_the_plain_step(device, own_sizes):
    params = [torch.randn(shape, device=device) for shape in [(3, 5), (7,), (), (40, 30)]]
    twins = [param.clone() for param in params]
    grads = [placed(make_grads(*param.shape), device) for param in params]
    states = [[ops.new_state(param, RNNPROP) for param in params] for _ in range(2)]
    squares = [[torch.full((), 1e-3, device=device) for _ in params] for _ in range(2)] if own_sizes else [[], []]
    step(params, grads, states[0], RNNPROP, weight_decay=0.1, slow=squares[0], most=6.0)
    weights, lr = make_weights(RNNPROP).to(device), torch.tensor(0.7, device=device)
    steps = [torch.tensor(3.0, device=device)] * 4
    call = twins, grads, states[1], weights, lr, steps, *arguments.codes(RNNPROP), 0.1, False
    updates = normalize.raw_updates(torch.ops.l2l_fast.lstm_step_, *call)
    sizes = RMS
    if own_sizes:
        sizes = normalize.update_sizes_(grads, states[1], squares[1], steps, RNNPROP, RMS, 6.0)
    normalize.move_(twins, updates, lr, sizes, 0.1)
    pairs = zip([*params, *states[0], *squares[0]], [*twins, *states[1], *squares[1]], strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)
