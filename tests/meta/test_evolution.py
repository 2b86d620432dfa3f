"""Gradients by perturbed copies of the network: in expectation against exact ones, and to the last bit as a run."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from recorder import Recorder
from test_unroll import ThreeTensors

import l2l_fast as l2l
from l2l_fast import CoordinatewiseLSTM, MetaTrainer
from l2l_fast.meta.estimators import (
    EvolutionStrategies,
    SecondDerivatives,
    TruncatedBackpropagation,
    WithBackpropagation,
)
from l2l_fast.meta.mixtures import DECAY, InverseVariance, Share
from l2l_fast.meta.options import ESTIMATORS, warm_cosine
from l2l_fast.meta.unroll import OBJECTIVES, Rule, Trajectory
from l2l_fast.tasks import Instances, ModuleTask, get

PERTURBED = [name for name in ESTIMATORS if name != "backpropagation"]


class Bowl:
    """f(x) = x^2 / 2 from x = 1, whatever the seed: instances differ in their perturbations alone. In float64."""

    name, resample = "bowl", False

    def __init__(self, *curvatures):
        self.curvatures = curvatures or (1.0,)

    def init(self, generator):
        return {"x": torch.ones(len(self.curvatures))}

    def sample(self, generator):
        return torch.tensor(self.curvatures, dtype=torch.float64)

    def loss(self, params, batch):
        return 0.5 * (batch * params["x"].double().square()).sum()


def rule_of(network, **options):
    network = network.double()
    return dataclasses.replace(Rule.of(network), **options)


def over_the_horizon(make_estimator, rule, task, instances, horizon, unroll):
    """The sum of the windows' gradients along one trajectory."""
    estimator = make_estimator(rule)
    trajectory = Trajectory(Instances(task, instances), rule.config, torch.float64, copies=estimator.copies)
    return sum(estimator.prepare(trajectory, unroll)().gradient for _ in range(horizon // unroll))


def sampled(make_estimator, rule, task, horizon, unroll, groups=24, each=25):
    """Independent estimates [groups, W], each a mean over some instances' perturbations."""
    return torch.stack([
        over_the_horizon(make_estimator, rule, task, range(each * group, each * (group + 1)), horizon, unroll)
        for group in range(groups)
    ])  # fmt: skip


def errors(samples, expected):
    """The mean's error in standard errors: along the expected gradient, and in the mean square over all weights."""
    along = samples @ (expected / expected.norm())
    error = (along.mean() - expected.norm()) / (along.std() / math.sqrt(len(along)))
    each = (samples.mean(0) - expected) / (samples.std(0) / math.sqrt(len(samples)))
    return error.item(), each.square().mean().item()


def es(rule, **options):
    return EvolutionStrategies(rule, perturbations=2, sigma=1e-3, **options)


pes = partial(es, persistent=True)


# ---------------------------------------------------------------- the expectation


def linear_network(a):
    """theta <- theta + a theta on a bowl, but for perturbations of second order: all that it has is its linear path."""
    network = CoordinatewiseLSTM("identity", 1, 1, linear_path=True, output_scale=1.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.linear.weight.fill_(a)
    return rule_of(network)


def test_pes_has_the_gradient_that_is_known_and_backpropagation_does_not():
    """L = sum_t (1 + a)^2t / 2, so dL/da = sum_t t (1 + a)^(2t - 1)."""
    a, horizon, unroll = -0.125, 20, 4
    known = sum(t * (1 + a) ** (2 * t - 1) for t in range(1, horizon + 1))
    rule = linear_network(a)
    exact = over_the_horizon(SecondDerivatives, rule, Bowl(), [0], horizon, horizon)[-1]
    assert exact == pytest.approx(known, rel=1e-12)
    samples = sampled(pes, rule, Bowl(), horizon, unroll, each=100)[:, -1]
    error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean() - known) < 3 * error < 0.15 * known
    for estimator in (TruncatedBackpropagation, SecondDerivatives):
        truncated = over_the_horizon(estimator, rule, Bowl(), [0], horizon, unroll)[-1]
        assert abs(truncated - known) > 10 * error


def recurrent():
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("moments", 3, 1, output_scale=0.3)
    return rule_of(network, lr=0.5, weight_decay=0.02), Bowl(1.0, 0.3, 0.1)


def test_pes_has_the_gradient_of_the_whole_trajectory():
    (rule, task), horizon, unroll = recurrent(), 20, 5
    exact = over_the_horizon(SecondDerivatives, rule, task, [0], horizon, horizon)
    samples = sampled(pes, rule, task, horizon, unroll)
    along, each = errors(samples, exact)
    assert abs(along) < 3
    assert 0.5 < each < 1.6
    for estimator in (TruncatedBackpropagation, SecondDerivatives, es):  # which forget what led to a window
        samples_of = sampled(estimator, rule, task, horizon, unroll) if estimator is es else None
        if samples_of is None:
            truncated = over_the_horizon(estimator, rule, task, [0], horizon, unroll)
        else:
            truncated = samples_of.mean(0)
        error = (samples @ exact).std() / math.sqrt(len(samples))
        assert ((truncated - exact) @ exact).abs() > 10 * error


@pytest.mark.parametrize("update_rms", [None, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_es_has_the_gradient_of_each_window(objective, update_rms):
    rule, task = recurrent()
    rule = dataclasses.replace(rule, update_rms=update_rms)
    weights = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    make = partial(es, objective=objective, weights=weights)
    truncated = over_the_horizon(
        partial(SecondDerivatives, objective=objective, weights=weights), rule, task, [0], 10, 5
    )
    along, each = errors(sampled(make, rule, task, 10, 5), truncated)
    assert abs(along) < 3
    assert 0.5 < each < 1.6


def test_es_and_pes_agree_in_the_first_window_only():
    rule, task = recurrent()
    first, second = [], []
    for make in (es, pes):
        estimator = make(rule)
        trajectory = Trajectory(Instances(task, range(5)), rule.config, torch.float64, copies=estimator.copies)
        first.append(estimator.prepare(trajectory, 5)().gradient)
        second.append(estimator.prepare(trajectory, 5)().gradient)
    torch.testing.assert_close(*first, rtol=1e-12, atol=0)
    assert (second[0] - second[1]).norm() > 0.1 * second[0].norm()


# ---------------------------------------------------------------- every copy is a network


SURROUNDINGS = {
    "plain": {},
    "update_rms": {"update_rms": 0.2},
    "input_rms": {"input_rms": 0.1},
    "linear path": {"linear_path": True},
    "max_update_rms": {"update_rms": 0.2, "max_update_rms": 0.7},
    "all": {
        "update_rms": 0.2,
        "max_update_rms": 0.7,
        "input_rms": 0.1,
        "orthogonalize": True,
        "linear_path": True,
    },
}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_copies_go_as_networks_of_their_own_do(name, persistent):
    """Of the losses of networks that walk by themselves the same gradient is made by hand."""
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("both", 4, 1, **SURROUNDINGS[name])
    rule, seeds, sigma = rule_of(network, lr=0.1, weight_decay=0.1), [4, 5], 0.05
    schedule, scaling = partial(warm_cosine, 0.9, 12), torch.rand(2, 10, dtype=torch.float64) + 0.5

    def start(seed=None, copies=1):
        chosen, scale = (seeds, scaling) if seed is None else ([seeds[seed]], scaling[seed : seed + 1])
        return Trajectory(
            Instances(ThreeTensors(), chosen), rule.config, torch.float64, scale, schedule=schedule, copies=copies
        )

    estimator = EvolutionStrategies(rule, perturbations=4, sigma=sigma, persistent=persistent)
    trajectory = start(copies=5)
    alone = [[start(seed) for seed in range(2)] for _ in range(5)]
    total = torch.zeros(2, 2, len(rule.weights), dtype=torch.float64)

    def walk(one, weights, length):
        found = TruncatedBackpropagation(dataclasses.replace(rule, weights=weights)).prepare(one, length)()
        return found.meta_loss

    for length in (4, 4, 3):
        found = estimator.prepare(trajectory, length)()
        noise = trajectory.noise
        total = total + noise
        if not persistent:
            states = [one.state_dict() for one in alone[0]]
            for copies in alone[1:]:
                for one, state in zip(copies, states, strict=True):
                    one.load_state_dict(state)
        expected = torch.zeros_like(rule.weights)
        directions = total if persistent else noise
        for b in range(2):
            own = walk(alone[0][b], rule.weights, length)
            for p in range(2):
                up = walk(alone[1 + p][b], rule.weights + sigma * noise[p, b], length)
                down = walk(alone[3 + p][b], rule.weights - sigma * noise[p, b], length)
                expected += directions[p, b] * (up - down) / (2 * 2 * sigma * 2)
            torch.testing.assert_close(trajectory.theta[b], alone[0][b].theta[0])
            assert own.isfinite()
        torch.testing.assert_close(found.gradient, expected, rtol=1e-8, atol=1e-10)
        for number, copies in enumerate(alone):
            for b, one in enumerate(copies):
                torch.testing.assert_close(trajectory.by_copy(trajectory.theta)[number, b], one.theta[0])
                torch.testing.assert_close(trajectory.by_copy(trajectory.state)[number, b], one.state[0])


@pytest.mark.parametrize("coordinates", [None, 7])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_mixture_has_both_gradients(name, coordinates):
    torch.manual_seed(0)
    rule = rule_of(CoordinatewiseLSTM("both", 4, 1, **SURROUNDINGS[name]), lr=0.1)
    perturbed = EvolutionStrategies(rule, perturbations=4, sigma=0.05, persistent=True)
    ways = [
        WithBackpropagation(perturbed, coordinates), perturbed, TruncatedBackpropagation(rule, coordinates=coordinates)
    ]  # fmt: skip
    walks = [
        Trajectory(Instances(ThreeTensors(), [1, 2]), rule.config, torch.float64, copies=way.copies) for way in ways
    ]
    for length in (5, 5, 2):
        both, one, other = (way.prepare(walk, length)() for way, walk in zip(ways, walks, strict=True))
        torch.testing.assert_close(both.gradient, torch.stack([one.gradient, other.gradient]), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(both.meta_loss, other.meta_loss)
        torch.testing.assert_close(one.meta_loss, other.meta_loss)


def test_perturbations_are_an_instances_own():
    """In whatever company it is, and new ones in every window."""
    rule, task = recurrent()
    walks = [Trajectory(Instances(task, seeds), rule.config, torch.float64, copies=5) for seeds in ([3, 8, 5], [8, 1])]
    estimator, before = EvolutionStrategies(rule, perturbations=4), None
    for _ in range(2):
        for walk in walks:
            estimator.prepare(walk, 5)()
        assert torch.equal(walks[0].noise[:, 1], walks[1].noise[:, 0])
        assert not torch.equal(walks[0].noise[:, 0], walks[0].noise[:, 1])
        assert before is None or not torch.equal(walks[0].noise, before)
        before = walks[0].noise.clone()


TASKS = {
    "quadratic": lambda: get("quadratic"),
    "digits": lambda: get("digits-mlp"),
    "meta-training": lambda: l2l.tasks.MetaTraining(l2l.tasks.Quadratic(3), hidden=4, unroll=3, instances=2),
    "batch norm": lambda: module(torch.nn.BatchNorm1d(4)),
    "loop": lambda: module(torch.nn.GRU(4, 4)),
}


class First(torch.nn.Module):
    def forward(self, x):
        return x[0] if isinstance(x, tuple) else x


def module(layer):
    x = torch.linspace(-2, 2, 80).view(20, 4).sin()
    make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), layer, First(), torch.nn.Linear(4, 1))  # noqa: E731
    return ModuleTask(make, (x, x.sum(1, keepdim=True)), lambda out, y: (out - y).square().mean(), batch_size=6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", TASKS)
def test_copies_of_instances_have_the_losses_of_instances(name, count):
    instances = Instances(TASKS[name](), range(count))
    batch, start = instances.draw(), instances.start()
    thetas = [start + 0.1 * number for number in range(3)]
    expected = [instances.evaluate(theta, batch) for theta in thetas]
    losses, grads = instances.evaluate(torch.cat(thetas), batch)
    torch.testing.assert_close(losses, torch.cat([one[0] for one in expected]))
    torch.testing.assert_close(grads, torch.cat([one[1] for one in expected]), rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------- one gradient of two


def test_a_share_of_each():
    mixed = Share(0.3)(torch.tensor([[10.0, 0.0], [0.0, 20.0]]))
    torch.testing.assert_close(mixed, torch.tensor([3.0, 14.0]))


def test_inverse_variance_has_no_bias_and_the_least_variance():
    generator, steps = torch.Generator().manual_seed(0), 4000
    deviations = torch.tensor([[1.0, 0.5, 0.0], [3.0, 0.5, 1.0]], dtype=torch.float64)
    mean, found = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), []
    mix = InverseVariance(torch.zeros(2, 3, dtype=torch.float64))
    for _ in range(steps):
        noise = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        found.append(mix(mean + deviations * noise))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(steps)
    assert ((found.mean(0) - mean).abs() < 3 * error + 1e-9).all()
    v = deviations.square()
    least = v.prod(0) / v.sum(0)
    torch.testing.assert_close(found[200:].var(0), least, rtol=0.15, atol=1e-3)


def test_inverse_variance_begins_with_both_and_leaves_out_what_is_not_finite():
    mix = InverseVariance(torch.zeros(2, 2))
    assert mix(torch.tensor([[2.0, 4.0], [0.0, 0.0]])).tolist() == [1.0, 2.0]
    before = {name: tensor.clone() for name, tensor in mix.state_dict().items()}
    mix(torch.tensor([[2.0, math.inf], [0.0, math.nan]]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in mix.state_dict().items())
    mix(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    assert mix.rest == pytest.approx(DECAY**2)


# ---------------------------------------------------------------- in a trainer


def make_trainer(estimator, network=None, task="quadratic", **options):
    torch.manual_seed(0)
    network = network or CoordinatewiseLSTM("moments", 4, 1)
    defaults = {"instances": 2, "unroll": 5, "horizon": 12, "validate_every": 4, "validation_instances": 2}
    defaults |= {"perturbations": 4} if estimator != "backpropagation" else {}
    return MetaTrainer(network, task, estimator=estimator, progress=False, **defaults | options)


def variance(name):
    return {"perturbed_share": "variance"} if "+" in name else {}


@pytest.mark.parametrize("name", PERTURBED)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, name):
    options = variance(name) | {"parallel": 2, "average": 0.5, "scaling": 0.3, "imitation": 0.3}
    unbroken = make_trainer(name, **options)
    expected = unbroken.fit(9)
    make_trainer(name, checkpoint=tmp_path, **options).fit(4)
    resumed = make_trainer(name, checkpoint=tmp_path, **options)
    found = resumed.fit(9)
    assert repr(found) == repr(expected)
    assert torch.equal(resumed.weights.current, unbroken.weights.current)


@pytest.mark.parametrize("name", PERTURBED)
def test_a_captured_run_is_the_eager_one(name):
    one = make_trainer(name, **variance(name), parallel=2)
    other = make_trainer(name, **variance(name), parallel=2)
    other.graphs.capture, other.update.capturable = Recorder(), other.update.skips
    for group in other.meta_optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    assert repr(one.fit(14)) == repr(other.fit(14))
    assert torch.equal(one.weights.current, other.weights.current)
    assert other.graphs.capture.replayed > 10


@pytest.mark.parametrize("name", PERTURBED)
def test_what_is_frozen_is_not_perturbed(name):
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("moments", 4, 1)
    for parameter in network.parameters():
        parameter.requires_grad_(parameter is network.head.weight)
    before = network.flat_weights().detach().clone()
    trainer = make_trainer(name, network, horizon=20)
    trainer.fit(3)
    moved = trainer.weights.current != before
    assert moved.any()
    assert not moved[~trainer.update.trains].any()
    noise = trainer.streams.running[0].trajectory.noise
    assert noise[..., trainer.update.trains].all()
    assert not noise[..., ~trainer.update.trains].any()


@pytest.mark.parametrize("name", PERTURBED)
def test_a_trajectory_ends_when_a_copy_diverges(name):
    trainer = make_trainer(name, horizon=100)
    trainer.fit(2)
    trajectory = trainer.streams.running[0].trajectory
    before = trainer.weights.read()
    if name.startswith("pes"):
        trajectory.theta[-1] = math.inf  # a perturbed one
    else:
        trajectory.theta[0] = math.inf  # the copies begin there
    trainer.fit(3)
    assert trainer.history.skipped == 1
    assert trainer.streams.running[0] is None
    assert torch.equal(trainer.weights.current, before)
    trainer.fit(4)
    assert trainer.history.skipped == 1


def test_perturbations_begin_anew_with_the_trajectory():
    trainer = make_trainer("pes", horizon=10)
    trainer.graphs.capture = Recorder()  # so that memory is used again
    trainer.fit(2)
    (ended,) = [one for kept in trainer.streams.pool._ended.values() for one in kept if one.copies > 1]
    assert ended.accumulated.any()
    trainer.fit(3)
    (stream,) = trainer.streams.running
    assert stream.trajectory is ended
    assert torch.equal(ended.accumulated, ended.noise)


@pytest.mark.parametrize("name", PERTURBED)
def test_it_learns(name):
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("moments", 4, 1)
    trainer = make_trainer(
        name, network, instances=16, unroll=10, horizon=20, meta_lr=1e-2, objective="log", validate_every=20, sigma=0.03
    )
    trainer.fit(60)
    scores = [score for _, score in trainer.history.validations]
    assert scores[-1] < 0.7 < scores[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "bptt"}, "estimator must be one of .*pes"),
        ({"estimator": "pes", "perturbations": 3}, "perturbations must be an even int of at least 2, got 3"),
        ({"estimator": "pes", "sigma": 0}, "sigma must be a positive number"),
        ({"estimator": "es+backpropagation", "perturbed_share": 1.5}, 'perturbed_share must be in .* or "variance"'),
        ({"estimator": "es+backpropagation", "perturbed_share": "half"}, 'perturbed_share must be in .* or "variance"'),
        ({"estimator": "es", "perturbed_share": 0.2}, "perturbed_share must be left out with estimator='es'"),
        ({"sigma": 0.1}, "sigma must be left out with estimator='backpropagation'"),
        ({"estimator": "es", "coordinates": 5}, "coordinates must be None with estimator='es'"),
        ({"estimator": "pes", "second_derivatives": True}, "second_derivatives must be False with estimator='pes'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MetaTrainer(CoordinatewiseLSTM("moments", 4, 1), "quadratic", progress=False, **options)


def test_another_estimator_is_another_run(tmp_path):
    make_trainer("pes", checkpoint=tmp_path).fit(2)
    for options, message in (({"sigma": 0.02}, "sigma=0.01"), ({"perturbations": 6}, "perturbations=4")):
        with pytest.raises(ValueError, match=message):
            make_trainer("pes", checkpoint=tmp_path, **options).fit(3)
    with pytest.raises(ValueError, match="estimator='pes'"):
        make_trainer("es", checkpoint=tmp_path).fit(3)


def test_checkpoints_do_not_name_what_earlier_versions_had_not():
    settings = make_trainer("backpropagation").run.settings
    assert not {"estimator", "perturbations", "sigma", "perturbed_share"} & set(settings)
    assert {"estimator", "perturbations", "sigma"} < set(make_trainer("pes").run.settings)
