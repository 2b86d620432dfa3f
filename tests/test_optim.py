"""LSTMOptimizer as a citizen of torch.optim."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, build_info, checkpoint, ops, optim
from l2l_fast.config import gradient_limit


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def train(model, optimizer, steps, first=0):
    """Deterministic steps; returns the losses."""
    losses = []
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        inputs = torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        loss = model(inputs.to(model[0].weight.dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters_of(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def test_a_step_is_the_networks_update(network):
    theta = nn.Parameter(torch.randn(7))
    start, grads = theta.detach().clone(), torch.randn(3, 7)
    optimizer = LSTMOptimizer([theta], network)
    for grad in grads:
        theta.grad = grad.clone()
        optimizer.step()
    updates, state = network(grads)
    torch.testing.assert_close(theta.detach(), start + updates.sum(0).detach())
    torch.testing.assert_close(optimizer.state[theta]["lstm"], state.detach())
    assert optimizer.state[theta]["step"] == 3


def test_groups_have_their_own_options(network):
    other = CoordinatewiseLSTM("moments", 3, 1, output="tanh")
    model, alone = make_model(), make_model()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5, "weight_decay": 0.1},
        {"params": model[2].parameters(), "network": other, "maximize": True},
    ]
    optimizer = LSTMOptimizer(groups, network)
    apart = [
        LSTMOptimizer(alone[0].parameters(), network, lr=0.5, weight_decay=0.1),
        LSTMOptimizer(alone[2].parameters(), other, maximize=True),
    ]
    for _ in range(3):
        inputs = torch.randn(8, 5)
        for net, optimizers in ((model, [optimizer]), (alone, apart)):
            net.zero_grad()
            net(inputs).square().mean().backward()
            for each in optimizers:
                each.step()
    torch.testing.assert_close(parameters_of(model), parameters_of(alone))


def test_add_param_group_trains_it_from_then_on(network):
    model = make_model()
    optimizer = LSTMOptimizer(model[0].parameters(), network)
    train(model, optimizer, 2)
    before = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.3})
    train(model, optimizer, 1)
    assert not torch.equal(before, model[2].weight)
    assert optimizer.state[model[0].weight]["step"] == 3
    assert optimizer.state[model[2].weight]["step"] == 1


def test_closure_and_hooks(network):
    theta, called = nn.Parameter(torch.ones(3)), []
    optimizer = LSTMOptimizer([theta], network)
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert called == ["pre", "post"]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_scale_the_update(network, tensor_lr):
    theta = nn.Parameter(torch.zeros(4))
    optimizer = LSTMOptimizer([theta], network, lr=torch.tensor(1.0) if tensor_lr else 1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    grads, updates = torch.randn(3, 4), None
    updates, _ = network(grads)
    expected = torch.zeros(4)
    for t, grad in enumerate(grads):
        theta.grad = grad.clone()
        optimizer.step()
        scheduler.step()
        expected += 0.5**t * updates[t].detach()
    torch.testing.assert_close(theta.detach(), expected)


def _save_and_load(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_continues_exactly(network, dtype, state_dtype):
    unbroken = make_model().to(dtype)
    optimizer = LSTMOptimizer(unbroken.parameters(), network, state_dtype=state_dtype)
    train(unbroken, optimizer, 3)
    resumed = copy.deepcopy(unbroken)
    again = LSTMOptimizer(resumed.parameters(), network, state_dtype=state_dtype)
    again.load_state_dict(_save_and_load(optimizer.state_dict()))
    assert train(unbroken, optimizer, 3, first=3) == train(resumed, again, 3, first=3)
    assert torch.equal(parameters_of(unbroken), parameters_of(resumed))
    assert again.state[resumed[0].weight]["lstm"].dtype == state_dtype


def test_state_dict_moves_between_state_dtypes_and_the_reference(network):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    half = LSTMOptimizer(twin.parameters(), network, state_dtype=torch.bfloat16, fused=False)
    half.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(half.state[theirs]["lstm"], optimizer.state[ours]["lstm"].bfloat16())
    train(twin, half, 2)


def test_loading_keeps_the_fast_layout(network):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 1)
    contiguous = optimizer.state_dict()
    for entry in contiguous["state"].values():
        entry["lstm"] = entry["lstm"].contiguous()
    optimizer.load_state_dict(contiguous)
    weight = model[0].weight
    assert optimizer.state[weight]["lstm"].stride() == ops.new_state(weight, network.config).stride()


def test_state_dict_of_another_network_is_refused_and_nothing_changes(network):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    stranger = LSTMOptimizer(make_model().parameters(), CoordinatewiseLSTM(hidden_size=4, num_layers=2))
    with pytest.raises(ValueError, match=r"param group 0 belongs to network 'log_sign-2x4-"):
        optimizer.load_state_dict(stranger.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, entry in before["state"].items():
        assert torch.equal(entry["lstm"], after["state"][index]["lstm"])


def test_state_dict_of_other_shapes_is_refused(network):
    small, large = nn.Linear(2, 2), nn.Linear(3, 2)
    one, other = LSTMOptimizer(small.parameters(), network), LSTMOptimizer(large.parameters(), network)
    for model, optimizer in ((small, one), (large, other)):
        model(torch.randn(1, model.in_features)).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="parameter 0 of param group 0"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        one.load_state_dict(LSTMOptimizer([{"params": [p]} for p in small.parameters()], network).state_dict())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda saved: saved["state"][1].update(step=torch.ones(4)), "step of parameter 1 of param group 0 .* number"),
        (lambda saved: saved["state"][1].update(step=float("nan")), "step of parameter 1 of param group 0 .* got nan"),
        (lambda saved: saved["state"][1].update(step=None), "step of parameter 1 of param group 0 .* got None"),
        (lambda saved: saved["state"][1].pop("step"), "parameter 1 of param group 0"),
        (lambda saved: saved["state"][1].update(lstm=[0.0]), "parameter 1 of param group 0"),
        (lambda saved: saved["param_groups"][0].pop("lr"), "param group 0 has no lr"),
        (lambda saved: saved["param_groups"][0].pop("weight_decay"), "param group 0 has no weight_decay"),
        (lambda saved: saved["param_groups"][0].update(lr=-1.0), "param group 0: lr must be finite and not negative"),
        (lambda saved: saved["param_groups"][0].update(lr=None), "param group 0: lr must be finite and not negative"),
        (lambda saved: saved["param_groups"][0].update(maximize="no"), "param group 0: maximize must be True or False"),
    ],
)
def test_a_bad_state_dict_is_refused_and_nothing_changes(network, spoil, message):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 2)
    before, bad = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    spoil(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    train(model, optimizer, 1)


@pytest.mark.parametrize("step", [2, 2.0, torch.tensor([2])])
def test_a_step_may_be_saved_as_a_number(network, step):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = step
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    found = optimizer.state[model[0].weight]["step"]
    assert (found.item(), found.dtype, found.shape) == (3.0, torch.float32, ())


@pytest.mark.parametrize(
    "copied", [lambda optimizer: optimizer, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_state_dict_is_loaded_any_number_of_times(network, copied):
    unbroken = make_model()
    optimizer = LSTMOptimizer(unbroken.parameters(), network, weight_decay=0.1)
    train(unbroken, optimizer, 2)
    saved, weights = _save_and_load(optimizer.state_dict()), copy.deepcopy(unbroken.state_dict())
    expected = train(unbroken, optimizer, 3, first=2)
    resumed = make_model()
    again = copied(LSTMOptimizer(resumed.parameters(), network, weight_decay=0.1))
    again.param_groups[0]["params"] = list(resumed.parameters())  # a copy has parameters of its own
    for _ in range(3):
        again.load_state_dict(again.state_dict())  # as Accelerate does to move it
        again.load_state_dict(saved)
        resumed.load_state_dict(weights)
        assert train(resumed, again, 3, first=2) == expected


def test_options_that_an_older_state_dict_lacks_have_their_defaults(network):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["maximize"]
    ascending = LSTMOptimizer(model.parameters(), network, maximize=True)
    ascending.load_state_dict(saved)
    assert ascending.param_groups[0]["maximize"] is False  # as it was for the optimizer of the state_dict
    train(model, ascending, 1)
    pickled = optimizer.__getstate__()
    pickled["param_groups"] = [{k: v for k, v in group.items() if k != "maximize"} for group in pickled["param_groups"]]
    older = LSTMOptimizer.__new__(LSTMOptimizer)
    older.__setstate__(pickled)
    older.step()


@pytest.mark.parametrize("step", [2, 2.0, torch.tensor(2.0, dtype=torch.float64)])
def test_a_step_may_be_put_into_the_state_as_a_number(network, step):
    theta = nn.Parameter(torch.ones(2))
    optimizer, theta.grad = LSTMOptimizer([theta], network), torch.ones(2)
    optimizer.step()
    optimizer.state[theta]["step"] = step
    optimizer.step()
    assert optimizer.state[theta]["step"] == 3


def test_a_step_on_another_device_is_brought_to_the_parameter(network):
    """ZeroRedundancyOptimizer leaves it on the CPU when it loads."""
    theta = nn.Parameter(torch.ones(2, device="meta"))
    optimizer, theta.grad = LSTMOptimizer([theta], network), torch.ones(2, device="meta")
    optimizer.step()
    optimizer.state[theta]["step"] = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.state[theta]["step"].is_meta


def test_looking_at_state_that_is_not_there_yet_does_no_harm(network):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    assert not optimizer.state[model[0].weight]  # leaves an empty entry
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 1)


def test_state_dict_hooks_are_respected(network):
    model = make_model()
    optimizer = LSTMOptimizer(model.parameters(), network)
    train(model, optimizer, 1)
    saved, seen = optimizer.state_dict(), []

    def zero(_, state_dict):
        return state_dict | {"state": {i: e | {"lstm": 0 * e["lstm"]} for i, e in state_dict["state"].items()}}

    optimizer.register_load_state_dict_pre_hook(zero)
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state[model[0].weight]["lstm"].any()))
    optimizer.load_state_dict(saved)
    assert seen == [False]


def test_pickle_and_deepcopy(network):
    theta = nn.Parameter(torch.randn(4))
    optimizer = LSTMOptimizer([theta], network, weight_decay=0.1)
    theta.grad = torch.randn(4)
    optimizer.step()
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        (copied,) = twin.param_groups[0]["params"]
        copied.grad = torch.ones(4)
        twin.step()
    theta.grad = torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(copied, theta)


def test_training_the_network_further_does_not_change_the_optimizer(network):
    one, two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    first = LSTMOptimizer([one], network)
    second = LSTMOptimizer([two], copy.deepcopy(network))
    with torch.no_grad():
        network.head.weight.add_(1.0)
    for theta, optimizer in ((one, first), (two, second)):
        theta.grad = torch.ones(3)
        optimizer.step()
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128])
def test_parameters_of_every_dtype(network, dtype):
    start = torch.randn(6, dtype=dtype)
    grad = torch.randn(6, dtype=dtype)
    theta = nn.Parameter(start.clone())
    optimizer = LSTMOptimizer([theta], network)
    theta.grad = grad.clone()
    optimizer.step()
    assert theta.dtype == dtype
    real = (lambda t: torch.view_as_real(t).reshape(-1)) if dtype.is_complex else (lambda t: t)
    updates, _ = network(real(grad).float()[None])
    expected = (real(start).float() + updates[0].detach()).to(real(start).dtype)
    torch.testing.assert_close(real(theta.detach()), expected)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("lazy", [torch.conj, lambda z: z.conj().imag, torch._neg_view])
def test_gradients_that_put_off_a_sign(network, fused, lazy):
    grad = lazy(torch.randn(6, dtype=torch.complex64))
    one, two = (nn.Parameter(torch.ones(6, dtype=grad.dtype)) for _ in range(2))
    one.grad, two.grad = grad, grad.resolve_conj().resolve_neg()
    assert one.grad.is_conj() or one.grad.is_neg()
    for theta in (one, two):
        LSTMOptimizer([theta], network, fused=fused).step()
    assert torch.equal(one, two)


@pytest.mark.parametrize("fused", [None, False])
def test_float64_parameters_keep_their_precision(network, fused):
    theta = nn.Parameter(torch.tensor([1.0 + 2.0**-40], dtype=torch.float64))
    start = theta.detach().clone()
    theta.grad = torch.ones(1, dtype=torch.float64)
    LSTMOptimizer([theta], network, fused=fused).step()
    updates, _ = network(torch.ones(1, 1))
    torch.testing.assert_close(theta.detach() - start, updates[0].detach().double(), rtol=1e-6, atol=1e-12)


def test_awkward_parameters(network):
    transposed = nn.Parameter(torch.randn(4, 3).T)
    empty, no_grad, scalar = (
        nn.Parameter(torch.zeros(0, 3)),
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.tensor(1.0)),
    )
    before = transposed.detach().clone()
    optimizer = LSTMOptimizer([transposed, empty, no_grad, scalar], network)
    transposed.grad, empty.grad, scalar.grad = torch.ones(4, 3).T, torch.zeros(0, 3), torch.tensor(2.0)
    optimizer.step()
    assert (transposed != before).all()
    assert torch.equal(no_grad, torch.ones(2))
    assert no_grad not in optimizer.state
    assert scalar != 1.0


def test_a_gradient_that_is_not_finite_leaves_its_coordinate_alone(network):
    theta = nn.Parameter(torch.randn(5))
    optimizer = LSTMOptimizer([theta], network, weight_decay=0.1)
    theta.grad = torch.randn(5)
    optimizer.step()
    before, state = theta.detach().clone(), optimizer.state[theta]["lstm"].clone()
    theta.grad = torch.tensor([1.0, float("nan"), float("inf"), float("-inf"), 1.0])
    optimizer.step()
    kept = ~theta.grad.isfinite()
    assert torch.equal(theta[kept], before[kept])
    assert torch.equal(optimizer.state[theta]["lstm"][kept], state[kept])
    assert (theta[~kept] != before[~kept]).all()


def test_error_if_nonfinite_raises_before_anything_changes(network):
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LSTMOptimizer([("good", good), ("bad", bad)], network, error_if_nonfinite=True)
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, float("nan")])
    with pytest.raises(RuntimeError, match="parameter 'bad' has a gradient that is not finite"):
        optimizer.step()
    assert torch.equal(good, torch.ones(2))
    assert not optimizer.state


def test_finite_is_what_the_arithmetic_can_hold(network):
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    theta.grad = torch.full((1,), 1e60, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not finite"):
        LSTMOptimizer([theta], network, error_if_nonfinite=True).step()
    LSTMOptimizer([theta], network, error_if_nonfinite=True, state_dtype=torch.float64).step()
    assert theta.item() != 0


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("state_dtype", optim.STATE_DTYPES)
@pytest.mark.parametrize("spike", [1e20, -3e38])
def test_a_coordinate_comes_back_from_a_gradient_whose_square_overflows(fused, state_dtype, spike):
    theta = nn.Parameter(torch.zeros(2))
    optimizer = LSTMOptimizer([theta], "l2l-small", state_dtype=state_dtype, fused=fused)
    for t in range(600):
        theta.grad = 2 * (theta.detach() - 1)
        if t == 20 and state_dtype != torch.float64:  # which can square it
            theta.grad[0] = spike
        optimizer.step()
    assert optimizer.state[theta]["lstm"].isfinite().all()
    assert (theta.detach() - 1).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_error_if_nonfinite_means_what_the_step_does(dtype):
    theta, network = nn.Parameter(torch.zeros(2, dtype=dtype)), CoordinatewiseLSTM("both", 4, 1)
    limit = gradient_limit(network.config, torch.float32, torch.float32)
    optimizer = LSTMOptimizer([theta], network, error_if_nonfinite=True)
    for size, error in ((0.99 * limit, False), (limit, True), (1e20, True)):
        before, theta.grad = theta.detach().clone(), torch.tensor([1.0, size]).to(dtype)
        if error:
            with pytest.raises(RuntimeError, match=r"parameter 0 .* has a gradient that is not finite"):
                optimizer.step()
            assert torch.equal(theta, before)
        else:
            optimizer.step()
            assert (theta != before).all()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(network, fused, dtype):
    found = []
    for enabled in (False, True):
        model = make_model()
        optimizer = LSTMOptimizer(model.parameters(), network, fused=fused)
        for t in range(3):
            for param in model.parameters():
                param.grad = torch.full_like(param, 0.1 + t)
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                optimizer.step()
        found.append(parameters_of(model))
    assert torch.equal(*found)


def test_sparse_gradients_are_refused_before_anything_changes(network):
    dense, embedding = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimizer = LSTMOptimizer([dense, embedding.weight], network)
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 1 of param group 0 \(shape \(4, 2\)\).*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda theta, group: setattr(theta, "data", torch.ones(1).expand(2)),
        lambda theta, group: group.update(lr=torch.ones(2)),
        lambda theta, group: group.update(weight_decay=[0.1]),
        lambda theta, group: group.update(network="another"),
    ],
    ids=["expanded", "lr", "weight_decay", "network"],
)
def test_what_stops_one_parameter_stops_all_before_anything_changes(network, fused, together, spoil):
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [good, bad] if together else [{"params": [good]}, {"params": [bad]}]
    optimizer = LSTMOptimizer(groups, network, fused=fused)
    good.grad = torch.ones(2)
    optimizer.step()
    bad.grad = torch.ones(2)
    spoil(bad, optimizer.param_groups[-1])
    before = good.detach().clone(), optimizer.state[good]["lstm"].clone()
    for _ in range(2):  # what was refused leaves no trace that would let it pass
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            optimizer.step()
    assert torch.equal(good, before[0])
    assert torch.equal(optimizer.state[good]["lstm"], before[1])
    assert optimizer.state[good]["step"] == 1


@pytest.mark.parametrize("fused", [None, False])
def test_autograd_refuses_a_graph_whose_parameters_have_moved(network, fused):
    theta = nn.Parameter(torch.ones(2))
    first, second = (theta * theta).sum(), (theta**3).sum()
    first.backward(retain_graph=True)
    LSTMOptimizer([theta], network, fused=fused).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_steps_under_inference_mode(network):
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer, other = LSTMOptimizer([one], network), LSTMOptimizer([two], network)
    for _ in range(2):
        one.grad, two.grad = torch.ones(2), torch.ones(2)
        other.step()
        with torch.inference_mode():
            optimizer.step()
    assert torch.equal(one, two)


@pytest.mark.parametrize("fused", [None, False])
def test_what_inference_mode_makes_serves_outside_it(network, fused):
    optim._shipped.cache_clear()
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    one.grad, two.grad = torch.ones(2), torch.ones(2)
    expected = LSTMOptimizer([two], "l2l-small", fused=fused)
    with torch.inference_mode():
        optimizer = LSTMOptimizer([one], "l2l-small", fused=fused)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
    for lr in (1.0, 1.0, 0.5):
        expected.param_groups[0]["lr"] = lr
        expected.step()
    assert torch.equal(one, two)
    assert not any(value.is_inference() for value in optimizer.state[one].values())


def test_lr_is_exact_in_float64(network):
    moves = {}
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64), 1.0):
        theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        theta.grad = torch.ones_like(theta)
        LSTMOptimizer([theta], network, lr=lr, state_dtype=torch.float64).step()
        moves[lr] = theta.item()
    assert list(moves.values())[:2] == pytest.approx([0.1 * moves[1.0]] * 2, rel=1e-14)


def test_making_an_optimizer_draws_nothing():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.device("meta"):
        LSTMOptimizer([nn.Parameter(torch.ones(1, device="cpu"))], "l2l-base")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("network", ["l2l-base", "l2l-base-v1", "l2l-small"])
def test_optimizers_by_name_share_what_was_read(network, monkeypatch):
    """So that one for each parameter costs nothing (gradients that are applied in backward)."""
    read, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda contents: read.append(contents) or load(contents))
    optim._shipped.cache_clear()
    params = [nn.Parameter(torch.ones(3)) for _ in range(200)]
    LSTMOptimizer(params, network)
    calls = []
    # Calls are counted, not seconds: a count is the same on a busy machine and under a coverage tracer.
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        optimizers = [LSTMOptimizer([param], network) for param in params]
    finally:
        sys.setprofile(None)
    assert len(read) == 1
    assert len(calls) < 300 * len(params), f"{len(calls) / len(params):.0f} calls for each optimizer"
    for param, optimizer in zip(params, optimizers, strict=True):
        param.grad = torch.ones(3)
        optimizer.step()
    assert all(torch.equal(param, params[0]) for param in params)
    assert params[0][0] != 1


@pytest.mark.parametrize("make_network", [lambda: "l2l-base", lambda: CoordinatewiseLSTM("both", 4, 1)])
@pytest.mark.parametrize("state_dtype", optim.STATE_DTYPES)
def test_fake_tensors_are_stepped_without_values(make_network, state_dtype, tmp_path):
    """As estimators of memory do; what is made under the mode must not be found outside it."""
    outside = make_network()
    folder = tmp_path / "network"
    CoordinatewiseLSTM("both", 4, 1).save_pretrained(folder)
    optim._shipped.cache_clear()
    with FakeTensorMode():
        for given in (make_network(), outside, folder):
            model = nn.Linear(4, 2)
            optimizer = LSTMOptimizer(model.parameters(), given, state_dtype=state_dtype, error_if_nonfinite=True)
            for _ in range(2):
                model(torch.ones(3, 4)).sum().backward()
                optimizer.step()
            state = optimizer.state[model.weight]["lstm"]
            assert state.shape[:2] == (2, 4)
            assert state.dtype == state_dtype
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
    theta = nn.Parameter(torch.ones(2))
    theta.grad = torch.ones(2)
    LSTMOptimizer([theta], outside).step()
    assert (theta != 1).all()


def test_a_network_without_weights_is_refused():
    with torch.device("meta"):
        network = CoordinatewiseLSTM()
    with pytest.raises(ValueError, match="network has no weights yet, they are on the meta device"):
        LSTMOptimizer([nn.Parameter(torch.ones(1))], network)


def test_fused_is_the_compiled_kernel_or_an_error(network):
    theta = nn.Parameter(torch.ones(2))
    if build_info()["native"]:
        LSTMOptimizer([theta], network, fused=True)
    else:
        with pytest.raises(RuntimeError, match=r"compiled kernels for the device cpu: (not built|switched off)"):
            LSTMOptimizer([theta], network, fused=True)
    with pytest.raises(RuntimeError, match="compiled kernels for the device meta: there are none"):
        LSTMOptimizer([theta.to("meta")], network, fused=True)
    moved = nn.Parameter(theta.detach().to("meta"))
    optimizer = LSTMOptimizer([moved], network)
    optimizer.fused, moved.grad = True, torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="compiled kernels for the device meta: there are none"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": torch.tensor(float("nan"))}, ValueError, "lr must be finite"),
        ({"lr": "1"}, ValueError, "lr must be finite and not negative, got '1'"),
        (
            {"network": nn.Linear(2, 2)},
            TypeError,
            "network must be a CoordinatewiseLSTM, a shipped name, .* got .*Linear",
        ),
        ({"network": None}, TypeError, "network must be a CoordinatewiseLSTM, a shipped name, .* got NoneType"),
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number or a tensor of one element"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and not negative, got -0.1"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be one of torch.float32, torch.bfloat16"),
        ({"network": "no-such-network"}, FileNotFoundError, "no network 'no-such-network'"),
        ({"maximize": "no"}, ValueError, "maximize must be True or False, got 'no'"),
        ({"fused": "yes"}, ValueError, "fused must be True, False or None, got 'yes'"),
        ({"error_if_nonfinite": "raise"}, ValueError, "error_if_nonfinite must be True or False, got 'raise'"),
    ],
)
def test_bad_options_are_named(network, arguments, error, message):
    with pytest.raises(error, match=message):
        LSTMOptimizer([nn.Parameter(torch.ones(1))], **{"network": network} | arguments)


def test_integer_parameters_are_refused(network):
    with pytest.raises(TypeError, match=r"parameter number 1 of its group is torch.int64"):
        LSTMOptimizer([torch.zeros(2), torch.zeros(2, dtype=torch.int64)], network)


def test_parameters_that_put_off_a_sign_are_refused(network):
    with pytest.raises(ValueError, match=r"number 0 of its group is a view that conjugates.*resolve_conj\(\)"):
        LSTMOptimizer([torch.ones(2, dtype=torch.complex64).conj()], network)


def test_a_group_that_is_refused_is_not_added(network):
    optimizer = LSTMOptimizer([nn.Parameter(torch.ones(1))], network)
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("option", "value", "own"),
    [
        ("state_dtype", torch.bfloat16, torch.float32),
        ("fused", False, None),
        ("fused", True, None),
        ("error_if_nonfinite", True, False),
    ],
)
def test_options_of_the_whole_optimizer_are_refused_in_a_group(network, option, value, own):
    theta, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=f"{option} of a param group must be the optimizer's, {own}: .* got"):
        LSTMOptimizer([{"params": [theta], option: value}], network)
    optimizer = LSTMOptimizer([theta], network)
    with pytest.raises(ValueError, match=f"{option} of a param group must be the optimizer's, {own}: .* got"):
        optimizer.add_param_group({"params": [other], option: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [other], option: own})
    assert option not in optimizer.param_groups[1]


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"weight_decay": float("inf")}, {"maximize": 2}])
def test_a_bad_default_is_refused_where_every_group_has_its_own(network, bad):
    (name,) = bad
    group = {"params": [nn.Parameter(torch.ones(1))], "lr": 1.0, "weight_decay": 0.0, "maximize": False}
    with pytest.raises(ValueError, match=f"{name} must be"):
        LSTMOptimizer([group], network, **bad)


def test_a_group_that_is_no_dict_is_refused(network):
    optimizer = LSTMOptimizer([nn.Parameter(torch.ones(1))], network)
    with pytest.raises(TypeError, match="param_group must be a dict, got list"):
        optimizer.add_param_group([nn.Parameter(torch.ones(1))])


def test_a_network_is_not_replaced(network):
    theta = nn.Parameter(torch.ones(1))
    theta.grad = torch.ones(1)
    optimizer = LSTMOptimizer([theta], network)
    optimizer.param_groups[0]["network"] = "l2l-small"
    with pytest.raises(ValueError, match=r"network of a param group must be one .* added with, got 'l2l-small'"):
        optimizer.step()
    assert theta.item() == 1


def test_sets_of_parameters_are_refused_by_torch(network):
    with pytest.raises(TypeError, match="ordered collection"):
        LSTMOptimizer([{"params": {nn.Parameter(torch.ones(1))}}], network)


def test_reference_on_request_equals_the_dispatchers_choice(network):
    one, two = make_model(), make_model()
    first, second = LSTMOptimizer(one.parameters(), network), LSTMOptimizer(two.parameters(), network, fused=False)
    torch.testing.assert_close(train(one, first, 5), train(two, second, 5))


def test_parameters_in_bfloat16_state_stay_near_float32(network):
    one, two = make_model(), make_model()
    train(one, LSTMOptimizer(one.parameters(), network), 20)
    train(two, LSTMOptimizer(two.parameters(), network, state_dtype=torch.bfloat16), 20)
    torch.testing.assert_close(parameters_of(one), parameters_of(two), rtol=0.02, atol=0.02)


def test_a_compiled_step_is_the_same_step(network):
    one, two = make_model(), make_model()
    plain, compiled = LSTMOptimizer(one.parameters(), network), LSTMOptimizer(two.parameters(), network)
    step = torch.compile(lambda: compiled.step(), backend="aot_eager", fullgraph=True)
    for _ in range(4):
        inputs = torch.randn(7, 5)
        for model in (one, two):
            model.zero_grad()
            model(inputs).square().mean().backward()
        plain.step()
        step()
    torch.testing.assert_close(parameters_of(one), parameters_of(two))
    assert compiled.state[two[0].weight]["step"] == 4


@pytest.mark.parametrize("schedule", ["ExponentialLR", "StepLR", "LambdaLR"])
def test_a_schedule_of_the_learning_rate_compiles_two_graphs(network, schedule):
    options = {"ExponentialLR": {"gamma": 0.9}, "StepLR": {"step_size": 4}, "LambdaLR": {"lr_lambda": lambda t: t / 10}}
    one, two = make_model(), make_model()
    plain, compiled = LSTMOptimizer(one.parameters(), network), LSTMOptimizer(two.parameters(), network)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)  # schedulers wrap the optimizer's own
    compiled._opt_called = True  # or they would warn, not seeing the compiled one
    schedules = [getattr(torch.optim.lr_scheduler, schedule)(each, **options[schedule]) for each in (plain, compiled)]
    for t in range(20):
        for param in [*one.parameters(), *two.parameters()]:
            param.grad = torch.full_like(param, 0.1 * t - 0.5)
        plain.step()
        step()
        for each in schedules:
            each.step()
    assert counters["unique_graphs"] - before <= 2
    torch.testing.assert_close(parameters_of(one), parameters_of(two), rtol=0, atol=0)
