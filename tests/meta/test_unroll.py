"""The meta-gradient against plain autograd through the trajectory, in float64."""

import dataclasses

import pytest
import torch

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, reference
from l2l_fast.config import FEATURES
from l2l_fast.meta.estimators import Imitation, SecondDerivatives, TruncatedBackpropagation
from l2l_fast.meta.unroll import (
    OBJECTIVES,
    Rule,
    Trajectory,
    loss_weights,
    suffix_sums,
    window_,
)
from l2l_fast.tasks import Instances, ModuleTask, Quadratic


class DoubleQuadratic(Quadratic):
    """Quadratics in float64, whose losses stay positive for the log objective."""

    def sample(self, generator):
        return tuple(tensor.double() for tensor in super().sample(generator))

    def loss(self, params, batch):
        return super().loss({"x": params["x"].double()}, batch)


class ThreeTensors:
    """A least-squares problem in three tensors, in float64."""

    name, resample = "three-tensors", True

    def init(self, generator):
        shapes = {"weight": (3, 2), "bias": (3,), "scale": ()}
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            for name, shape in shapes.items()
        }

    def sample(self, generator):
        return torch.randn(5, 2, generator=generator, dtype=torch.float64)

    def loss(self, params, batch):
        found = (batch @ params["weight"].T + params["bias"]).tanh() * params["scale"]
        return (found - batch.sum(1, keepdim=True)).square().mean() + 0.1


def unroll(trajectory, rule, length, **options):
    return TruncatedBackpropagation(rule, **options).prepare(trajectory, length)()


def unroll_second_derivatives(trajectory, rule, length, **options):
    return SecondDerivatives(rule, **options).prepare(trajectory, length)()


def make(features="log_sign", layers=2, projection=False, scaling=None, task=None, linear_path=False, **options):
    torch.manual_seed(0)
    network = CoordinatewiseLSTM(features, 4, layers, projection=projection, linear_path=linear_path).double()
    if linear_path:
        torch.nn.init.uniform_(network.head.weight, -0.5, 0.5)  # zero at first, when nothing below has a gradient
    rule = Rule(network.config, network.flat_weights().detach(), **{"lr": 0.7, "weight_decay": 0.05, **options})
    return rule, Trajectory(Instances(task or DoubleQuadratic(6), [1, 2, 3]), rule.config, torch.float64, scaling)


def make_normalized(features="both", scaling=None):
    return make(features, scaling=scaling, task=ThreeTensors(), lr=0.2, update_rms=0.6)


def scaled(updates, rule, sizes):
    """[..., N] of one instance's tensors after another, each by itself through the reference's rule."""
    if rule.update_rms is None:
        return updates
    rows = [
        torch.cat([reference.scale_to_rms(piece, rule.update_rms) for piece in row.split(sizes)])
        for row in updates.reshape(-1, sum(sizes))
    ]
    return torch.stack(rows).view(updates.shape)


def autograd(rule, trajectory, length, objective, weights=None, *, detach):
    """The same truncation with nothing clever: a graph through every step, gradients detached or not."""
    phi = rule.weights.clone().requires_grad_()
    theta, grad = trajectory.theta, trajectory.grad
    state = trajectory.state.reshape(theta.numel(), -1)
    losses = []
    for t in range(length):
        step = torch.tensor(trajectory.steps_done + t + 1.0)
        updates, state = reference.lstm_unroll(grad.reshape(1, -1), state, phi, step, *rule.config)
        theta = (
            theta
            - rule.lr * rule.weight_decay * theta
            + rule.lr * scaled(updates.view_as(theta), rule, trajectory.sizes)
        )
        loss, grad = trajectory.evaluate(theta, create_graph=True)
        grad = grad.detach() if detach else grad
        losses.append(loss)
    meta_loss, _ = loss_weights(objective, torch.stack(losses), trajectory.first_losses, weights)
    return meta_loss, torch.autograd.grad(meta_loss, phi)[0]


def assert_same(found, expected):
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=0)
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert error < 1e-10, f"relative error {error:.1e}"


@pytest.mark.parametrize("length", [1, 2, 20])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("features", FEATURES)
def test_suffix_sums_are_autograd_through_detached_gradients(features, layers, objective, length):
    rule, trajectory = make(features, layers, projection=layers == 2, linear_path=layers > 1)
    expected = autograd(rule, trajectory, length, objective, detach=True)
    assert_same(unroll(trajectory, rule, length, objective=objective), expected)


@pytest.mark.parametrize("length", [1, 2, 20])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("linear_path", [False, True])
def test_second_derivatives_are_full_autograd(features, objective, length, linear_path):
    rule, trajectory = make(features, linear_path=linear_path)
    expected = autograd(rule, trajectory, length, objective, detach=False)
    detached = autograd(rule, trajectory, length, objective, detach=True)
    assert_same(unroll_second_derivatives(trajectory, rule, length, objective=objective), expected)
    if length > 1:  # and they are not the first-order gradient under another name
        assert (expected[1] - detached[1]).norm() / detached[1].norm() > 1e-8


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("length", [1, 2, 20])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("features", FEATURES)
def test_updates_scaled_per_tensor_have_the_meta_gradient_of_autograd(features, objective, length, second):
    walk = unroll_second_derivatives if second else unroll
    (rule, trajectory), (_, twin) = make_normalized(features), make_normalized(features)
    for one in (trajectory, twin):
        walk(one, rule, 2)  # so that the state is somewhere
    expected = autograd(rule, twin, length, objective, detach=not second)
    assert_same(walk(trajectory, rule, length, objective=objective), expected)
    if length > 1 and not second:  # the scaling has a part in it
        plain = dataclasses.replace(rule, update_rms=None)
        *_, other = unroll(make_normalized(features)[1], plain, length, objective=objective)
        assert (other - expected[1]).norm() / expected[1].norm() > 1e-3


def test_scaled_updates_meet_random_scaling_and_loss_weights():
    weights, scaling = torch.linspace(0, 2, 5, dtype=torch.float64), torch.rand(3, 10, dtype=torch.float64) + 0.5
    (rule, trajectory), (_, twin) = make_normalized(scaling=scaling), make_normalized(scaling=scaling)
    expected = autograd(rule, twin, 5, "sum", weights, detach=True)
    assert_same(unroll(trajectory, rule, 5, weights=weights), expected)


def test_scaled_updates_walk_as_the_optimizer_does():
    """Three optimizers, one for each instance, on tensors of their own."""
    rule, trajectory = make_normalized()
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("both", 4, 2, update_rms=0.6).double()
    instances, thetas = Instances(ThreeTensors(), [1, 2, 3]), []
    starts = instances.unflatten(instances.start().double())
    batches = [instances.draw() for _ in range(5)]
    for number in range(3):
        params = [torch.nn.Parameter(start[number].clone()) for start in starts.values()]
        optimizer = LSTMOptimizer(params, network, lr=0.2, weight_decay=0.05, state_dtype=torch.float64)
        optimizer._networks = {  # the weights in float64, which otherwise pass through float32's
            name: held._replace(weights=rule.weights) for name, held in optimizer._networks.items()
        }
        for batch in batches[:4]:
            optimizer.zero_grad()
            ThreeTensors().loss(dict(zip(starts, params, strict=True)), batch[number]).backward()
            optimizer.step()
        thetas.append(torch.cat([param.detach().reshape(-1) for param in params]))
    unroll(trajectory, rule, 4)
    torch.testing.assert_close(trajectory.theta, torch.stack(thetas))


def test_scaled_updates_leave_what_is_not_finite():
    rule, trajectory = make_normalized()
    trajectory.grad[1, 2], before = torch.nan, trajectory.theta[1, 2].clone()
    unroll(trajectory, rule, 1)
    assert trajectory.theta[1, 2] == before
    assert trajectory.theta.isfinite().all()


@pytest.mark.parametrize("coordinates", [4, 29])
def test_sampled_coordinates_of_scaled_updates_have_no_bias(coordinates):
    """Averaged over the one random number of a window, the estimate is the gradient: exactly, over a whole period."""
    rule, trajectory = make_normalized()
    *_, expected = unroll(make_normalized()[1], rule, 6)
    found = []
    start = trajectory.state_dict()
    for key in ("theta", "state", "losses", "grad", "first_losses"):
        start[key] = start[key].clone()
    batches, shifts = trajectory.next(6), 2000
    for number in range(shifts):
        trajectory.load_state_dict({**start, "instances": trajectory.instances.state_dict()})
        trajectory.shift.fill_((number + 0.5) / shifts)
        found.append(window_(trajectory, rule, batches, 6, coordinates=coordinates).gradient)
    mean = torch.stack(found).mean(0)
    assert (mean - expected).norm() < 2e-3 * expected.norm()


class InDouble(torch.nn.Module):
    """Computes in the dtype of its parameters, which a task draws in float32."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, torch.nn.Linear(3, 1)

    def forward(self, x):
        found = self.layer(x.to(self.head.weight.dtype))
        return self.head(found[0] if isinstance(found, tuple) else found)


OPTIMIZEES = {
    "lstm": lambda: torch.nn.LSTM(2, 3, batch_first=True),
    "gru": lambda: torch.nn.GRU(2, 3, batch_first=True),
    "batch normalised": lambda: torch.nn.Sequential(
        torch.nn.Linear(2, 3),
        torch.nn.Flatten(0, 1),
        torch.nn.BatchNorm1d(3, track_running_stats=False),
        torch.nn.Unflatten(0, (-1, 4)),
    ),
}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", OPTIMIZEES)
def test_optimizees_of_every_kind_have_the_meta_gradient_of_autograd(name, second):
    x = torch.linspace(-2, 2, 80).view(10, 4, 2).sin()
    task = ModuleTask(
        lambda: InDouble(OPTIMIZEES[name]()), (x, x.sum(2, keepdim=True)), lambda out, y: (out - y).square().mean(),
        batch_size=6,
    )  # fmt: skip
    assert task.vmap == (name == "batch normalised")
    network = CoordinatewiseLSTM("moments", 4, 1).double()
    rule = Rule(network.config, network.flat_weights().detach(), lr=0.7, weight_decay=0.05)
    walk = unroll_second_derivatives if second else unroll
    runs = []
    for _ in range(2):
        trajectory = Trajectory(Instances(task, [1, 2, 3]), rule.config, torch.float64)
        walk(trajectory, rule, 2)  # so that the state is somewhere
        runs.append(trajectory)
    expected = autograd(rule, runs[0], 4, "sum", detach=not second)
    assert_same(walk(runs[1], rule, 4), expected)


def test_loss_weights_and_scaling_enter_the_gradient():
    weights = torch.linspace(0, 2, 5, dtype=torch.float64)
    scaling = torch.rand(3, 6, dtype=torch.float64) + 0.5
    rule, trajectory = make(scaling=scaling)
    expected = autograd(rule, trajectory, 5, "sum", weights, detach=True)
    assert_same(unroll(trajectory, rule, 5, weights=weights), expected)


def test_the_second_window_goes_on_from_the_first():
    rule, trajectory = make("moments")
    unroll(trajectory, rule, 4)
    expected = autograd(rule, trajectory, 3, "log", detach=True)
    assert_same(unroll(trajectory, rule, 3, objective="log"), expected)
    assert trajectory.steps_done == 7


def test_both_ways_walk_the_same_trajectory():
    (rule, one), (_, two) = make("both"), make("both")
    first, second = unroll(one, rule, 6), unroll_second_derivatives(two, rule, 6)
    torch.testing.assert_close(first.meta_loss, second.meta_loss)
    torch.testing.assert_close(one.losses, two.losses)
    torch.testing.assert_close((one.theta, one.grad, one.state), (two.theta, two.grad, two.state))


def test_random_scaling_minimises_the_same_function():
    scaling = torch.rand(3, 6, dtype=torch.float64) + 0.5
    (_, plain), (_, scaled) = make(), make(scaling=scaling)
    torch.testing.assert_close(plain.losses, scaled.losses)
    torch.testing.assert_close(scaled.theta * scaling, plain.theta)
    torch.testing.assert_close(scaled.grad, plain.grad * scaling)


def test_suffix_sums_by_hand():
    grads = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    d_losses = torch.tensor([[1.0], [10.0], [100.0]])
    lr, decay = 0.5, 0.2
    a = 1 - lr * decay
    expected = [lr * (1 + a * 20 + a * a * 400), lr * (20 + a * 400), lr * 400]
    torch.testing.assert_close(suffix_sums(grads, d_losses, lr, decay).view(-1), torch.tensor(expected))


@pytest.mark.parametrize("update_rms", [None, 0.6])
@pytest.mark.parametrize(("lr", "decay"), [(1.0, 0.0), (0.5, 0.2)])
def test_imitation_gradient_is_autograds(lr, decay, update_rms):
    rule, trajectory = make("moments")
    rule = dataclasses.replace(rule, lr=lr, weight_decay=decay, update_rms=update_rms)
    teacher = torch.optim.Adam([trajectory.theta], lr=0.01)
    start, grad = trajectory.theta.clone(), trajectory.grad.clone()
    state = trajectory.state.reshape(18, -1).clone()
    meta_loss, d_weights = Imitation(rule, teacher).prepare(trajectory, 5)()
    # A second run of the teacher alone gives the moves to imitate.
    _, twin = make("moments")
    teacher, grads, thetas, moves = torch.optim.Adam([twin.theta], lr=0.01), [], [], []
    torch.testing.assert_close((twin.theta, twin.grad), (start, grad))
    for _ in range(5):
        before = twin.theta.clone()
        twin.theta.grad = twin.grad
        grads.append(twin.grad.reshape(-1))
        thetas.append(before.reshape(-1))
        teacher.step()
        moves.append((twin.theta - before).reshape(-1))
        twin.losses, twin.grad = twin.evaluate(twin.theta)
    torch.testing.assert_close(trajectory.theta, twin.theta)
    torch.testing.assert_close(trajectory.losses, twin.losses)
    phi = rule.weights.clone().requires_grad_()
    updates, last = reference.lstm_unroll(torch.stack(grads), state, phi, torch.tensor(1.0), *rule.config)
    updates = scaled(updates, rule, [6] * 3)
    learned = lr * updates - lr * decay * torch.stack(thetas)
    expected = 0.5 * (learned - torch.stack(moves)).square().sum() / 18
    assert_same((meta_loss, d_weights), (expected, torch.autograd.grad(expected, phi)[0]))
    torch.testing.assert_close(trajectory.state.reshape(18, -1), last.detach())


def test_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective must be one of 'sum', 'relative', 'log', got 'mean'"):
        loss_weights("mean", torch.ones(2, 1), torch.ones(1))
