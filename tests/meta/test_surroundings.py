"""Meta-training with what surrounds the network's step: input_rms, orthogonalize, a schedule of the rate."""

import itertools
import math
from functools import partial

import pytest
import torch
from test_unroll import ThreeTensors, assert_same, make, unroll

from l2l_fast import CoordinatewiseLSTM, LSTMOptimizer, MetaTrainer, normalize, reference
from l2l_fast.meta.estimators import Imitation, SecondDerivatives
from l2l_fast.meta.options import TrainerOptions
from l2l_fast.meta.unroll import Trajectory, loss_weights, suffix_sums
from l2l_fast.schedule import warm_cosine
from l2l_fast.tasks import Instances

SURROUNDINGS = {
    "plain": {},
    "input_rms": {"input_rms": 0.01},
    "update_rms and input_rms": {"update_rms": 0.6, "input_rms": 0.1},
    "orthogonalize": {"update_rms": 0.6, "orthogonalize": True},
    "max_update_rms": {"update_rms": 0.3, "max_update_rms": 0.9},
    "max_update_rms and orthogonalize": {"update_rms": 0.1, "max_update_rms": 0.7, "orthogonalize": True},
    "all": {"update_rms": 0.2, "max_update_rms": 0.5, "input_rms": 0.01, "orthogonalize": True},
}
SCHEDULES = {"constant": None, "cosine": partial(warm_cosine, 0.9, 12), "rising": lambda step: 0.1 + 0.2 * step}


def start(options, schedule=None):
    rule, _ = make("both", task=ThreeTensors(), lr=0.5, **options)
    return rule, Trajectory(Instances(ThreeTensors(), [1, 2, 3]), rule.config, torch.float64, schedule=schedule)


def by_autograd(rule, trajectory, length, objective="sum", second=False):
    """Each instance and tensor by itself, through the reference; ``second``: with a graph through the gradients."""
    phi, shapes, sizes = rule.weights.clone().requires_grad_(), trajectory.shapes, trajectory.sizes
    theta, grad, config = trajectory.theta, trajectory.grad, rule.config
    state = trajectory.state.reshape(theta.numel(), -1)
    squares, losses = trajectory.square.clone(), []
    slow = [[*row.unbind()] for row in trajectory.slow_square.clone()]
    for t in range(length):
        number = trajectory.steps_done + t
        lr = rule.lr * (1.0 if trajectory.schedule is None else trajectory.schedule(number))
        seen = grad.clone()
        if rule.input_rms is not None:
            for b in range(len(grad)):
                found = []
                for k, piece in enumerate(grad[b].split(sizes)):
                    x, squares[b, k] = reference.relative_to_rms(
                        piece, squares[b, k], number + 1, config, rule.input_rms
                    )
                    found.append(x)
                seen[b] = torch.cat(found)
        d, state = reference.lstm_unroll(seen.reshape(1, -1), state, phi, torch.tensor(number + 1.0), *config)
        d = d.view_as(theta)
        if rule.update_rms is not None:
            means = state[:, 0].view_as(theta) if second else state[:, 0].view_as(theta).detach()
            momentum = config.beta1 * means + (1 - config.beta1) * (seen if second else seen.detach())
            rows = []
            for b in range(len(theta)):
                found = []
                for k, (piece, m, shape) in enumerate(
                    zip(d[b].split(sizes), momentum[b].split(sizes), shapes, strict=True)
                ):
                    rms = rule.update_rms
                    if rule.max_update_rms is not None:
                        x, mean = (rows_of[b].split(sizes)[k] for rows_of in (seen, means))
                        rms, slow[b][k] = reference.update_size(
                            x, mean, slow[b][k], number + 1, config, rms, rule.max_update_rms
                        )
                    if rule.orthogonalize and len(shape) > 1:
                        o = normalize.orthogonalize(m.view(shape)).reshape(-1)
                        piece = reference.scale_to_rms(piece, 0.5) - reference.scale_to_rms(o, 1.0)
                    found.append(reference.scale_to_rms(piece, rms))
                rows.append(torch.cat(found))
            d = torch.stack(rows)
        theta = theta - lr * rule.weight_decay * theta + lr * d
        loss, grad = trajectory.evaluate(theta, create_graph=True)
        grad = grad if second else grad.detach()
        losses.append(loss)
    meta_loss, _ = loss_weights(objective, torch.stack(losses), trajectory.first_losses)
    return meta_loss, torch.autograd.grad(meta_loss, phi)[0]


@pytest.mark.parametrize("objective", ["sum", "log"])
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", SURROUNDINGS)
def test_the_meta_gradient_is_autograds(options, schedule, length, objective):
    (rule, trajectory), (_, twin) = (start(SURROUNDINGS[options], SCHEDULES[schedule]) for _ in range(2))
    for one in (trajectory, twin):
        unroll(one, rule, 2)
    expected = by_autograd(rule, twin, length, objective)
    assert_same(unroll(trajectory, rule, length, objective=objective), expected)
    if length > 1 and options != "plain":  # it has a part in the gradient
        other_rule, other = start({}, SCHEDULES[schedule])
        unroll(other, other_rule, 2)
        *_, gradient = unroll(other, other_rule, length, objective=objective)
        assert (gradient - expected[1]).norm() > 1e-3 * expected[1].norm()


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", ["plain", "orthogonalize", "max_update_rms", "max_update_rms and orthogonalize"])
def test_second_derivatives_are_autograds(options, schedule, length):
    (rule, trajectory), (_, twin) = (start(SURROUNDINGS[options], SCHEDULES[schedule]) for _ in range(2))
    for one in (trajectory, twin):
        unroll(one, rule, 2)
    expected = by_autograd(rule, twin, length, second=True)
    assert_same(SecondDerivatives(rule).prepare(trajectory, length)(), expected)
    assert trajectory.steps_done == 2 + length


@pytest.mark.parametrize("options", SURROUNDINGS)
def test_a_trajectory_walks_as_the_optimizer_does(options):
    """Three optimizers, one for each instance, on tensors of their own."""
    rule, trajectory = start(SURROUNDINGS[options], SCHEDULES["cosine"])
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("both", 4, 2, **SURROUNDINGS[options]).double()
    instances, thetas = Instances(ThreeTensors(), [1, 2, 3]), []
    starts = instances.unflatten(instances.start().double())
    batches = [instances.draw() for _ in range(8)]
    for number in range(3):
        params = [torch.nn.Parameter(start[number].clone()) for start in starts.values()]
        optimizer = LSTMOptimizer(params, network, lr=0.2, weight_decay=0.05, state_dtype=torch.float64)
        optimizer._networks = {  # the weights in float64, which otherwise pass through float32's
            name: held._replace(weights=rule.weights) for name, held in optimizer._networks.items()
        }
        for step, batch in enumerate(batches[:7]):
            optimizer.param_groups[0]["lr"] = 0.5 * warm_cosine(0.9, 12, step)
            optimizer.zero_grad()
            ThreeTensors().loss(dict(zip(starts, params, strict=True)), batch[number]).backward()
            optimizer.step()
        thetas.append(torch.cat([param.detach().reshape(-1) for param in params]))
    for length in (3, 4):
        unroll(trajectory, rule, length)
    torch.testing.assert_close(trajectory.theta, torch.stack(thetas))


def test_a_gradient_that_is_not_finite_leaves_the_scale_of_its_tensor():
    rule, trajectory = start(SURROUNDINGS["update_rms and input_rms"])
    unroll(trajectory, rule, 3)
    before = trajectory.square / (1 - rule.config.beta2**3)
    trajectory.grad[1, 2] = torch.inf
    unroll(trajectory, rule, 1)
    after = trajectory.square / (1 - rule.config.beta2**4)
    torch.testing.assert_close(after[1, 0], before[1, 0])
    assert after[0, 0] != before[0, 0]
    assert trajectory.theta.isfinite().all()
    assert trajectory.square.isfinite().all()


def test_imitation_sees_relative_gradients_and_the_rate_of_each_step():
    rule, trajectory = start(SURROUNDINGS["update_rms and input_rms"], SCHEDULES["rising"])
    twin_rule, twin = start(SURROUNDINGS["update_rms and input_rms"], SCHEDULES["rising"])
    found = Imitation(rule, torch.optim.SGD([trajectory.theta], 0.01)).prepare(trajectory, 4)()
    phi, state = twin_rule.weights.clone().requires_grad_(), twin.state.reshape(twin.theta.numel(), -1)
    squares, total = twin.square.clone(), 0.0
    for t in range(4):
        x = twin.grad.clone()
        for b in range(3):
            pieces = []
            for k, piece in enumerate(twin.grad[b].split(twin.sizes)):
                scaled, squares[b, k] = reference.relative_to_rms(piece, squares[b, k], t + 1, rule.config, 0.1)
                pieces.append(scaled)
            x[b] = torch.cat(pieces)
        d, state = reference.lstm_unroll(x.reshape(1, -1), state, phi, torch.tensor(t + 1.0), *rule.config)
        u = torch.stack([
            torch.cat([reference.scale_to_rms(piece, 0.6) for piece in row.split(twin.sizes)])
            for row in d.view_as(twin.theta)
        ])  # fmt: skip
        lr = 0.5 * (0.1 + 0.2 * t)
        move = -0.01 * twin.grad
        total = total + 0.5 * (lr * u - lr * 0.05 * twin.theta - move).square().sum() / twin.theta.numel()
        twin.theta = twin.theta + move
        twin.losses, twin.grad = twin.evaluate(twin.theta)
    assert_same(found, (total, torch.autograd.grad(total, phi)[0]))


def test_suffix_sums_of_rates_by_hand():
    grads = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).view(3, 1, 1)
    d_losses, lr, decay = torch.tensor([[1.0], [10.0], [100.0]], dtype=torch.float64), [0.5, 0.25, 0.125], 0.2
    a1, a2 = 1 - 0.25 * decay, 1 - 0.125 * decay
    expected = [0.5 * (1 + a1 * (20 + a2 * 400)), 0.25 * (20 + a2 * 400), 0.125 * 400]
    found = suffix_sums(grads, d_losses, lr, decay)
    torch.testing.assert_close(found.view(-1), torch.tensor(expected, dtype=torch.float64))


def test_the_schedule_is_warm_up_and_a_cosine():
    rates = [warm_cosine(2.0, 100, step) for step in range(100)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[52] == pytest.approx(1 + math.cos(math.pi * 47 / 95))
    assert all(one >= other for one, other in itertools.pairwise(rates[5:]))
    assert 0 < rates[-1] < 0.01
    assert warm_cosine(2.0, 1, 0) == 2.0


def test_rates_are_drawn_for_each_trajectory():
    options = TrainerOptions(lr=(0.01, 1.0), seed=3)
    peaks = [options.peak(number) for number in range(200)]
    assert all(0.01 <= peak <= 1 for peak in peaks)
    logs = torch.tensor(peaks).log10()
    assert abs(logs.mean() + 1) < 0.1
    assert logs.std() == pytest.approx(2 / 12**0.5, rel=0.1)
    assert options.peak() == pytest.approx(0.1)
    assert options.peak(7) == options.peak(7) != TrainerOptions(lr=(0.01, 1.0), seed=4).peak(7)
    assert options.rates(10, 7)(5) == options.peak(7)
    assert TrainerOptions(lr=0.5).rates(10) is None
    cosine = TrainerOptions(lr=0.5, lr_schedule="cosine").rates(40)
    assert [cosine(step) for step in (0, 1)] == [0.25, 0.5]


@pytest.mark.parametrize("bad", [0, -1.0, (0.1, 0.01), (0.0, 1.0), (1.0,), (1.0, 2.0, 3.0), "0.1", float("nan")])
def test_bad_rates_are_refused(bad):
    with pytest.raises(ValueError, match="lr must be a positive number, or two with the lower first or None"):
        TrainerOptions(lr=bad)


@pytest.mark.parametrize("options", SURROUNDINGS)
def test_a_trainer_goes_on_from_a_checkpoint(tmp_path, options):
    def trainer(folder):
        torch.manual_seed(0)
        network = CoordinatewiseLSTM("both", 3, 1, **SURROUNDINGS[options])
        return MetaTrainer(
            network, "digits-mlp", unroll=4, horizon=10, parallel=2, lr=(1e-3, 1e-1), lr_schedule="cosine",
            validate_every=3, validation_instances=1, checkpoint=folder, checkpoint_every=1, progress=False,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.fit(6)
    trainer(tmp_path / "parts").fit(2)
    again = trainer(tmp_path / "parts")
    history = again.fit(6)
    assert history.meta_losses == whole.history.meta_losses
    assert torch.equal(again.network.flat_weights(), whole.network.flat_weights())
    assert not torch.equal(again.network.flat_weights(), trainer(None).network.flat_weights())


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    def trainer(**options):
        network = CoordinatewiseLSTM("both", 3, 1, update_rms=0.5, **options)
        return MetaTrainer(network, "quadratic", unroll=2, horizon=4, checkpoint=tmp_path, progress=False)

    trainer().fit(1)
    for options in ({"orthogonalize": True}, {"input_rms": 0.1}, {"max_update_rms": 0.9}):
        with pytest.raises(ValueError, match=f"belongs to a run with .*{next(iter(options))}"):
            trainer(**options).fit(2)


@pytest.mark.parametrize(("network", "options", "name"), [
    ({"orthogonalize": True}, {"imitation": 0.5}, "imitation"),
    ({"input_rms": 0.1}, {"second_derivatives": True}, "second_derivatives"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(network, options, name):
    made = CoordinatewiseLSTM("both", 3, 1, update_rms=0.5, **network)
    with pytest.raises(ValueError, match=f"{name} must be"):
        MetaTrainer(made, "quadratic", progress=False, **options)
    MetaTrainer(made, "quadratic", progress=False)
