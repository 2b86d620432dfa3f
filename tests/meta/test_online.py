"""The online reading of the proposal: its window against plain autograd, and its optimizer against its window."""

import contextlib
import copy
import math
import os
import signal

import pytest
import torch
from torch.utils._pytree import tree_map

import l2l_fast as l2l
from l2l_fast import mlp, reference
from l2l_fast.config import split_weights
from l2l_fast.meta.online import OnlineBackpropagation, OnlineTrajectory, Perturbations, Record, advance_
from l2l_fast.tasks import Classifier, Instances, Quadratic


def network(seed=0, dtype=torch.float64):
    """One whose LSTM does something."""
    torch.manual_seed(seed)
    lstm = l2l.CoordinatewiseLSTM("both", 3, 1, output="tanh", output_scale=0.05)
    return l2l.AdaptiveMLP(l2l.CoordinatewiseMLP(3), lstm).to(dtype)


class Doubles(Quadratic):
    """Quadratics that take parameters of any dtype."""

    def loss(self, params, batch):
        return super().loss(params, tree_map(lambda leaf: leaf.to(params["x"].dtype), batch))


def small_task():
    return Classifier("digits", (3,), batch_size=5, pool=4)


def trajectory_of(task, made, *, seeds=(1, 2), dtype=torch.float64, **options):
    return OnlineTrajectory(Instances(task, seeds), made, dtype=dtype, **options)


def by_hand(task, made, weights, length, windows=1, seed=1):
    """One instance: the equations in plain autograd, gradients and hypergradients held constant in the last window."""
    size, config = made.mlp_weights, made.lstm.config
    instances = Instances(task, [seed])
    theta = instances.start()[0].double()
    draw = lambda: tree_map(lambda leaf: leaf[0], instances.draw())  # noqa: E731

    def loss_and_grad(theta):
        point = theta.detach().requires_grad_()
        with torch.enable_grad():
            loss = task.loss({k: v[0] for k, v in instances.unflatten(point[None]).items()}, batch)
        return loss.detach(), torch.autograd.grad(loss, point)[0]

    batch = draw()
    first, grad = loss_and_grad(theta)
    m, v, delta = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros(size, dtype=torch.float64)
    state = torch.zeros(made.lstm.init_state(torch.empty(1)).shape[-1], size, dtype=torch.float64)
    for window in range(windows):
        if window == windows - 1:
            weights = weights.detach().requires_grad_()
        theta, delta, state, total = theta.detach(), delta.detach(), state.detach(), 0.0
        for t in range(length):
            step = window * length + t + 1
            phi = weights[:size] + delta
            m, v = 0.95 * m + 0.05 * grad, 0.95 * v + 0.05 * grad**2
            root = (v / (1 - 0.95**step) + 1e-16).sqrt()
            small = grad.abs() < math.exp(-10)
            log = torch.where(small, -1.0, torch.where(small, 1.0, grad.abs()).log() / 10)
            z = torch.stack([m / (1 - 0.95**step) / root, grad / root, log,
                             torch.where(small, math.exp(10) * grad, grad.sign())])  # fmt: skip

            def move(phi, z=z, v=v, H=made.mlp.hidden_size):
                hidden = torch.tanh(phi[: 4 * H].view(H, 4) @ z + phi[4 * H : 5 * H, None])
                return torch.where(v > 0, 0.1 * (phi[5 * H : 6 * H] @ hidden + phi[-1]), 0.0)

            theta = theta + move(phi)
            batch = draw()
            loss, grad = loss_and_grad(theta)
            total = total + (loss + grad @ (theta - theta.detach())) / (first + 1e-6)
            with torch.enable_grad():
                leaf = phi.detach().requires_grad_()
                (h,) = torch.autograd.grad(move(leaf) @ grad, leaf)
            u, state = reference.cell(
                h, state, torch.tensor(float(step)), split_weights(weights[size:], config), config
            )
            delta = delta + u
    (gradient,) = torch.autograd.grad(total, weights)
    return total.detach(), gradient, theta.detach(), phi.detach()


@pytest.mark.parametrize("task", [Doubles(3), small_task()], ids=["quadratic", "digits"])
@pytest.mark.parametrize("windows", [1, 2])
def test_the_gradient_of_a_window_is_autograd_s(task, windows):
    made = network()
    weights = made.flat_weights().detach()
    trajectory = trajectory_of(task, made, seeds=[1])
    for _ in range(windows):
        estimate = OnlineBackpropagation("relative").window(trajectory, weights, 6)
    loss, gradient, theta, _ = by_hand(task, made, weights, 6, windows)
    torch.testing.assert_close(estimate.meta_loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(trajectory.theta[0], theta, rtol=1e-10, atol=1e-10)
    assert gradient[: made.mlp_weights].any()
    assert gradient[made.mlp_weights :].any()
    torch.testing.assert_close(estimate.gradient, gradient, rtol=1e-8, atol=1e-10)


def test_scaling_and_instances_side_by_side_are_each_alone():
    made, task = network(), small_task()
    weights = made.flat_weights().detach()
    scaling = torch.rand(2, trajectory_of(task, made).theta.shape[1]).double() + 0.5
    both = trajectory_of(task, made, scaling=scaling)
    found = OnlineBackpropagation().window(both, weights, 4)
    gradients = []
    for i in range(2):
        alone = trajectory_of(task, made, seeds=[i + 1], scaling=scaling[i : i + 1])
        gradients.append(OnlineBackpropagation().window(alone, weights, 4).gradient)
        torch.testing.assert_close(alone.theta[0], both.theta[i], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.gradient, sum(gradients) / 2, rtol=1e-8, atol=1e-10)


def test_copies_are_each_a_network_of_their_own():
    made, task = network(), small_task()
    weights = torch.stack([network(seed).flat_weights().detach() for seed in (0, 1)])
    copies = trajectory_of(task, made, copies=2)
    losses = advance_(copies, weights, copies.next(5), 5)
    for c in range(2):
        alone = trajectory_of(task, made)
        right = advance_(alone, weights[c : c + 1], alone.next(5), 5)
        torch.testing.assert_close(losses[:, 2 * c : 2 * c + 2], right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("persistent", [False, True])
def test_perturbations_estimate_the_gradient_of_the_losses(persistent):
    """Along it, against finite differences of the whole loss; the functions are smooth, sigma is small."""
    made, task = network(), Doubles(3)
    weights = made.flat_weights().detach()

    def loss(weights):
        one = trajectory_of(task, made)
        return advance_(one, weights[None], one.next(3), 3).sum(0).mean()

    exact = torch.stack([
        (loss(weights + step) - loss(weights - step)) / 2e-5 for step in 1e-5 * torch.eye(len(weights)).double()
    ])  # fmt: skip
    draws = []
    for seed in range(12):
        start = trajectory_of(task, made, copies=128)
        draws.append(Perturbations("sum", 64, 1e-3, persistent, seed).window(start, weights, 3).gradient)
    draws = torch.stack(draws)
    error = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert error.square().mean() < 2.0  # 1 is expected of an estimate without bias
    along = (draws.mean(0) @ exact) / exact.square().sum()
    assert abs(along - 1) < 0.1


def test_persistent_perturbations_see_past_the_window():
    """Two windows of T are, summed, the gradient of one of 2 T; evolution strategies of a window are not."""
    made, task = network(), Doubles(3)
    weights = made.flat_weights().detach()

    def loss(weights):
        one = trajectory_of(task, made)
        return advance_(one, weights[None], one.next(6), 6).sum(0).mean()

    exact = torch.stack([
        (loss(weights + step) - loss(weights - step)) / 2e-5 for step in 1e-5 * torch.eye(len(weights)).double()
    ])  # fmt: skip
    along = {}
    for persistent in (False, True):
        total = 0.0
        for seed in range(12):
            start = trajectory_of(task, made, copies=128)
            for _ in range(2):
                total = total + Perturbations("sum", 64, 1e-3, persistent, seed).window(start, weights, 3).gradient / 12
        along[persistent] = ((total @ exact) / exact.square().sum()).item()
    assert abs(along[True] - 1) < 0.15
    assert abs(along[False] - 1) > 2 * abs(along[True] - 1)


# ---------------------------------------------------------------- the optimizer


def parameters(instances):
    start = instances.start().double()
    return [piece[0].clone().requires_grad_() for piece in instances.unflatten(start).values()]


def train(optimizer, params, task, instances, steps):
    losses = []
    for _ in range(steps):
        batch = tree_map(lambda leaf: leaf[0], instances.draw())
        loss = task.loss(dict(zip(instances.shapes, params, strict=True)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_optimizer_goes_where_meta_training_went():
    made, task = network(), small_task()
    trajectory = trajectory_of(task, made, seeds=[1])
    first, record = trajectory.losses.item(), Record()
    right = advance_(trajectory, made.flat_weights().detach()[None], trajectory.next(9), 9, record)[:, 0]
    instances = Instances(task, [1])
    params = parameters(instances)
    optimizer = l2l.MLPOptimizer(params, made)
    losses = train(optimizer, params, task, instances, 10)
    torch.testing.assert_close(losses, [first, *right.tolist()], rtol=1e-9, atol=1e-9)
    assert not torch.equal(optimizer.phi, made.mlp.flat_weights())


@pytest.mark.parametrize("kind", ["adaptive", "frozen", "sgd"])
def test_a_state_dict_goes_on_to_the_last_bit(kind, tmp_path):
    task, made = small_task(), network(dtype=torch.float32)
    second = made if kind == "adaptive" else made.mlp
    sgd = (lambda phi: torch.optim.SGD(phi, lr=0.01, momentum=0.5)) if kind == "sgd" else None

    def fresh():
        instances = Instances(task, [1])
        params = [param.detach().float().requires_grad_() for param in parameters(instances)]
        return instances, params, l2l.MLPOptimizer(params, second, weight_decay=0.01, phi_optimizer=sgd)

    instances, params, optimizer = fresh()
    whole = train(optimizer, params, task, instances, 12)
    instances, params, optimizer = fresh()
    first = train(optimizer, params, task, instances, 6)
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    others, again, other = fresh()
    others.load_state_dict(instances.state_dict())
    with torch.no_grad():
        for param, held in zip(again, saved["params"], strict=True):
            param.copy_(held)
    other.load_state_dict(saved["optimizer"])
    assert first + train(other, again, task, others, 6) == whole
    torch.testing.assert_close(saved["optimizer"]["online"]["phi"], optimizer.phi, rtol=0, atol=0)  # loaded, not shared
    moved = not torch.equal(other.phi, made.mlp.flat_weights())
    assert moved == (kind != "frozen")
    clone = copy.deepcopy(other)
    assert clone.phi is not other.phi
    assert kind == "frozen" or clone._phi_optimizer.param_groups[0]["params"][0] is clone.phi


def test_sgd_on_phi_is_hypergradient_descent():
    made, instances, rate = network().mlp, Instances(Doubles(3), [1]), 0.01
    task, (x,) = Doubles(3), parameters(instances)
    optimizer = l2l.MLPOptimizer([x], made, phi_optimizer=lambda phi: torch.optim.SGD(phi, lr=rate))
    batch = tree_map(lambda leaf: leaf[0], instances.draw())
    (grad,) = torch.autograd.grad(task.loss({"x": x}, batch), x)
    x.grad = grad
    before = x.detach().clone()
    optimizer.step()
    phi = made.flat_weights().detach().requires_grad_()
    point = mlp.observe_(grad[None], torch.zeros(1, 3).double(), torch.zeros(1, 3).double(), 1)
    moved = before + mlp.update(phi[None], point, made.output_scale)[0][0]
    torch.testing.assert_close(moved.detach(), x.detach(), rtol=1e-12, atol=1e-12)
    (h,) = torch.autograd.grad(task.loss({"x": moved}, batch), phi)
    (x.grad,) = torch.autograd.grad(task.loss({"x": x}, batch), x)
    optimizer.step()
    torch.testing.assert_close(optimizer.phi, phi.detach() - rate * h, rtol=1e-10, atol=1e-12)


def test_what_does_not_matter_stays():
    made = network(dtype=torch.float32)
    x = torch.zeros(4, requires_grad=True)
    optimizer = l2l.MLPOptimizer([x], made, lr=0.5, weight_decay=0.1)
    for step in range(4):
        x.grad = torch.tensor([0.0, 1.0, math.nan if step else 1.0, math.inf])
        before, moments = x.detach().clone(), optimizer.state[x].get("exp_avg", torch.zeros(4)).clone()
        optimizer.step()
        assert x[0] == before[0]
        assert x[1] != before[1]
        assert (x[2] == before[2]) == (step > 0)
        assert x[3] == before[3]
        if step:
            assert torch.equal(optimizer.state[x]["exp_avg"][2:], moments[2:])
        assert optimizer.phi.isfinite().all()


def test_groups_have_rates_of_their_own_and_ascend():
    torch.manual_seed(0)
    made = l2l.CoordinatewiseMLP()
    grads = torch.randn(3, 5)
    x, y, z = (torch.zeros(5, requires_grad=True) for _ in range(3))
    optimizer = l2l.MLPOptimizer([{"params": [x]}, {"params": [y], "lr": 0.5}, {"params": z, "maximize": True}], made)
    for grad in grads:
        x.grad, y.grad, z.grad = grad.clone(), grad.clone(), -grad
        optimizer.step()
    torch.testing.assert_close(y, 0.5 * x)
    assert torch.equal(z, x)
    u, _ = made(grads)
    torch.testing.assert_close(u.sum(0), x)


def trainer(**options):
    return l2l.AdaptiveTrainer(l2l.AdaptiveMLP(), "quadratic", **options)


@pytest.mark.parametrize(("make", "error", "why"), [
    (lambda p: l2l.MLPOptimizer([p], l2l.CoordinatewiseLSTM()), TypeError, "LSTMOptimizer steps a CoordinatewiseLSTM"),
    (lambda p: l2l.MLPOptimizer([p], l2l.CoordinatewiseMLP(), lr=-1), ValueError, "lr must be finite"),
    (lambda p: l2l.MLPOptimizer([p], l2l.CoordinatewiseMLP(), maximize=2), ValueError, "maximize must be True"),
    (lambda p: l2l.MLPOptimizer([p], l2l.CoordinatewiseMLP(), phi_optimizer=3), ValueError, "phi_optimizer must be"),
    (lambda p: l2l.MLPOptimizer([p.to(torch.complex64)], l2l.CoordinatewiseMLP()), TypeError, "complex64"),
    (lambda p: l2l.LSTMOptimizer([p], l2l.CoordinatewiseMLP()), TypeError, "MLPOptimizer"),
    (lambda p: l2l.CoordinatewiseMLP(0), ValueError, "hidden_size must be an int of at least 1"),
    (lambda p: l2l.CoordinatewiseMLP(output_scale=0), ValueError, "output_scale must be a positive number"),
    (lambda p: l2l.AdaptiveMLP(3), ValueError, "mlp must be a CoordinatewiseMLP"),
    (lambda p: l2l.AdaptiveMLP(lstm=l2l.CoordinatewiseLSTM(update_rms=0.2)), ValueError, "update_rms of lstm"),
    (lambda p: trainer(imitation=0.5), ValueError, r"imitation must be \(0.0, 0.0\)"),
    (lambda p: trainer(gradient="x"), ValueError, "gradient must be one of"),
    (lambda p: trainer(pair=2), TypeError, "did you mean 'pairs'"),
    (lambda p: l2l.AdaptiveTrainer(l2l.CoordinatewiseMLP(), "quadratic"), ValueError, "network must be an AdaptiveMLP"),
])  # fmt: skip
def test_refuses(make, error, why):
    with pytest.raises(error, match=why):
        make(torch.zeros(2, requires_grad=True))


def test_a_state_dict_of_another_is_refused_and_nothing_changed():
    made = network(dtype=torch.float32)
    x = torch.ones(2, requires_grad=True)
    optimizer = l2l.MLPOptimizer([x], made)
    for _ in range(2):
        x.grad = torch.ones(2)
        optimizer.step()
    good = copy.deepcopy(optimizer.state_dict())
    other = l2l.MLPOptimizer([torch.ones(2, requires_grad=True)], network(1, torch.float32)).state_dict()
    fewer = copy.deepcopy(good)
    fewer["state"][0]["exp_avg"] = torch.zeros(3)
    for bad, why in ((other, "another network"), (fewer, "exp_avg"), (torch.optim.SGD([x]).state_dict(), "no whole")):
        with pytest.raises(ValueError, match=why):
            optimizer.load_state_dict(bad)
        assert torch.equal(optimizer.phi, good["online"]["phi"])
        assert torch.equal(optimizer.state[x]["exp_avg"], good["state"][0]["exp_avg"])
    x.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


# ---------------------------------------------------------------- the networks and the trainer


@pytest.mark.parametrize("kind", [l2l.CoordinatewiseMLP, l2l.AdaptiveMLP])
def test_networks_are_saved_and_told_apart(kind, tmp_path):
    made = kind()
    made.save_pretrained(tmp_path)
    found = kind.from_pretrained(tmp_path)
    assert torch.equal(found.flat_weights(), made.flat_weights())
    assert found.options == made.options
    assert found.rule == made.rule
    other = l2l.AdaptiveMLP if kind is l2l.CoordinatewiseMLP else l2l.CoordinatewiseMLP
    for wrong in (other, l2l.CoordinatewiseLSTM):
        with pytest.raises(ValueError, match=rf"{kind.__name__}.from_pretrained reads it, and MLPOptimizer steps it"):
            wrong.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="flat must be"):
        made.load_flat_weights_(torch.zeros(3))


def test_what_meta_training_as_a_task_learns_is_a_coordinatewise_mlp():
    task, made = l2l.tasks.MetaTraining(Quadratic(3), unroll=4, instances=1), l2l.CoordinatewiseMLP()
    generator = torch.Generator().manual_seed(0)
    params, (starts, batches) = task.init(generator), task.sample(generator)
    made.load_state_dict(params)
    x = starts["x"][0].clone().requires_grad_()
    optimizer, losses = l2l.MLPOptimizer([x], made), []
    batch = tree_map(lambda leaf: leaf[0, 0], batches)
    for _ in range(5):
        loss = task.task.loss({"x": x}, batch)
        x.grad = torch.autograd.grad(loss, x)[0]
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[1:]) / 4 == pytest.approx(task.loss(params, (starts, batches)).item(), rel=1e-5)


def test_both_stand_beside_tuned_baselines():
    torch.manual_seed(0)
    found = l2l.compare("quadratic", {"online": l2l.AdaptiveMLP(), "mlp": l2l.CoordinatewiseMLP()}, horizon=5, seeds=2,
                        baselines=["adam"], tuning_seeds=2)  # fmt: skip
    assert set(found.optimizers) == {"online", "mlp", "adam"}


OPTIONS = {"unroll": 5, "horizon": 12, "instances": 4, "parallel": 2, "meta_lr": 0.01, "average": 0.9,
           "validate_every": 3, "objective": "relative", "scaling": 0.5, "progress": False}  # fmt: skip


@pytest.mark.parametrize("gradient", ["backpropagation", "es", "pes"])
def test_a_run_goes_on_to_the_last_bit(gradient, tmp_path):
    options = OPTIONS | {"gradient": gradient, "pairs": 2}

    def trained(folder, *stops):
        torch.manual_seed(0)
        made = l2l.AdaptiveMLP()
        for stop in stops:
            trainer = l2l.AdaptiveTrainer(made, Quadratic(3), checkpoint=folder, **options)
            with contextlib.suppress(KeyboardInterrupt):
                trainer.fit(9, on_step=_stop_at(stop))
            torch.manual_seed(0)
            result, made = made, l2l.AdaptiveMLP()
        return trainer.history, result.flat_weights()

    whole, right = trained(tmp_path / "whole", 9)
    parts, found = trained(tmp_path / "parts", 4, 7, 9)
    assert parts == whole
    assert torch.equal(found, right)
    assert len(whole.meta_losses) == 9
    with pytest.raises(ValueError, match="belongs to a run with sigma"):
        l2l.AdaptiveTrainer(l2l.AdaptiveMLP(), Quadratic(3), checkpoint=tmp_path / "whole", sigma=0.1, **options).fit(9)


def _stop_at(last):
    """What Ctrl-C does: the request that the loop reads after this meta-step."""
    return lambda done: os.kill(os.getpid(), signal.SIGINT) if done == last < 9 else None


def test_frozen_modules_stay():
    made = l2l.AdaptiveMLP()
    before = made.lstm.flat_weights().detach().clone()
    first = made.mlp.flat_weights().detach().clone()
    made.lstm.requires_grad_(False)
    l2l.AdaptiveTrainer(made, Quadratic(3), **OPTIONS).fit(6)
    assert torch.equal(made.lstm.flat_weights(), before)
    assert not torch.equal(made.mlp.flat_weights(), first)


def test_it_learns():
    torch.manual_seed(0)
    made = l2l.AdaptiveMLP(lstm=l2l.CoordinatewiseLSTM("both", 8, 1, output="tanh", output_scale=0.02))
    trainer = l2l.AdaptiveTrainer(made, Quadratic(3), **OPTIONS | {"instances": 16, "meta_lr": 0.02})
    history = trainer.fit(60)
    assert history.skipped == 0
    assert history.best_score < 0.9 * history.validations[0][1]
