"""lstm_step_scaled_: the step with every tensor's update scaled to one RMS, against the reference in float64."""

import pytest
import torch
from problems import LINEAR, PAPER, RNNPROP, make_grads, make_state, make_weights
from scaled import RMS, expected, expected_sizes, of_all_kinds, sizes, step
from test_native_step import LAYOUTS, SIZES, close

from l2l_fast import arguments, normalize, ops
from l2l_fast.config import state_size


def check(param, grad, state, config, rtol=2e-5, **options):
    wanted = expected(param, grad, state, config, **options)
    step([param], [grad], [state], config, **options)
    close(param, wanted[0], rtol=rtol, atol=4e-6)
    close(state, wanted[1])
    for v, after in zip(options.get("slow", ()), wanted[2:], strict=True):
        close(v, after)


SQUARES = {"none yet": 0.0, "small": 1e-9, "large": 3.0}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("before", SQUARES)
@pytest.mark.parametrize("size", [size for size in SIZES if size])
@pytest.mark.parametrize("config", [RNNPROP, LINEAR], ids=["rnnprop", "linear"])
def test_sizes_of_updates_that_follow_the_gradients(isa, config, size, before, maximize):
    for most in (2 * RMS, 6.0):
        options = {"slow": [torch.tensor(SQUARES[before])], "most": most, "maximize": maximize}
        check(torch.randn(size), make_grads(size), make_state(size, config), config, weight_decay=0.1, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_follow_strided_gradients_of_any_dtype(layout, canonical, dtype):
    param = LAYOUTS[layout]().to(torch.float64)
    grad = torch.empty(param.shape).copy_(make_grads(*param.shape)).to(dtype)
    state = ops.new_state(param, LINEAR) if canonical else torch.empty(*param.shape, state_size(LINEAR))
    state.copy_(torch.empty(state.shape).uniform_(0, 0.9))
    check(param, grad, state, LINEAR, slow=[torch.tensor(1e-3)], most=10.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_alone_are_those_of_the_scaled_step(dtype):
    """Of tensors of all kinds at once, one with an expanded gradient; states are read only."""
    params, grads, states, slow = of_all_kinds(LINEAR, dtype)
    grads[1] = grads[1].mean().expand(grads[1].shape)
    before = [state.clone() for state in states]
    wanted, after = expected_sizes(grads, states, LINEAR, slow, 9.0)
    close(sizes(params, grads, states, LINEAR, slow, 9.0), wanted)
    close(torch.stack(slow), after)
    assert all(torch.equal(one, two) for one, two in zip(states, before, strict=True))


@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_what_the_gradients_were(isa, worst):
    param, grad, state, v = torch.randn(70), make_grads(70), make_state(70, LINEAR), torch.tensor(1e-3)
    grad[::7] = worst
    known = v / (1 - 0.999**2)
    check(param, grad, state, LINEAR, slow=[v], most=10.0)
    torch.testing.assert_close(v / (1 - 0.999**3), known)


def test_a_gradient_of_nothing_leaves_the_size_of_noise():
    param, v = torch.randn(20), torch.tensor(0.0)
    check(param, torch.zeros(20), make_state(20, LINEAR), LINEAR, slow=[v], most=10.0)
    assert v == 0


@pytest.mark.parametrize(("squares", "config", "message"), [
    ([torch.tensor(0.0)], RNNPROP, "slow_squares must be empty or have one for each of the 2 parameters, got 1"),
    ([torch.tensor(0.0)] * 2, PAPER, "slow_squares must be empty for a network whose features are no moments"),
    ([torch.zeros(2)] * 2, RNNPROP, r"a slow_square must be one number in the dtype of the weights, got shape \[2\]"),
    ([torch.tensor(0.0, dtype=torch.float64)] * 2, RNNPROP, "a slow_square must be one number in the dtype of the wei"),
])  # fmt: skip
@pytest.mark.parametrize("native", [True, False])
def test_bad_squares_are_refused_before_anything_changes(native, squares, config, message):
    params, steps = [torch.zeros(3) for _ in range(2)], [torch.tensor(1.0)] * 2
    states = [make_state(3, config) for _ in params]
    op = torch.ops.l2l_fast.lstm_step_scaled_ if native else ops.REFERENCE["lstm_step_scaled_"]
    rest = torch.tensor(1.0), steps, *arguments.codes(config), 0.0, False, RMS, squares, 1.0
    with pytest.raises(RuntimeError, match=message):
        op(params, [torch.ones(3)] * 2, states, make_weights(config), *rest)
    assert not torch.stack(params).any()
    op = torch.ops.l2l_fast.lstm_update_sizes_ if native else ops.REFERENCE["lstm_update_sizes_"]
    for given, text in ((squares, message), ([], "slow_squares must be empty or have one for each of the 2")):
        with pytest.raises(RuntimeError, match=text):
            op(
                params,
                [torch.ones(3)] * 2,
                states,
                make_weights(config),
                steps,
                *arguments.codes(config),
                RMS,
                given,
                1.0,
            )


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "maximize": True}], ids=["plain", "decay"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("config", [PAPER, RNNPROP, LINEAR], ids=["paper", "rnnprop", "linear"])
def test_sizes(isa, config, size, options):
    check(torch.randn(size), make_grads(size), make_state(size, config), config, **options)


@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa, layout, canonical):
    param = LAYOUTS[layout]()
    grad = torch.empty(param.shape).copy_(make_grads(*param.shape))
    state = ops.new_state(param, PAPER) if canonical else torch.empty(*param.shape, state_size(PAPER))
    state.copy_(torch.empty(state.shape).uniform_(-0.9, 0.9))
    check(param, grad, state, PAPER, weight_decay=0.1)


def test_neighbours_in_memory_stay():
    whole = torch.randn(12, 14)
    before, window = whole.clone(), whole[2:9, 3:11]
    step([window], [torch.randn(window.shape)], [ops.new_state(window, PAPER)], PAPER)
    changed = whole != before
    assert changed[2:9, 3:11].all()
    changed[2:9, 3:11] = False
    assert not changed.any()


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(isa, param_dtype):
    param = torch.randn(99).to(param_dtype)
    rtol = 2e-5 + torch.finfo(param_dtype).eps / 2
    check(param, make_grads(99), make_state(99, PAPER), PAPER, rtol=rtol, weight_decay=0.1)


def test_float64_throughout():
    param, grad = torch.randn(33, dtype=torch.float64), make_grads(33, dtype=torch.float64)
    state, weights = make_state(33, PAPER, dtype=torch.float64), make_weights(PAPER, dtype=torch.float64)
    wanted = expected(param, grad, state, PAPER, lr=0.5, weights=weights, weight_decay=0.1)
    step([param], [grad], [state], PAPER, lr=0.5, weights=weights, weight_decay=0.1)
    close(param, wanted[0], rtol=1e-9, atol=1e-11)
    close(state, wanted[1], rtol=1e-9, atol=1e-11)


def test_what_is_not_finite_keeps_its_value_and_counts_as_0(isa):
    param, grad, state = torch.randn(70), make_grads(70), make_state(70, PAPER)
    grad[::7] = float("nan")
    before = param.clone(), state.clone()
    check(param, grad, state, PAPER, weight_decay=0.3)
    assert torch.equal(param[::7], before[0][::7])
    assert torch.equal(state[::7], before[1][::7])


def test_an_update_of_0_leaves_only_weight_decay():
    param, weights = torch.randn(40), torch.zeros_like(make_weights(PAPER))
    before = param.clone()
    step([param], [make_grads(40)], [make_state(40, PAPER)], PAPER, lr=0.5, weights=weights, weight_decay=0.1)
    torch.testing.assert_close(param, before * 0.95)


def test_a_nan_in_the_weights_is_seen(isa):
    weights = make_weights(PAPER)
    weights[100] = float("nan")
    param = torch.zeros(5)
    step([param], [torch.ones(5)], [make_state(5, PAPER)], PAPER, weights=weights)
    assert param.isnan().all()


def test_many_tensors_and_any_threads_give_what_each_alone_does():
    """More coordinates than are held at a time, one tensor of more; no sum depends on the number of threads."""
    sizes, before, found = [3, 0, 5000, 150_000, 1, 100_000, 270_000, 17], torch.get_num_threads(), []
    weights = make_weights(RNNPROP)

    def run(together):
        params = [torch.ones(size) for size in sizes]
        grads = [make_grads(size, seed=i) for i, size in enumerate(sizes)]
        states = [ops.new_state(param, RNNPROP) for param in params]
        slow = [torch.tensor(0.0) for _ in params]
        groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(sizes))]
        for group in groups:
            options = {"weights": weights, "weight_decay": 0.1, "slow": slow[group], "most": 2 * RMS}
            step(params[group], grads[group], states[group], RNNPROP, **options)
        return torch.cat([*params, torch.stack(slow)])

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(together=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in [*found, run(together=False)])


def test_the_kernel_is_what_is_done_around_the_plain_step():
    """The same rule where there is no kernel of it, as for parts of sharded tensors."""
    params = [torch.randn(shape) for shape in [(3, 5), (7,), (), (40, 30)]]
    twins = [param.clone() for param in params]
    grads = [make_grads(*param.shape) for param in params]
    states = [[ops.new_state(param, RNNPROP) for param in params] for _ in range(2)]
    step(params, grads, states[0], RNNPROP, weight_decay=0.1)
    weights, lr, steps = make_weights(RNNPROP), torch.tensor(0.7), [torch.tensor(3.0)] * 4
    call = twins, grads, states[1], weights, lr, steps, *arguments.codes(RNNPROP), 0.1, False
    updates = normalize.raw_updates(torch.ops.l2l_fast.lstm_step_, *call)
    normalize.move_(twins, updates, lr, RMS, 0.1)
    for one, two in zip([*params, *states[0]], [*twins, *states[1]], strict=True):
        torch.testing.assert_close(one, two)
