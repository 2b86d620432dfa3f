"""The update scaled to one RMS over each tensor, and orthogonalized, as steps of the optimizer."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, normalize, ops, optim, reference
from l2l_fast.config import FEATURES, gradient_limit

RMS = 0.6


def make_network(features="both", update_rms=RMS, **options):
    torch.manual_seed(3)
    return CoordinatewiseLSTM(features, 4, 1, update_rms=update_rms, output_scale=1.0, **options)


def expected_step(
    theta, grad, state, step, network, lr, weight_decay=0.0, maximize=False, orthogonalize=False, v=None, slow=None
):
    """The rule as a sentence: the cell's updates of one whole tensor, scaled by the reference; real or complex.

    v, slow: the mean squares that input_rms and max_update_rms have before the step, lists of one number, moved on.
    """
    config = network.config
    weights = network.flat_weights().detach()
    weights = weights.double() if state.dtype == torch.float64 else weights
    real, g = (torch.view_as_real(x) if x.is_complex() else x for x in (theta, grad))
    g = (-g if maximize else g).to(weights.dtype)
    if network.input_rms is not None:
        g, v[0] = reference.relative_to_rms(g, v[0], step, config, network.input_rms)
    updates, new_state = reference.lstm_unroll(
        g.reshape(1, -1), state.reshape(-1, state.shape[-1]), weights, torch.tensor(float(step)), *config
    )
    new_state = new_state.view(state.shape)
    finite = g.abs() < gradient_limit(config, weights.dtype, state.dtype)
    d = updates.view(real.shape)
    if orthogonalize and theta.ndim > 1:
        momentum = config.beta1 * new_state[..., 0].to(weights.dtype) + (1 - config.beta1) * g
        momentum = torch.where(finite, momentum, 0.0)
        o = torch.view_as_complex(momentum.contiguous()) if theta.is_complex() else momentum
        o = normalize.orthogonalize(o)
        o = torch.view_as_real(o.resolve_conj()) if theta.is_complex() else o
        d = torch.where(finite, reference.scale_to_rms(d, 0.5) - reference.scale_to_rms(o, 1.0), 0.0)
    rms = network.update_rms
    if network.max_update_rms is not None:
        m = new_state[..., 0].to(weights.dtype)
        rms, slow[0] = reference.update_size(g, m, slow[0], step, config, rms, network.max_update_rms)
    wide = real.to(torch.promote_types(real.dtype, weights.dtype))
    moved = wide - lr * weight_decay * wide + lr * reference.scale_to_rms(d, rms)
    moved = torch.where(finite, moved, wide).to(real.dtype)
    return torch.view_as_complex(moved) if theta.is_complex() else moved, new_state


def make_params(dtype=torch.float32):
    torch.manual_seed(4)
    kinds = dtype if dtype.is_complex else torch.float32
    shapes = [(7,), (3, 5), (4, 3, 2, 2), (), (1,), (0, 3)]
    params = [nn.Parameter(torch.randn(shape, dtype=kinds).to(dtype)) for shape in shapes]
    params.append(nn.Parameter(torch.randn(6, 4, dtype=kinds).to(dtype).T))
    params.append(nn.Parameter(torch.randn(2, 3, 4, 5, dtype=kinds).to(dtype).to(memory_format=torch.channels_last)))
    params.append(nn.Parameter(torch.randn(8, 6, dtype=kinds).to(dtype)[::2, ::3]))
    return params


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        kinds = param.dtype if param.dtype.is_complex else torch.float32
        param.grad = torch.randn(param.shape, dtype=kinds, generator=generator).to(param.dtype)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.2}, {"orthogonalize": True, "weight_decay": 0.1},
    {"orthogonalize": True, "maximize": True},
])  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, {"input_rms": 0.01}, {"max_update_rms": 1.5},
                                   {"input_rms": 0.01, "max_update_rms": 1.5}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_a_step_is_the_reference_rule(dtype, sizes, options, fused):
    network, params = make_network(**sizes), make_params(dtype)
    optimizer = LSTMOptimizer(params, network, lr=0.3, fused=fused, **options)
    thetas = [param.detach().clone() for param in params]
    states = [torch.zeros(*(torch.view_as_real(t) if t.is_complex() else t).shape, 10) for t in thetas]
    squares, slow_squares = ([[torch.tensor(0.0)] for _ in thetas] for _ in range(2))
    for step in range(1, 4):
        set_gradients(params, step)
        params[1].grad.view(-1)[4] = float("nan")
        if step == 2:
            params[0].grad[2] = float("inf")
        found = [
            expected_step(theta, param.grad, state, step, network, 0.3, **options, v=v, slow=slow)
            for theta, param, state, v, slow in zip(thetas, params, states, squares, slow_squares, strict=True)
        ]
        thetas, states = [theta for theta, _ in found], [state for _, state in found]
        optimizer.step()
        for param, theta in zip(params, thetas, strict=True):
            tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 3e-5)
            torch.testing.assert_close(param.detach(), theta, rtol=tolerance, atol=tolerance)
            assert param.isfinite().all()
        # Each step from the same place, or half precision's roundings would add up.
        with torch.no_grad():
            for param, theta in zip(params, thetas, strict=True):
                param.copy_(theta)


@pytest.mark.parametrize("fused", [None, False])
def test_every_tensor_moves_by_lr_times_the_rms(fused):
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((50,), (9, 7), (3, 2, 2, 2), ())]
    optimizer = LSTMOptimizer(params, make_network(), lr=1e-2, fused=fused)
    for scale in (1.0, 1e-4, 1e3):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = scale * torch.randn_like(param)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            torch.testing.assert_close((param - old).square().mean().sqrt().item(), RMS * 1e-2, rtol=1e-4, atol=0)


def test_float64_is_exact():
    network, theta = make_network().double(), nn.Parameter(torch.randn(5, 6, dtype=torch.float64))
    optimizer = LSTMOptimizer([theta], network, lr=0.1, weight_decay=0.3, state_dtype=torch.float64)
    expected, state = theta.detach().clone(), torch.zeros(5, 6, 10, dtype=torch.float64)
    for step in range(1, 6):
        theta.grad = torch.randn(5, 6, dtype=torch.float64)
        expected, state = expected_step(expected, theta.grad, state, step, network, 0.1, 0.3)
        optimizer.step()
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-6, atol=1e-7)  # the weights were float32's


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_what_has_no_gradient_stays_and_counts_as_zero(fused, weight_decay, orthogonalize):
    """Coordinates that never had one but 0 (networks with moments), those not finite, and tensors of nothing else."""
    start = torch.full((4, 6), 2.0)
    params = [nn.Parameter(start.clone()) for _ in range(3)]
    options = {"lr": 0.1, "weight_decay": weight_decay, "fused": fused, "orthogonalize": orthogonalize}
    optimizer = LSTMOptimizer(params, make_network(), **options)
    params[0].grad, params[1].grad = torch.zeros(4, 6), torch.full((4, 6), float("nan"))
    params[2].grad = torch.ones(4, 6)
    params[2].grad[0], params[2].grad[:, 1] = 0.0, float("inf")
    optimizer.step()
    decayed = 2.0 * (1 - 0.1 * weight_decay)
    torch.testing.assert_close(params[0].detach(), torch.full_like(start, decayed), rtol=1e-6, atol=0)
    assert torch.equal(params[1], start)
    assert params[2][:, 1].eq(2).all()
    rest = torch.tensor([0, 2, 3, 4, 5])
    torch.testing.assert_close(params[2][0, rest].detach(), torch.full((5,), decayed), rtol=1e-6, atol=0)
    moves = params[2].detach() - start * torch.where(params[2].grad.isfinite(), 1 - 0.1 * weight_decay, 1.0)
    torch.testing.assert_close(moves.square().mean().sqrt().item(), 0.1 * RMS, rtol=1e-4, atol=0)


def test_a_network_without_moments_moves_what_has_no_gradient():
    theta = nn.Parameter(torch.zeros(5))
    theta.grad = torch.zeros(5)
    LSTMOptimizer([theta], make_network("log_sign"), lr=0.1).step()
    torch.testing.assert_close(theta.square().mean().sqrt().item(), 0.1 * RMS)


def test_updates_of_zero_move_nothing():
    network, theta = make_network(), nn.Parameter(torch.ones(5))
    with torch.no_grad():
        network.head.weight.zero_()
    theta.grad = torch.ones(5)
    LSTMOptimizer([theta], network, lr=0.1).step()
    assert theta.eq(1).all()


def test_frozen_parameters_have_no_part():
    theta, frozen = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5), requires_grad=False)
    theta.grad = torch.ones(5)
    optimizer = LSTMOptimizer([theta, frozen], make_network(), lr=0.1)
    optimizer.step()
    assert frozen.eq(1).all()
    assert frozen not in optimizer.state


def test_groups_with_and_without_it_share_an_optimizer():
    params = [nn.Parameter(torch.ones(6)) for _ in range(4)]
    plain, scaled = make_network(update_rms=None), make_network()
    for param in params:
        param.grad = torch.linspace(-1, 1, 6)
    groups = [
        {"params": params[0], "network": plain},
        {"params": params[1]},
        {"params": params[2], "lr": 0.25},
        {"params": params[3], "network": make_network(update_rms=2 * RMS)},
    ]
    optimizer = LSTMOptimizer(groups, scaled)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1e-3, 0.25, 1e-3]
    assert [group["lr"] for group in LSTMOptimizer(groups, scaled, lr=0.2).param_groups] == [0.2, 0.2, 0.25, 0.2]
    optimizer.step()
    moves = [(param.detach() - 1) for param in params]
    updates, _ = plain(torch.linspace(-1, 1, 6)[None])
    torch.testing.assert_close(moves[0], updates[0].detach())
    scaled_updates = reference.scale_to_rms(updates[0].detach(), RMS)
    for move, factor in zip(moves[1:], (1e-3, 0.25, 2e-3), strict=True):
        torch.testing.assert_close(move, factor * scaled_updates, rtol=1e-3, atol=1e-7)
    later = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [later], "network": plain})
    assert optimizer.param_groups[-1]["lr"] == 1.0


def test_a_step_of_both_kinds_checks_all_before_anything_changes():
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1).expand(3))
    optimizer = LSTMOptimizer([good, bad], make_network(), lr=0.1)
    good.grad, bad.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="expanded"):
        optimizer.step()
    assert good.eq(1).all()
    assert not optimizer.state


def test_state_dict_pickle_and_deepcopy_go_on_as_one():
    network = make_network()

    def run(theta, optimizer, steps):
        for step in range(*steps):
            set_gradients([theta], step)
            optimizer.step()

    theta = nn.Parameter(torch.ones(4, 3))
    optimizer = LSTMOptimizer([theta], network, lr=0.1, orthogonalize=True)
    run(theta, optimizer, (0, 3))
    others = []
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = nn.Parameter(theta.detach().clone())
    loaded = LSTMOptimizer([again], network)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    others.append((again, loaded))
    for clone in (lambda pair: pickle.loads(pickle.dumps(pair)), copy.deepcopy):
        others.append(clone((theta, optimizer)))
    run(theta, optimizer, (3, 6))
    for again, other in others:
        run(again, other, (3, 6))
        assert torch.equal(again, theta)
        group = {"params": [nn.Parameter(torch.ones(2))], "network": make_network(update_rms=None)}
        other.add_param_group({**group, "orthogonalize": False})
    # The raw network's state is another's, although its weights are the same.
    with pytest.raises(ValueError, match="belongs to network"):
        LSTMOptimizer([theta], make_network(update_rms=None)).load_state_dict(optimizer.state_dict())


def test_pickles_of_earlier_versions_are_loaded():
    """Their networks were pairs, and no group had ``orthogonalize``."""
    theta = nn.Parameter(torch.ones(3))
    optimizer = LSTMOptimizer([theta], make_network(update_rms=None), lr=0.5)
    state = optimizer.__getstate__()
    state["_networks"] = {name: tuple(held)[:2] for name, held in state["_networks"].items()}
    del state["_rated"], state["param_groups"][0]["orthogonalize"]
    again = LSTMOptimizer.__new__(LSTMOptimizer)
    again.__setstate__(state)
    theta.grad = torch.ones(3)
    again.step()
    assert theta.ne(1).all()
    again.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert again.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"orthogonalize": True}])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_update_rms", [None, 1.5])
def test_a_compiled_step_is_the_same_step(options, state_dtype, max_update_rms):
    one, two = make_params(), make_params()
    options = {"lr": 0.1, "state_dtype": state_dtype, "network": make_network(max_update_rms=max_update_rms), **options}
    plain, compiled = LSTMOptimizer(one, **options), LSTMOptimizer(two, **options)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for number in range(4):
        for params, run in ((one, plain.step), (two, step)):
            set_gradients(params, number)
            run()
        for optimizer in (plain, compiled):
            optimizer.param_groups[0]["lr"] *= 0.9
    assert counters["unique_graphs"] - before <= 2
    for ours, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("max_update_rms", [None, 1.5])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_fake_tensors_are_stepped_without_values(orthogonalize, max_update_rms):
    outside = make_network(max_update_rms=max_update_rms)
    with FakeTensorMode():
        model = nn.Linear(4, 2)
        optimizer = LSTMOptimizer(model.parameters(), outside, weight_decay=0.1, orthogonalize=orthogonalize)
        for _ in range(2):
            model(torch.ones(3, 4)).sum().backward()
            optimizer.step()
    theta = nn.Parameter(torch.ones(2, 2))
    theta.grad = torch.ones(2, 2)
    LSTMOptimizer([theta], outside, lr=0.1, orthogonalize=orthogonalize).step()
    assert (theta != 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    results = []
    for enabled in (False, True):
        theta = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = LSTMOptimizer([theta], make_network(), lr=0.1, orthogonalize=True)
        theta.grad = theta.detach().sin()
        with torch.autocast("cpu", dtype, enabled=enabled):
            optimizer.step()
        results.append(theta.detach())
    assert torch.equal(*results)


def test_inference_mode_and_autograd_see_the_step():
    theta = nn.Parameter(torch.ones(3))
    theta.grad = torch.ones(3)
    with torch.inference_mode():
        LSTMOptimizer([theta], make_network(), lr=0.1, weight_decay=0.1).step()
    assert (theta != 1).all()
    optimizer = LSTMOptimizer([theta], make_network(), lr=0.1)
    loss = theta.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_error_if_nonfinite_raises_before_anything_changes():
    theta = nn.Parameter(torch.ones(3))
    optimizer = LSTMOptimizer([theta], make_network(), lr=0.1, error_if_nonfinite=True)
    theta.grad = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert theta.eq(1).all()
    assert not optimizer.state


# ---------------------------------------------------------------- orthogonalize


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (4, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_orthogonalize_keeps_singular_vectors_and_evens_out_values(shape, dtype):
    update = torch.randn(shape, dtype=dtype)
    found = normalize.orthogonalize(update)
    assert found.shape == update.shape
    matrix, flat = update.reshape(shape[0], -1), found.reshape(shape[0], -1)
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mH @ flat @ vh.mH
    a, b, c = 3.4445, -4.7750, 2.0315
    expected = values / values.norm()
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(inner, torch.diag(expected).to(dtype), rtol=0, atol=2e-4)
    torch.testing.assert_close(normalize.orthogonalize(1e-12 * update), found, rtol=1e-3, atol=1e-4)


def test_orthogonalize_of_nothing_is_nothing():
    assert normalize.orthogonalize(torch.zeros(3, 4)).eq(0).all()
    update = torch.randn(4, 5)
    update[1], update[:, 2] = 0.0, 0.0
    found = normalize.orthogonalize(update)
    assert found[1].eq(0).all()
    assert found[:, 2].eq(0).all()


def test_matrices_of_one_shape_are_orthogonalized_together(monkeypatch):
    """No more at once than is allowed; what each gives alone."""
    shapes = [(6, 4), (4, 6), (4, 3, 2), (6, 4), (3, 3), (4, 6), (6, 4), (6, 4), (0, 3)]
    momenta = [torch.randn(shape) for shape in shapes]
    momenta[1] = momenta[1].T.contiguous().T  # in another memory order
    counts, each = [], normalize.orthogonalize_each
    monkeypatch.setattr(normalize, "TOGETHER", 3 * 24)
    monkeypatch.setattr(normalize, "orthogonalize_each", lambda ms: counts.append(len(ms)) or each(ms))
    updates = normalize.Updates(momenta, momenta[0])
    flat = torch.empty_like(updates.flat)
    for piece, momentum in zip(updates.cut(flat), momenta, strict=True):
        piece.copy_(momentum)
    normalize._subtract_orthogonal_units_(updates, flat, momenta)
    assert counts == [3, 1, 1, 1, 1, 1]  # (6, 4), three at once; (4, 6) in two orders; the others
    for found, momentum in zip(updates.pieces, momenta, strict=True):
        if momentum.numel():
            torch.testing.assert_close(found, -normalize.unit(normalize.orthogonalize(momentum)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (10, 64)])
def test_half_precision_products_orthogonalize_as_well(shape, monkeypatch):
    """As on a GPU."""
    update = torch.randn(shape) * torch.rand(shape[1]) ** 4
    exact = normalize.orthogonalize(update)
    monkeypatch.setattr(normalize, "_on_matrix_units", lambda x: True)
    found = normalize.orthogonalize(update)
    assert found.dtype == torch.float32
    torch.testing.assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(exact), rtol=0, atol=0.03)
    assert 0 < (found - exact).norm() < 0.04 * exact.norm()


def test_orthogonalize_is_a_groups_choice():
    matrix, embedding, bias = (nn.Parameter(torch.zeros(shape)) for shape in ((6, 4), (6, 4), (4,)))
    for param in (matrix, embedding):
        param.grad = torch.linspace(-1, 2, 24).view(6, 4).sin()
    bias.grad = torch.ones(4)
    groups = [{"params": [matrix, bias]}, {"params": [embedding], "orthogonalize": False}]
    LSTMOptimizer(groups, make_network(), lr=0.5, orthogonalize=True).step()
    # At the first step the momentum is along the gradient.
    network = make_network()
    updates, _ = network(matrix.grad.reshape(1, -1))
    o = reference.scale_to_rms(normalize.orthogonalize(matrix.grad), 1.0)
    learned = reference.scale_to_rms(updates[0].detach().view(6, 4), 0.5)
    expected = 0.5 * reference.scale_to_rms(learned - o, RMS)
    torch.testing.assert_close(matrix.detach(), expected, rtol=1e-4, atol=1e-4)
    expected = 0.5 * reference.scale_to_rms(updates[0].detach().view(6, 4), RMS)
    torch.testing.assert_close(embedding.detach(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.detach().square().mean().sqrt().item(), 0.5 * RMS)


def test_a_network_says_whether_its_matrices_are_orthogonalized():
    def moved(network, **options):
        theta = nn.Parameter(torch.zeros(6, 4))
        theta.grad = torch.linspace(-1, 2, 24).view(6, 4).sin()
        LSTMOptimizer([theta], network, lr=0.5, **options).step()
        return theta.detach()

    own, other = make_network(orthogonalize=True), make_network()
    assert torch.equal(moved(own), moved(other, orthogonalize=True))
    assert torch.equal(moved(own, orthogonalize=False), moved(other))
    assert moved(own).ne(moved(other)).any()


def test_vocabularies_are_no_matrices():
    for shape, expected in {(4, 5): True, (4, 5, 6): True, (7,): False, (): False, (16384, 2): True}.items():
        assert normalize.is_matrix(torch.empty(shape, device="meta")) == expected, shape
    for shape in ((16385, 2), (2, 16385), (3, 128, 129)):
        assert not normalize.is_matrix(torch.empty(shape, device="meta")), shape


# ---------------------------------------------------------------- inputs relative to their tensor's


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("update_rms", [None, RMS])
def test_with_input_rms_the_unit_of_the_loss_has_no_part(fused, update_rms):
    network, found = make_network(update_rms=update_rms, input_rms=0.01), []
    for unit in (1.0, 2.0**40, 2.0**-40):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(4))]
        optimizer = LSTMOptimizer(params, network, lr=0.1, fused=fused)
        for step in range(4):
            set_gradients(params, step)
            params[1].grad.mul_(unit)
            optimizer.step()
        found.append(params)
    for params in found[1:]:
        for param, first in zip(params, found[0], strict=True):
            torch.testing.assert_close(param, first, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_scale_of_the_inputs():
    theta = nn.Parameter(torch.zeros(6))
    optimizer, known = LSTMOptimizer([theta], make_network(input_rms=0.01), lr=0.1), None
    for step, worst in enumerate((float("inf"), 3.0, 1.0, float("nan"), 1e30)):
        theta.grad = torch.tensor([2.0, -1.0, 0.5, 0.1, worst, -worst])
        before = theta.detach().clone()
        optimizer.step()
        state = optimizer.state[theta]
        estimate = (state["square"] / (1 - 0.95 ** (step + 1))).item()
        if step == 0:
            assert estimate == 0  # nothing is known, so nothing moves
            assert torch.equal(theta, before)
        elif step > 2:
            assert estimate == pytest.approx(known, rel=1e-5)
            assert torch.equal(theta[4:], before[4:])
            assert theta[:4].ne(before[:4]).all()
        known = estimate
        assert state["lstm"].isfinite().all()


@pytest.mark.parametrize(("option", "name"), [("input_rms", "square"), ("max_update_rms", "slow_square")])
def test_the_scale_of_gradients_is_saved_and_asked_for(option, name):
    network, theta = make_network(**{option: 0.6}), nn.Parameter(torch.ones(4, 3))
    optimizer = LSTMOptimizer([theta], network, lr=0.1)
    for step in range(3):
        set_gradients([theta], step)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = nn.Parameter(theta.detach().clone())
    other = LSTMOptimizer([again], network, lr=0.1)
    other.load_state_dict(saved)
    for param, one in ((theta, optimizer), (again, other)):
        set_gradients([param], 3)
        one.step()
    assert torch.equal(theta, again)
    with pytest.raises(ValueError, match="belongs to network"):
        LSTMOptimizer([again], make_network()).load_state_dict(saved)
    del saved["state"][0][name]
    with pytest.raises(ValueError, match=rf"'s {name} of parameter 0 .* must be a number, got None"):
        other.load_state_dict(saved)


def steps_of(theta, network, gradients, **options):
    """The root mean square of every step, in lr."""
    optimizer, found = LSTMOptimizer([theta], network, lr=1e-3, **options), []
    for grad in gradients:
        before, theta.grad = theta.detach().clone(), grad
        optimizer.step()
        found.append((theta.detach() - before).square().mean().sqrt().item() / 1e-3)
    return torch.tensor(found)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("orthogonalize", [False, True])
def test_noise_has_the_size_of_the_update_and_agreement_more(scale, state_dtype, orthogonalize):
    torch.manual_seed(0)
    network, options = make_network(max_update_rms=3.0), {"orthogonalize": orthogonalize, "state_dtype": state_dtype}
    noise = scale * torch.randn(400, 100, 40)
    sizes = steps_of(nn.Parameter(torch.zeros(100, 40)), network, noise, **options)
    assert sizes[50:].mean().item() == pytest.approx(RMS, rel=0.03)
    assert sizes.max() < 3.0 + 1e-3  # as long as there is nothing to compare with, one gradient agrees with itself
    signal = scale * torch.randn(100, 40)
    sizes = steps_of(nn.Parameter(torch.zeros(100, 40)), network, signal.expand(50, -1, -1), **options)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 3.0), rtol=2e-3, atol=0)
    # Half of the power is signal: of the momentum's then almost all.
    sizes = steps_of(nn.Parameter(torch.zeros(100, 40)), network, noise + signal, **options)
    power = (1 + 0.05 / 1.95) / 2
    assert sizes[100:].mean().item() == pytest.approx(min(3.0, RMS * (power * 1.95 / 0.05) ** 0.5), rel=0.03)


def test_an_outlier_slows_a_tensor_for_no_longer_than_its_momentum_has_it():
    torch.manual_seed(0)
    noise = torch.randn(400, 1000)
    usual = steps_of(nn.Parameter(torch.zeros(1000)), make_network(max_update_rms=3.0), noise)
    for outlier in (1e3, 1e6):
        spiked = noise.clone()
        spiked[60, 7] = outlier
        sizes = steps_of(nn.Parameter(torch.zeros(1000)), make_network(max_update_rms=3.0), spiked)
        assert sizes[61] > 2 * usual[61]  # as Adam's are then
        torch.testing.assert_close(sizes[-1], usual[-1], rtol=0.35, atol=0)


@pytest.mark.parametrize("fused", [None, False])
def test_a_gradient_that_is_too_large_counts_as_one_that_is_not_finite(fused):
    theta, gradient = nn.Parameter(torch.zeros(1000)), torch.randn(1000)
    optimizer = LSTMOptimizer([theta], make_network(max_update_rms=3.0), lr=0.1, fused=fused)
    for worst in (1.0, 1.2e19, 1e30):  # the second has a finite square
        theta.grad, before = gradient.clone(), theta.detach().clone()
        theta.grad[3] = worst
        optimizer.step()
        known = optimizer.state[theta]["slow_square"] / (1 - 0.999 ** optimizer.state[theta]["step"])
        torch.testing.assert_close(known, gradient.square().mean(), rtol=0.02, atol=0)
        assert theta[4] != before[4]
    assert theta[3] == before[3]


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("max_update_rms", [None, 3.0])
def test_gradients_that_vanish_leave_finite_parameters(fused, orthogonalize, max_update_rms):
    """A layer that died: its momentum falls by 0.95 a step, until its squares are no numbers any more."""
    theta, network = nn.Parameter(torch.ones(8, 6)), make_network(max_update_rms=max_update_rms)
    optimizer = LSTMOptimizer([theta], network, lr=1e-3, orthogonalize=orthogonalize, fused=fused)
    for step in range(100):
        theta.grad = 1e-2 * torch.randn(8, 6) if step < 20 else torch.zeros(8, 6)
        optimizer.step()
    for magnitude in (1e-18, 1e-22, 1e-24, 1e-30, 1e-37, 1e-40, 1e-45, 0.0):
        with torch.no_grad():
            optimizer.state[theta]["lstm"][..., 0] = magnitude * torch.randn(8, 6)
        before = theta.detach().clone()
        optimizer.step()
        assert theta.isfinite().all()
    if max_update_rms is not None:
        assert torch.equal(theta, before)  # and rest


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e20, 1e37])
def test_orthogonalize_knows_no_scale(scale):
    matrix = torch.randn(5, 8)
    torch.testing.assert_close(
        normalize.orthogonalize(scale * matrix), normalize.orthogonalize(matrix), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("max_update_rms", [None, 3.0])
def test_a_rate_may_be_a_tensor_of_one_element(orthogonalize, max_update_rms):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 3))]
    network = make_network(max_update_rms=max_update_rms)
    optimizer = LSTMOptimizer(params, network, lr=torch.tensor([1e-3]), orthogonalize=orthogonalize)
    set_gradients(params, 0)
    optimizer.step()
    assert all(param.ne(1).all() for param in params)


def test_networks_that_an_earlier_version_pickled_have_no_largest_size():
    network = make_network()
    del network.__dict__["max_update_rms"]
    again = pickle.loads(pickle.dumps(network))
    assert again.options == make_network().options
    LSTMOptimizer([nn.Parameter(torch.ones(2))], again)


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.95])
def test_sizes_in_float32_lose_no_digits_to_the_bias_of_early_steps(beta1):
    config = CoordinatewiseLSTM("both", 2, 1, betas=(beta1, 0.95)).config
    grads = [torch.randn(50) for _ in range(4)]
    m, v, exact = torch.zeros(50, dtype=torch.float64), torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for step, grad in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * grad.double()
        wanted, exact = reference.update_size(grad.double(), m, exact, step, config, RMS, 1e9)
        call = [grad], [m.float()[:, None]], [v], [torch.tensor(float(step))]
        found = normalize.update_sizes_(*call, config, RMS, 1e9)
        torch.testing.assert_close(found[0].double(), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(v.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("orthogonalize", [True, False])
def test_a_mean_square_that_came_back_in_another_dtype_goes_on(orthogonalize):
    network, found = CoordinatewiseLSTM("both", 4, 1, update_rms=0.2, max_update_rms=1.0), []
    for dtype in (torch.float32, torch.float64):
        param = nn.Parameter(torch.ones(5, 4))
        optimizer = LSTMOptimizer([param], network, lr=0.1, orthogonalize=orthogonalize)
        for seed in range(3):
            param.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
            optimizer.state[param]["slow_square"] = optimizer.state[param]["slow_square"].to(dtype)
        found.append(param.detach())
    torch.testing.assert_close(*found)


def test_there_are_no_sizes_of_no_tensors():
    config, weights = CoordinatewiseLSTM("both", 4, 1).config, CoordinatewiseLSTM("both", 4, 1).flat_weights().detach()
    call = [], [], [], weights, [], *optim.arguments.codes(config), 0.2, [], 1.0
    for op in (torch.ops.l2l_fast.lstm_update_sizes_, ops.REFERENCE["lstm_update_sizes_"]):
        assert op(*call).shape == (0,)


def test_steps_shrink_with_the_gradients_until_they_are_forgotten():
    torch.manual_seed(0)
    noise = torch.randn(6000, 200)
    noise[1000:] *= 0.01
    sizes = steps_of(nn.Parameter(torch.zeros(200)), make_network(max_update_rms=3.0), noise)
    for step in (1200, 3000, 5000):
        v = ((1 - 0.999**1000) * 0.999 ** (step - 1000) + 1e-4 * (1 - 0.999 ** (step - 1000))) / (1 - 0.999**step)
        assert sizes[step - 50 : step + 50].mean().item() == pytest.approx(RMS * 0.01 * v**-0.5, rel=0.1)


def test_a_first_gradient_that_is_not_finite_leaves_the_others_a_step():
    theta = nn.Parameter(torch.zeros(6))
    gradient = torch.tensor([2.0, -1.0, 0.5, 0.1, float("inf"), float("nan")])
    sizes = steps_of(theta, make_network(max_update_rms=3.0), [gradient])
    assert sizes[0].item() == pytest.approx(RMS, rel=1e-3)
    assert theta[4:].eq(0).all()
    assert theta[:4].ne(0).all()


def test_largest_sizes_are_refused_where_there_is_no_momentum_or_none_smaller():
    with pytest.raises(ValueError, match="max_update_rms must be None for a network without update_rms"):
        CoordinatewiseLSTM("both", max_update_rms=1.0)
    with pytest.raises(ValueError, match="max_update_rms must be None for a network with features 'log_sign'"):
        CoordinatewiseLSTM("log_sign", update_rms=0.2, max_update_rms=1.0)
    with pytest.raises(ValueError, match=r"max_update_rms must be update_rms, 0\.2, or more, got 0\.1"):
        CoordinatewiseLSTM("both", update_rms=0.2, max_update_rms=0.1)


def test_orthogonalize_is_refused_where_the_update_has_a_size_of_its_own():
    theta, plain = nn.Parameter(torch.ones(2, 2)), make_network(update_rms=None)
    with pytest.raises(ValueError, match="orthogonalize must be False for a network without update_rms"):
        LSTMOptimizer([theta], plain, orthogonalize=True)
    optimizer = LSTMOptimizer([theta], make_network(), orthogonalize=True)
    with pytest.raises(ValueError, match="orthogonalize must be False for a network without update_rms"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "network": plain})
    assert len(optimizer.param_groups) == 1
    for build in (
        lambda: CoordinatewiseLSTM("log_sign", update_rms=RMS, orthogonalize=True),
        lambda: LSTMOptimizer([theta], make_network("log_sign"), orthogonalize=True),
    ):
        with pytest.raises(ValueError, match="orthogonalize must be False for a network with features 'log_sign'"):
            build()
    with pytest.raises(ValueError, match="orthogonalize must be True, False or None, got 5"):
        LSTMOptimizer([theta], make_network(), orthogonalize=5)


def test_a_rate_for_the_network_of_before_is_warned_of():
    theta = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match=r"lr=1 moves tensors by up to 1 a step.*l2l-base-v1"):
        LSTMOptimizer([theta], "l2l-base", lr=1.0)
    LSTMOptimizer([theta], "l2l-base-v1", lr=1.0)
    assert LSTMOptimizer([theta]).param_groups[0]["lr"] == 1e-3


# ---------------------------------------------------------------- the pieces


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "0.6", True])
@pytest.mark.parametrize("name", ["update_rms", "max_update_rms", "input_rms"])
def test_a_bad_size_is_refused(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be a positive number or None"):
        CoordinatewiseLSTM(**{name: bad})


def test_the_network_shows_it_and_gives_raw_updates():
    plain, scaled = make_network(update_rms=None), make_network()
    assert "update_rms=0.6" in repr(scaled)
    assert scaled.options["update_rms"] == RMS
    assert (plain.default_lr, scaled.default_lr) == (1.0, 1e-3)
    assert CoordinatewiseLSTM(**scaled.options).options == scaled.options
    grads = torch.randn(3, 5)
    torch.testing.assert_close(plain(grads), scaled(grads))
    assert plain.rule != scaled.rule
    lstm, head = nn.LSTM(2, 3, 1), nn.Linear(3, 1)
    assert CoordinatewiseLSTM.from_torch(lstm, head, update_rms=RMS).update_rms == RMS


def test_scratch_is_beside_the_parameters_state():
    params = [param.detach() for param in make_params()]
    updates = normalize.Updates(params, params[0])
    assert normalize.is_held(updates.flat).all()
    for number, (param, piece) in enumerate(zip(params, updates.pieces, strict=True)):
        assert piece.shape == param.shape
        assert piece.stride() == torch.empty_like(param).stride()
        piece.fill_(number)
    for number, piece in enumerate(updates.pieces):  # none lies over another
        assert piece.eq(number).all()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("features", FEATURES)
def test_the_step_marks_what_is_held_and_nothing_else(features, fused):
    network, theta = make_network(features), nn.Parameter(torch.zeros(40))
    grads = torch.randn(40)
    grads[::5], grads[1::5], grads[2] = float("nan"), 0.0, -float("inf")
    op = torch.ops.l2l_fast.lstm_step_reference_ if fused is False else torch.ops.l2l_fast.lstm_step_
    call = [[theta.detach()], [grads], [ops.new_state(theta, network.config)], network.flat_weights().detach()]
    for maximize in (False, True):
        fields = *optim.arguments.codes(network.config), 0.3, maximize
        updates = normalize.raw_updates(op, *call, torch.tensor(0.7), [torch.tensor(1.0)], *fields)
        assert torch.equal(normalize.is_held(updates.pieces[0]), ~grads.isfinite())
    assert theta.eq(0).all()


def test_rows_scale_as_their_tensors_do():
    sizes, rows = [4, 1, 6], torch.randn(2, 3, 11, dtype=torch.float64)
    rows[0, 0, :4] = 0.0
    found = normalize.scale_rows(rows, sizes, RMS)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        pieces = rows[tuple(place)].split(sizes)
        expected = torch.cat([reference.scale_to_rms(piece, RMS) for piece in pieces])
        torch.testing.assert_close(found[tuple(place)], expected)


def test_backward_of_scaled_rows_is_autograds():
    sizes, rows = [4, 1, 6], torch.randn(2, 3, 11, dtype=torch.float64)
    rows[0, 0, :4] = 0.0
    rows.requires_grad_()
    d_scaled = torch.randn(2, 3, 11, dtype=torch.float64)
    (expected,) = torch.autograd.grad(normalize.scale_rows(rows, sizes, RMS), rows, d_scaled)
    found = normalize.scale_rows_backward(d_scaled, rows.detach(), sizes, RMS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    start = rows[1, :2, :6].detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: normalize.scale_rows(x, [3, 3], RMS), start)
