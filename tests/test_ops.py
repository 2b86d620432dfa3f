"""The operators as PyTorch sees them: schema, shapes, gradients, compilation."""

import hashlib

import overflow
import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_fast import CoordinatewiseLSTM, arguments, ops, reference
from l2l_fast.config import FEATURES, Config, has_moments, num_weights, state_size

OPS = torch.ops.l2l_fast
CONFIG = Config("both", 3, 2, True, "tanh", 0.1, 10.0, 0.95, 0.95, 1e-8)
CODES = dict(zip(Config._fields, arguments.codes(CONFIG), strict=True))
STATE, WEIGHTS = state_size(CONFIG), num_weights(CONFIG)


def make_arguments(features="both", dtype=torch.float64, steps=3, size=6, projection=True, linear_path=True):
    network = CoordinatewiseLSTM(features, 3, 2, projection=projection, linear_path=linear_path, output="tanh").to(
        dtype
    )
    with torch.no_grad():
        network.head.weight.uniform_(-0.5, 0.5)  # with a linear path it begins at zero
    weights = network.flat_weights().detach()
    grads = torch.randn(steps, size, dtype=dtype)
    state = ops.new_state(torch.empty(size), network.config, dtype) + 0.1
    return network.config, weights, grads, state


@pytest.mark.parametrize("features", FEATURES)
def test_step_passes_opcheck(features):
    config, weights, grads, state = make_arguments(features, torch.float32)
    params, lr, steps = torch.zeros(6), torch.tensor(1.0), [torch.tensor(1.0)]
    args = [params], [grads[0]], [state], weights, lr, steps, *arguments.codes(config), 0.01, False
    for op in (OPS.lstm_step_, OPS.lstm_step_reference_):
        opcheck(op, args)
    opcheck(OPS.lstm_step_scaled_, (*args, 0.6, [], 0.6))
    if has_moments(config):
        opcheck(OPS.lstm_step_scaled_, (*args, 0.6, [torch.tensor(0.0)], 1.0))
        fields = *arguments.codes(config), 0.6, [torch.tensor(0.0)], 1.0
        opcheck(OPS.lstm_update_sizes_, ([params], [grads[0]], [state], weights, steps, *fields))
    several = [params.expand(2, 6).clone()], [grads[:2]], [state.expand(2, *state.shape).clone()]
    rest = weights.expand(2, -1).contiguous(), lr, steps, *arguments.codes(config), 0.01, False
    for op, more in ((OPS.lstm_step_, ()), (OPS.lstm_step_reference_, ()), (OPS.lstm_step_scaled_, (0.6, [], 0.6))):
        opcheck(op, (*several, *rest, *more))


@pytest.mark.parametrize("features", FEATURES)
def test_unroll_passes_opcheck(features):
    config, weights, grads, state = make_arguments(features)
    tensors = [tensor.requires_grad_() for tensor in (grads, state, weights)]
    opcheck(OPS.lstm_unroll, (*tensors, torch.tensor(1.0), *arguments.codes(config)))


@pytest.mark.parametrize("needed", [(True, True, True), (False, False, True), (True, False, False)])
def test_unroll_backward_passes_opcheck(needed):
    config, weights, grads, state = make_arguments()
    tensors = torch.randn_like(grads), torch.randn_like(state), grads, state, weights, torch.tensor(1.0)
    opcheck(OPS.lstm_unroll_backward, (*tensors, *arguments.codes(config), *needed))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("linear_path", [False, True])
def test_unroll_passes_gradcheck(features, projection, linear_path):
    config, weights, grads, state = make_arguments(features, projection=projection, linear_path=linear_path)
    tensors = [tensor.requires_grad_() for tensor in (grads, state, weights)]
    assert torch.autograd.gradcheck(lambda g, s, w: ops.lstm_unroll(g, s, w, config, 2), tensors)


def test_second_derivatives_are_refused_with_the_cure():
    config, weights, grads, state = make_arguments()
    weights.requires_grad_()
    updates, _ = ops.lstm_unroll(grads, state, weights, config)
    (gradient,) = torch.autograd.grad(updates.sum(), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.lstm_unroll"):
        gradient.sum().backward()


def test_gradients_not_needed_are_not_formed():
    config, weights, grads, state = make_arguments()
    d_grads, d_state, d_weights = ops.lstm_unroll_backward(
        torch.randn_like(grads), None, grads, state, weights, config, torch.tensor(1.0)
    )
    assert (d_grads.numel(), d_state.numel(), d_weights.shape) == (0, 0, weights.shape)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("size", [0, 1, 9])
def test_steps_in_place_equal_the_unroll(steps, size):
    config, weights, grads, state = make_arguments(steps=steps, size=size)
    updates, last = ops.lstm_unroll(grads, state, weights, config)
    theta, states = torch.zeros(size, dtype=torch.float64), state.clone()
    for t in range(steps):
        ops.lstm_step_([theta], [grads[t]], [states], weights, torch.tensor(1.0), [torch.tensor(t + 1.0)], config)
    torch.testing.assert_close(theta, updates.sum(0))
    torch.testing.assert_close(states, last)


def test_step_applies_lr_decay_and_maximize():
    config, weights, grads, state = make_arguments("log_sign", steps=1)
    theta = torch.randn(6, dtype=torch.float64)
    for maximize in (False, True):
        sign = -1 if maximize else 1
        updates, _ = ops.lstm_unroll(sign * grads, state, weights, config)
        moved, args = theta.clone(), ([grads[0]], [state.clone()], weights, torch.tensor(0.5), [torch.tensor(1.0)])
        ops.lstm_step_([moved], *args, config, weight_decay=0.1, maximize=maximize)
        torch.testing.assert_close(moved, theta - 0.5 * 0.1 * theta + 0.5 * updates[0])


BAD_NETWORKS = [
    ({"weights": torch.zeros(7)}, rf"weights must be a vector of {WEIGHTS} for this network.*, got shape \[7\]"),
    ({"weights": torch.zeros(1, 1, WEIGHTS)}, "weights must be a vector of"),
    ({"weights": torch.zeros(WEIGHTS).bfloat16()}, "weights must be float32 or float64"),
    ({"features": 4}, r"features must be 0 \(identity\) or .* or 3 \(both\), got 4"),
    ({"features": -1}, "features must be .*, got -1"),
    ({"output": 2}, r"output must be 0 \(linear\) or 1 \(tanh\), got 2"),
    ({"hidden_size": 0}, "hidden_size must be from 1"),
    ({"num_layers": 0}, "num_layers must be from 1"),
]
BAD_STEPS = [
    ({"grads": [torch.zeros(4)]}, r"a gradient has shape \[4\], its parameter \[3\]"),
    ({"grads": [torch.zeros(3, dtype=torch.int64)]}, "a gradient must be float32, bfloat16"),
    ({"grads": []}, "one gradient, state and step for each of the 2 parameters, got 1, 2 and 2"),
    ({"states": [torch.zeros(3, 9)]}, rf"a state has shape \[3, 9\].*must add one dimension of {STATE}"),
    ({"states": [torch.zeros(4, STATE)]}, rf"a state has shape \[4, {STATE}\], its parameter \[3\]"),
    ({"states": [torch.zeros(3, STATE).half()]}, "state must be float32, bfloat16 or float64"),
    ({"states": [torch.zeros(1, STATE).expand(3, STATE)]}, "a state of shape .* is expanded"),
    ({"params": [torch.zeros(3, dtype=torch.int32)]}, "a parameter must be float32, bfloat16"),
    ({"params": [torch.zeros(1).expand(3)]}, "a parameter of shape .* is expanded"),
    ({"lr": torch.ones(2)}, r"lr must be a single number, got shape \[2\]"),
    ({"lr": torch.tensor(1.0).half()}, "lr must be float32, float64, int32 or int64"),
    ({"steps": [torch.ones(2)]}, r"a step must be a single number, got shape \[2\]"),
    ({"steps": [torch.tensor(True)]}, "a step must be float32, float64, int32 or int64"),
    ({"weights": torch.zeros(3, WEIGHTS + 1)}, "vector of .*, or a row of them for each of several, got shape"),
    (
        {"weights": torch.zeros(2, WEIGHTS)},
        r"a parameter has shape \[3\]: its first dimension must be 2, the number of networks that weights has",
    ),
    (
        {
            "weights": torch.zeros(3, WEIGHTS),
            "params": [torch.tensor(0.0)],
            "grads": [torch.tensor(0.0)],
            "states": [torch.zeros(STATE)],
        },
        r"a parameter has shape \[\]: its first dimension must be 3",
    ),
]
BAD_UNROLLS = [
    ({"weights": torch.zeros(1, WEIGHTS)}, "weights must be a vector of .* for this network, got shape"),
    ({"grads": torch.zeros(3)}, r"grads must be \[T, N\], got shape \[3\]"),
    ({"grads": torch.zeros(2, 3).double()}, "grads must have the dtype of the weights"),
    ({"state": torch.zeros(3, 5)}, rf"state must be \[3, {STATE}\], got shape \[3, 5\]"),
    ({"state": torch.zeros(9, STATE)}, rf"state must be \[3, {STATE}\], got shape \[9, {STATE}\]"),
    ({"state": torch.zeros(3, STATE).half()}, "state must be float32, bfloat16 or float64"),
    ({"step": torch.ones(2)}, r"step must be a single number, got shape \[2\]"),
]
BAD_BACKWARDS = [
    ({"d_updates": torch.zeros(2, 4)}, r"d_updates must be \[2, 3\], got shape \[2, 4\]"),
    ({"d_updates": torch.zeros(2, 3).double()}, "d_updates must have the dtype of the weights"),
    ({"d_last": torch.zeros(4, STATE)}, rf"d_last must be \[3, {STATE}\], got shape \[4, {STATE}\]"),
    ({"d_last": torch.zeros(3, STATE).half()}, "must be float32, bfloat16 or float64"),
]


@pytest.fixture(params=["dispatched", "reference"])
def backend(request):
    """An op by name, from the dispatcher (the kernel, where there is one) and from the reference."""
    return (lambda name: getattr(OPS, name)) if request.param == "dispatched" else ops.REFERENCE.__getitem__


@pytest.mark.parametrize(("change", "message"), BAD_NETWORKS + BAD_STEPS)
def test_every_backend_refuses_the_same_steps_and_changes_nothing(backend, change, message):
    good = {
        "params": [torch.zeros(3)], "grads": [torch.ones(3)], "states": [torch.zeros(3, STATE)],
        "weights": torch.ones(WEIGHTS), "lr": torch.tensor(1.0), "steps": [torch.tensor(1.0)],
    }  # fmt: skip
    bad = {
        name: [*value, *change.get(name, [value[0].clone()])] if isinstance(value, list) else change.get(name, value)
        for name, value in (good | CODES).items()
    }
    for name, more in {"lstm_step_": (), "lstm_step_scaled_": (0.6, [], 0.6)}.items():
        with pytest.raises(RuntimeError, match=message):
            backend(name)(*bad.values(), 0.0, False, *more)
    assert not good["params"][0].any()
    assert not good["states"][0].any()


@pytest.mark.parametrize(("change", "message"), BAD_NETWORKS + BAD_UNROLLS + BAD_BACKWARDS)
def test_every_backend_refuses_the_same_unrolls(backend, change, message):
    good = {"grads": torch.zeros(2, 3), "state": torch.zeros(3, STATE), "weights": torch.ones(WEIGHTS),
            "step": torch.tensor(1.0), **CODES}  # fmt: skip
    of_backward = {"d_updates": torch.zeros(2, 3), "d_last": torch.zeros(3, STATE)}
    if change.keys() <= good.keys():
        with pytest.raises(RuntimeError, match=message):
            backend("lstm_unroll")(*(good | change).values())
    with pytest.raises(RuntimeError, match=message):
        backend("lstm_unroll_backward")(*(of_backward | good | change).values(), True, True, True)


@pytest.mark.parametrize(
    ("fused", "name"), [(False, "lstm_step_reference_"), (None, "lstm_step_"), (True, "lstm_step_")]
)
def test_the_reference_steps_where_it_is_asked_for(fused, name):
    network, called = CoordinatewiseLSTM("moments", 3, 1), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(op.name())
            return op(*args, **kwargs or {})

    theta, number = torch.zeros(4), torch.tensor(1.0)
    state, weights = ops.new_state(theta, network.config), network.flat_weights().detach()
    with Watch():
        ops.lstm_step_([theta], [torch.ones(4)], [state], weights, number, [number], network.config, fused=fused)
    assert f"l2l_fast::{name}" in called
    assert theta.all()


def test_a_step_is_a_number_or_a_tensor():
    config, weights, grads, state = make_arguments("moments")
    for call in (ops.lstm_unroll, lambda *args: ops.lstm_unroll_backward(grads, None, *args)):
        number, tensor = (call(grads, state, weights, config, step) for step in (3, torch.tensor(3)))
        assert all(map(torch.equal, number, tensor))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "expanded_grad"])
def test_step_takes_any_strides(layout):
    config, weights, *_ = make_arguments(dtype=torch.float32)
    make = {
        "transposed": lambda: torch.randn(5, 4).T,
        "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": lambda: torch.randn(8, 6)[::2, 1::2],
        "expanded_grad": lambda: torch.randn(4, 5),
    }[layout]
    theta, grad = make(), make()
    if layout == "expanded_grad":
        grad = torch.randn(1, 5).expand(4, 5)
    plain = theta.clone(memory_format=torch.contiguous_format)
    lr, steps = torch.tensor(1.0), [torch.tensor(1.0)]
    ops.lstm_step_([theta], [grad], [ops.new_state(theta, config)], weights, lr, steps, config)
    ops.lstm_step_([plain], [grad.contiguous()], [ops.new_state(plain, config)], weights, lr, steps, config)
    torch.testing.assert_close(theta, plain)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2,), (5,), (16,), (3, 5), (17,), (200,), (2**12,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_has_the_parameters_shape_and_contiguous_rows(shape, dtype):
    config = make_arguments()[0]
    param = torch.empty(shape)
    state = ops.new_state(param, config, dtype)
    assert state.shape == (*shape, state_size(config))
    assert state.dtype == dtype
    assert not state.any()
    rows, row_bytes = state.shape[-1], state.stride(-1) * dtype.itemsize
    assert (
        state.untyped_storage().nbytes() <= rows * 2 * param.numel() * dtype.itemsize
    )  # padding is no more than state
    if param.numel() * dtype.itemsize > 2 * 64:
        assert row_bytes % 64 == 0
        assert (row_bytes // 64) % 2 == 1
    elif param.numel() > 1:
        assert state.stride(-1) % 4 == 0  # as CUDA's matrix units need it
    if param.numel() > 1:
        assert state.stride()[:-1] == param.stride()


@pytest.mark.parametrize("shape", [(2, 5), (3, 200), (2, 64, 7), (4,), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_several_networks_is_each_ones_by_itself(shape, dtype):
    config, param = make_arguments()[0], torch.empty(shape)
    state = ops.new_state(param, config, dtype, several=True)
    assert state.shape == (*shape, state_size(config))
    assert not state.any()
    for k in range(len(param)):
        assert state[k].stride() == ops.new_state(param[k], config, dtype).stride()
        state[k].fill_(k)
    assert all((state[k] == k).all() for k in range(len(param)))


def test_state_follows_the_parameters_memory_order():
    param = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = ops.new_state(param, make_arguments()[0])
    assert state.stride()[:-1] == param.stride()


def test_other_schemas_have_another_version():
    """A compiled module of other schemas is refused by its version alone; its kernels would crash."""
    schemas = "\n".join(str(getattr(OPS, name).default._schema) for name in sorted(ops.REFERENCE))
    found = ops.VERSION, hashlib.sha256(schemas.encode()).hexdigest()[:12]
    assert found == (7, "e617d1f56b71"), (
        "raise VERSION here, in l2l_fast/ops.py and in csrc/module.cpp, and take the new hash"
    )


def test_unroll_compiles_without_a_graph_break():
    config, weights, grads, state = make_arguments(dtype=torch.float32)
    compiled = torch.compile(lambda g, s, w: ops.lstm_unroll(g, s, w, config), fullgraph=True, backend="aot_eager")
    weights.requires_grad_()
    torch.testing.assert_close(compiled(grads, state, weights), ops.lstm_unroll(grads, state, weights, config))


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.jacrev(torch.func.grad(f))])
def test_transforms_of_torch_func_run_the_reference(transform):
    config, weights, grads, state = make_arguments()

    def loss(unroll, *rest):
        return lambda weights: unroll(grads, state, weights, *rest)[0].square().sum()

    found = transform(loss(ops.lstm_unroll, config))(weights)
    expected = transform(loss(reference.lstm_unroll, torch.tensor(1.0), *config))(weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.func.vmap(lambda scale: ops.lstm_unroll(scale * grads, state, weights, config)[0])(torch.ones(2))[1],
        ops.lstm_unroll(grads, state, weights, config)[0],
    )


@pytest.mark.parametrize("features", ["identity", "moments", "both"])
@pytest.mark.parametrize(("dtype", "state_dtype"), overflow.DTYPES)
def test_gradients_too_large_for_a_finite_state_are_not_finite(backend, features, dtype, state_dtype):
    config = overflow.CONFIG._replace(features=features)
    overflow.check_step(backend("lstm_step_"), config, dtype, state_dtype)
    overflow.check_unroll(backend("lstm_unroll"), backend("lstm_unroll_backward"), config, dtype, state_dtype)


def test_the_logarithm_takes_any_gradient_that_is_finite(backend):
    config = overflow.CONFIG._replace(features="log_sign")
    weights, one = torch.linspace(-1, 1, num_weights(config)), torch.tensor(1.0)
    theta, grad, state = torch.zeros(3), torch.tensor([1e20, -3e38, 1.0]), ops.new_state(torch.empty(3), config)
    backend("lstm_step_")([theta], [grad], [state], weights, one, [one], *arguments.codes(config), 0.0, False)
    assert state.isfinite().all()
    assert state.any(1).all()
    updates, _ = backend("lstm_unroll")(grad[None], torch.zeros_like(state), weights, one, *arguments.codes(config))
    torch.testing.assert_close(updates[0], theta)
    assert theta.all()


@pytest.mark.parametrize("name", ["lstm_step_", "lstm_unroll", "lstm_unroll_backward"])
def test_autocast_changes_nothing(backend, name):
    config, weights, grads, state = make_arguments(dtype=torch.float32, size=100)
    codes, one = arguments.codes(config), torch.tensor(1.0)

    def run():
        if name == "lstm_step_":
            theta, held = torch.ones(100), state.clone()
            backend(name)([theta], [grads[0]], [held], weights, one, [one], *codes, 0.1, False)
            return theta, held
        if name == "lstm_unroll":
            return backend(name)(grads, state, weights, one, *codes)
        return backend(name)(grads, state, grads, state, weights, one, *codes, True, True, True)

    expected = run()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.is_autocast_enabled("cpu")
            found = run()
        assert all(map(torch.equal, found, expected))


def test_autocast_changes_nothing_in_plain_pytorch():
    """Which runs under torch.func's transforms, and where second derivatives are asked for."""
    config, weights, grads, state = make_arguments(dtype=torch.float32, size=100)
    plain = reference.lstm_unroll(grads, state, weights, torch.tensor(1.0), *config)
    mapped = torch.func.vmap(lambda scale: ops.lstm_unroll(scale * grads, state, weights, config)[0])
    expected = mapped(torch.ones(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.lstm_unroll(grads, state, weights, torch.tensor(1.0), *config)[0], plain[0])
        assert torch.equal(mapped(torch.ones(2)), expected)


def test_names_that_are_none_are_refused_by_the_wrappers():
    config, weights, grads, state = make_arguments()
    for field, value in (("features", "sign"), ("output", "relu")):
        bad, one = config._replace(**{field: value}), torch.tensor(1.0)
        with pytest.raises(RuntimeError, match=f"{field} must be .*, got '{value}'"):
            ops.lstm_step_([grads[0]], [grads[1]], [state], weights, one, [one], bad)
        with pytest.raises(RuntimeError, match=f"{field} must be .*, got '{value}'"):
            ops.lstm_unroll(grads, state, weights, bad)
        with pytest.raises(RuntimeError, match=f"{field} must be .*, got '{value}'"):
            ops.lstm_unroll_backward(grads, None, grads, state, weights, bad)
