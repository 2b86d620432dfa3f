"""Stacked runs against plain loops, and the search for a learning rate."""

import math
from functools import partial

import pytest
import torch

from l2l_fast.evaluate import BASELINES, Baseline, baselines, compare, compare_horizons, tune
from l2l_fast.evaluate.baselines import EXTENSION, MAX_EXTENSIONS, find_baseline
from l2l_fast.evaluate.trajectories import Lane, smoothed, trajectories
from l2l_fast.tasks import Quadratic


class Regression:
    """Minibatches, two parameters of different shapes, float64: enough to catch a mixed-up row or draw."""

    name, resample = "regression", True

    def init(self, generator):
        options = {"generator": generator, "dtype": torch.float64}
        return {"w": torch.randn(3, 2, **options), "b": torch.randn(2, **options)}

    def sample(self, generator):
        options = {"generator": generator, "dtype": torch.float64}
        return {"x": torch.randn(5, 3, **options), "y": torch.randn(5, 2, **options)}

    def loss(self, params, batch):
        return (batch["x"] @ params["w"] + params["b"] - batch["y"]).square().mean()


def plain_loop(task, make, seed, horizon):
    """What anyone would write: losses after 0 .. horizon updates."""
    generator = torch.Generator().manual_seed(seed)
    params = {name: value.requires_grad_() for name, value in task.init(generator).items()}
    fixed = None if task.resample else task.sample(generator)
    optimizer, losses = make(list(params.values())), []
    for _ in range(horizon + 1):
        loss = task.loss(params, task.sample(generator) if task.resample else fixed)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("elementwise", [True, False])
def test_stacked_runs_equal_plain_loops(name, elementwise):
    task, seeds, horizon = Regression(), [3, 11], 12
    makers = [partial(BASELINES[name].factory, lr=lr) for lr in (0.003, 0.03)]
    losses = trajectories(task, [Lane(make, elementwise) for make in makers], horizon=horizon, seeds=seeds)
    expected = [[plain_loop(task, make, seed, horizon) for seed in seeds] for make in makers]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_lanes_in_several_evaluations_change_nothing(monkeypatch):
    lanes = [Lane(partial(torch.optim.SGD, lr=lr)) for lr in (0.01, 0.03, 0.1)]
    together = trajectories(Regression(), lanes, horizon=5, seeds=[1, 2])
    monkeypatch.setattr("l2l_fast.evaluate.trajectories.STACKED_COORDINATES", (1, 1))
    torch.testing.assert_close(trajectories(Regression(), lanes, horizon=5, seeds=[1, 2]), together)


def test_not_elementwise_optimizers_see_the_tasks_own_shapes():
    seen = []

    def make(params):
        seen.append([tuple(param.shape) for param in params])
        return torch.optim.SGD(params, lr=0.1)

    trajectories(Regression(), [Lane(make, elementwise=False)], horizon=1, seeds=[1, 2, 3])
    assert seen == [[(3, 2), (2,)]] * 3


@pytest.mark.parametrize("name", BASELINES)
def test_tune_finds_the_best_rates_of_plain_loops(name):
    task, seeds, horizon = Quadratic(dimension=3), [5, 6], 25
    tuned = tune(task, name, horizon=horizon, seeds=seeds)
    curves = [
        torch.tensor([plain_loop(task, partial(BASELINES[name].factory, lr=lr), seed, horizon) for seed in seeds])
        for lr in tuned.rates
    ]
    means = torch.stack([curve[:, 1:].mean() for curve in curves]).nan_to_num(nan=math.inf)
    finals = torch.stack([smoothed(curve, horizon)[:, -1].mean() for curve in curves]).nan_to_num(nan=math.inf)
    assert tuned.lr == tuned.rates[means.argmin()]
    assert tuned.lr_final == tuned.rates[finals.argmin()]
    finite = [k for k, value in enumerate(tuned.mean_losses) if value < 100]
    torch.testing.assert_close(torch.tensor(tuned.mean_losses)[finite], means[finite], rtol=1e-3, atol=1e-5)
    assert not tuned.on_edge
    assert tuned.rates == sorted(tuned.rates)


def test_a_diverged_rate_spoils_no_other():
    lanes = [Lane(partial(torch.optim.SGD, lr=lr)) for lr in (0.005, 1e3)]
    good, bad = trajectories(Quadratic(), lanes, horizon=60, seeds=[1, 2])
    (alone,) = trajectories(Quadratic(), lanes[:1], horizon=60, seeds=[1, 2])
    torch.testing.assert_close(good, alone)
    assert not bad[:, -1].isfinite().any()


def sgd(exponents):
    return Baseline("plain", "Plain", lambda params, lr: torch.optim.SGD(params, lr=lr), exponents)


@pytest.mark.parametrize("exponents", [(-20, -18), (0, 2), (-16, -16), (4, 4)])
def test_a_best_rate_on_the_edge_extends_the_grid(exponents):
    tuned = tune(Quadratic(), sgd(exponents), horizon=30, seeds=range(3))
    wide = tune(Quadratic(), sgd((-24, 8)), horizon=30, seeds=range(3))
    assert (tuned.lr, tuned.lr_final) == (wide.lr, wide.lr_final)
    assert not tuned.on_edge
    assert len(tuned.rates) > exponents[1] - exponents[0] + 1


def test_extension_is_bounded_and_reported():
    tuned = tune(Quadratic(), sgd((40, 41)), horizon=10, seeds=[1])
    assert tuned.on_edge
    assert len(tuned.rates) == 2 + EXTENSION * MAX_EXTENSIONS
    assert set(tuned.mean_losses) == {math.inf}


def test_a_tie_is_within_a_standard_error_paired_over_seeds():
    best, worst = [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]
    second = {"a little above on every seed": ([1.1, 2.1, 3.2], False), "above on one, below on another":
              ([0.5, 3.0, 3.1], True), "the same": (best, True), "diverged": ([math.inf, 2.0, 3.0], False)}  # fmt: skip
    for name, (losses, tied) in second.items():
        scores = {k: (torch.tensor(values), None) for k, values in enumerate((worst, best, losses))}
        assert baselines._tied(scores, 0) is tied, name
    assert not baselines._tied({k: (torch.tensor([1.0]), None) for k in (0, 1)}, 0)  # of one seed nothing is known


def test_rates_that_do_the_same_are_tied():
    capped = Baseline("capped", "capped", lambda params, lr: torch.optim.SGD(params, lr=min(lr, 0.01)), (-12, -4))
    assert tune(Regression(), capped, horizon=5, seeds=range(3)).tied
    assert not tune(Quadratic(), "sgd", horizon=40, seeds=range(10)).tied


def test_progress_counts_every_update():
    calls = []
    tune(Quadratic(), sgd((-20, -18)), horizon=4, seeds=[1], progress=lambda *call: calls.append(call))
    assert calls[:4] == [("tuning Plain", done, 4) for done in (1, 2, 3, 4)]
    assert calls[4] == ("tuning Plain, wider", 1, 4)


def test_smoothed_is_a_trailing_mean():
    curve = torch.arange(101.0)
    result = smoothed(curve, horizon=100)
    assert result.shape == curve.shape
    assert result[-1] == 98  # of 96 .. 100
    assert result[0] == 0
    assert result[2] == (0 + 0 + 0 + 1 + 2) / 5
    torch.testing.assert_close(smoothed(curve, horizon=19), curve.double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "adamm"}, "sgd, nesterov, rmsprop, adam, adamw"),
        ({"horizon": 0}, "horizon must be an int of at least 1"),
        ({"seeds": []}, "seeds must name at least one"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        tune(Quadratic(), **{"baseline": "sgd", "horizon": 5, "seeds": [1]} | options)


def test_a_linear_decay_ends_at_zero():
    baseline = find_baseline("nesterov-linear", [10])
    theta = torch.nn.Parameter(torch.ones(1))
    optimizer, rates = baseline.factory([theta], 0.5), []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        theta.grad = torch.ones(1)
        optimizer.step()
    assert rates == pytest.approx([0.5 * (1 - t / 10) for t in range(10)] + [0, 0])


def test_a_linear_decay_is_tuned_and_compared_at_one_horizon():
    task = Quadratic(dimension=4)
    found = compare(task, "l2l-quadratic", horizon=20, seeds=2, tuning_seeds=2, baselines=["sgd", "sgd-linear"])
    assert found.baselines == ["sgd", "sgd-linear"]
    assert found.optimizers["sgd-linear"].label == "SGD, lr to 0"
    with pytest.raises(ValueError, match=r"sgd-linear depends on the horizon.*use one horizon, got \[10, 20\]"):
        compare_horizons(task, "l2l-quadratic", (10, 20), seeds=2, baselines=["sgd-linear"])
    with pytest.raises(ValueError, match=r"baselines must be among .* got 'lion-linear'"):
        tune(task, "lion-linear")
