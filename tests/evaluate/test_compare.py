"""The protocol, the ratios, JSON and the table."""

import dataclasses
import importlib
import json
import math
import sys

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluate import BASELINES, USUAL, Comparison, Result, compare, compare_horizons
from l2l_fast.evaluate.compare import held_out_seeds
from l2l_fast.evaluate.trajectories import Lane, trajectories
from l2l_fast.schedule import warm_cosine
from l2l_fast.tasks import Quadratic

TASK = Quadratic(dimension=4)
KEYS = {
    "task", "horizon", "seeds", "network", "optimizers", "best_baseline", "ratio_mean", "ratio_final", "ratio_steps",
    "ratio_seconds", "environment",
}  # fmt: skip
RESULT_KEYS = {"lr", "mean_loss", "final_loss", "mean_loss_std", "seconds_per_step", "curve"}


def momentum(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.5)


def explosive(params):
    return torch.optim.SGD(params, lr=1e6)


@pytest.fixture(scope="module")
def found():
    return compare(TASK, {"mine": momentum, "boom": explosive}, horizon=40, seeds=4, tuning_seeds=3)


def result(curve, *, mean=1.0, final=1.0, seconds=1.0, curve_final=None, label="x"):
    return Result(label, 1.0, mean, 0.1, 1.0, final, seconds, curve, [0.1] * len(curve), curve_final or curve)


def synthetic(learned_curve, horizon=8):
    """Horizon 8 has a window of one step, so that curves can be read by eye."""
    optimizers = {
        "learned": result(learned_curve, mean=2.0, final=1.0, seconds=3.0, label="LSTM"),
        "adam": result([8, 7, 6, 5, 4, 3, 2, 2, 2], mean=4.0, final=2.0, seconds=2.0, label="Adam"),
        "sgd": result([8, 5, 4, 4, 4, 4, 4, 4, 3], mean=2.5, final=3.0, seconds=1.0, label="SGD"),
    }
    return Comparison("synthetic", horizon, 3, ["learned"], optimizers)


# ---------------------------------------------------------------- protocol


def test_every_optimizer_is_there(found):
    assert list(found.optimizers) == ["mine", "boom", *USUAL]
    assert found.learned == ["mine", "boom"]
    assert found.network == "mine"
    for entry in found.optimizers.values():
        assert len(entry.curve) == len(entry.curve_std) == len(entry.curve_final) == 41
        assert entry.seconds_per_step > 0


def test_runs_are_paired():
    """Minibatches too: the same rule under two names has the same curve, beside others and alone."""
    task = l2l.tasks.get("digits-mlp")
    options = {"horizon": 4, "seeds": 2, "tuning_seeds": 1, "baselines": ["sgd"]}
    both = compare(task, {"a": momentum, "b": momentum}, **options)
    assert both.optimizers["a"].curve == both.optimizers["b"].curve
    assert both.optimizers["a"].curve[0] == both.optimizers["sgd"].curve[0]
    alone = compare(task, {"a": momentum}, **options)
    assert alone.optimizers["a"].curve == pytest.approx(both.optimizers["a"].curve, rel=1e-5)


def test_numbers_equal_a_run_of_its_own(found):
    (losses,) = trajectories(TASK, [Lane(momentum)], horizon=40, seeds=range(2_000_000_000, 2_000_000_004))
    losses, mine = losses.double(), found.optimizers["mine"]
    assert mine.mean_loss == pytest.approx(losses[:, 1:].mean().item(), rel=1e-5)
    assert mine.mean_loss_std == pytest.approx(losses[:, 1:].mean(1).std().item(), rel=1e-5)
    assert mine.final_loss == pytest.approx(losses[:, -2:].mean().item(), rel=1e-5)  # 40 // 20 = 2 steps
    assert mine.curve == pytest.approx(losses.mean(0).tolist(), rel=1e-4)
    assert mine.lr == mine.lr_final == 0.02


def test_it_repeats_itself_and_seed_changes_it(found):
    options = {"horizon": 5, "seeds": 2, "tuning_seeds": 2, "baselines": ["sgd"]}
    curves = [compare(TASK, momentum, **options, seed=seed).optimizers["momentum"].curve for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_tuning_seeds_and_held_out_seeds_are_disjoint(monkeypatch):
    module, seen = importlib.import_module("l2l_fast.evaluate.compare"), []

    def watch(name, kind):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: seen.append((kind, set(k["seeds"]))) or real(*a, **k))

    watch("stored_tuning", "tune")
    watch("stored_trajectories", "run")
    for seed in (0, 1, 9999):
        compare(TASK, momentum, horizon=2, seeds=3, tuning_seeds=3, baselines=["sgd", "adam"], seed=seed)
    tuning = set().union(*(seeds for kind, seeds in seen if kind == "tune"))
    held_out = set().union(*(seeds for kind, seeds in seen if kind == "run"))
    assert len(tuning) == len(held_out) == 9
    assert not tuning & held_out
    assert max(tuning | held_out) < 2**32


def test_a_task_with_halves_is_compared_on_the_held_out_half(monkeypatch):
    asked = []

    class Halves(Quadratic):
        def with_half(self, half):
            asked.append(half)
            return Quadratic(4, name="other half")

    monkeypatch.setattr(sys.modules["l2l_fast.evaluate.compare"], "get_task", lambda name: Halves(4, name=name))
    found = compare("anything", momentum, horizon=2, seeds=1, tuning_seeds=1, baselines=["sgd"])
    assert asked == ["meta-test"]
    assert found.task == "other half"


def test_a_network_alone_and_by_name(tmp_path):
    network = l2l.CoordinatewiseLSTM(hidden_size=4, num_layers=1)
    network.save_pretrained(tmp_path / "small")
    options = {"horizon": 3, "seeds": 2, "tuning_seeds": 1, "baselines": "sgd"}
    alone = compare(TASK, network, **options)
    by_folder = compare(TASK, tmp_path / "small", **options)
    by_callable = compare(TASK, {"net": lambda params: l2l.LSTMOptimizer(params, network=network)}, **options)
    assert (alone.network, by_folder.network, by_callable.network) == ("LSTM", "small", "net")
    assert alone.optimizers["LSTM"].curve == by_folder.optimizers["small"].curve
    # One optimizer on the stacked batch is the same as one an instance.
    assert alone.optimizers["LSTM"].curve == pytest.approx(by_callable.optimizers["net"].curve, rel=1e-5)


def test_a_callable_gets_the_tasks_own_shapes_and_no_others(tmp_path):
    """Once an instance, and once more to be timed; a rate for each parameter is no one rate."""
    shapes = []

    def layerwise(params):
        shapes.append([tuple(param.shape) for param in params])
        return torch.optim.Adam([{"params": [param], "lr": 0.01 * k} for k, param in enumerate(params, start=1)])

    found = compare("digits-mlp", layerwise, horizon=3, seeds=2, tuning_seeds=1, baselines=["sgd"])
    assert shapes == 3 * [[(20, 64), (20,), (10, 20), (10,)]]
    assert math.isnan(found.optimizers["layerwise"].lr)
    assert "nan" not in found.table()
    found.to_json(tmp_path / "found.json")
    assert Comparison.from_json(tmp_path / "found.json").table() == found.table()


def test_progress_reports_every_stage():
    calls = []
    options = {"horizon": 3, "seeds": 1, "tuning_seeds": 1, "baselines": ["adam"]}
    compare(TASK, momentum, **options, progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(description for description, _, _ in calls))
    assert stages[0] == "tuning Adam"
    assert stages[-2:] == ["comparing", "timing"]
    assert all(done <= total for _, done, total in calls)


def test_environment(found):
    assert found.environment["torch"] == torch.__version__
    assert found.environment["device"] == "cpu"
    assert {"cpu", "threads", "date", "l2l_fast"} <= set(found.environment)


def test_divergence_is_reported_and_alone(found):
    boom, mine = found.optimizers["boom"], found.optimizers["mine"]
    assert boom.diverged
    assert boom.mean_loss == boom.final_loss == math.inf
    assert not mine.diverged
    assert set(found.ratios("boom").values()) == {None}
    assert "diverged" in found.table()


# ---------------------------------------------------------------- ratios


def test_ratios_by_hand():
    found = synthetic([8, 6, 3, 2, 1, 1, 1, 1, 1])
    assert found.best_baseline == "sgd"
    assert found.best_baseline_final == "adam"
    assert found.ratio_mean == 2.0 / 2.5
    assert found.ratio_final == 1.0 / 2.0
    assert found.ratio_steps == 3 / 6  # loss 2: learned after 3 updates, Adam after 6
    assert found.ratio_seconds == 3 / 6 * 3.0 / 2.0


def test_a_loss_never_reached_has_no_ratio():
    found = synthetic([8, 6, 4, 3, 3, 3, 3, 3, 3])
    assert found.ratio_steps is None
    assert found.ratio_seconds is None
    assert "not reached" in found.table()


def test_steps_are_counted_on_smoothed_curves():
    found = synthetic([8.0] * 41, horizon=40)  # windows of two steps
    found.optimizers["adam"].curve_final = [8.0, *[4.0] * 20, *[2.0] * 20]
    found.optimizers["learned"].curve = [8.0, 1.0, *[4.0] * 9, *[2.0] * 30]
    # Adam's smoothed loss is first 2 after 22 updates; the learned dip to 1 smooths to 4.5 and 2.5, then 2 after 12.
    assert found.ratio_steps == 12 / 22


def test_several_learned_optimizers_have_their_own_ratios(tmp_path):
    found = synthetic([8, 6, 3, 2, 1, 1, 1, 1, 1])
    found.optimizers["second"] = result([8, 2, 2, 2, 2, 2, 2, 2, 2], mean=5.0, final=2.0)
    found.learned.append("second")
    assert found.best_baseline == "sgd"
    assert found.ratios("second")["ratio_steps"] == 1 / 6
    assert found.ratio_mean == 0.8
    found.to_json(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["optimizers"]["second"]["ratio_mean"] == 2.0
    assert content["ratio_mean"] == 0.8


# ---------------------------------------------------------------- JSON and table


def test_json_has_the_agreed_keys_and_comes_back(found, tmp_path):
    path = tmp_path / "new folder" / "comparison.json"
    found.to_json(path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert set(content) >= KEYS
    assert all(set(entry) >= RESULT_KEYS for entry in content["optimizers"].values())
    assert content["optimizers"]["boom"]["mean_loss"] is None
    assert content["ratio_mean"] == found.ratio_mean
    back = Comparison.from_json(path)
    assert back.optimizers["mine"] == found.optimizers["mine"]
    assert back.optimizers["boom"].diverged
    assert back.table() == found.table()
    for name in found.learned:
        assert back.ratios(name) == found.ratios(name)


def test_table_fits_80_columns(found):
    lines = found.table().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("mine") for line in lines)
    assert all(any(line.startswith(baseline.label) for line in lines) for baseline in map(BASELINES.get, USUAL))


def test_table_fits_80_columns_at_its_widest():
    found = synthetic([8, 6, 3, 2, 1, 1, 1, 1, 1])
    found.task = "a task whose name goes on " * 5
    wide = Result("a learned optimizer whose name goes on", 1.2345e-10, 1.2345e-10, 1.2345e-10, 1.2345e-10, 1.2345e-10,
                  123456.0, [1.0] * 9, [0.0] * 9, [1.0] * 9, on_edge=True, tied=True)  # fmt: skip
    found.optimizers |= {"learned": wide, "adam": dataclasses.replace(wide, label="B" * 40)}
    table = found.table()
    assert max(map(len, table.splitlines())) <= 80
    assert "not fully tuned" in table
    assert "other seeds may choose it" in table
    row = next(line for line in table.splitlines() if line.startswith("BBB"))
    assert len(row.split()) == 7


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("optimizers", "options", "message"),
    [
        (momentum, {"horizon": 0}, "horizon must be an int of at least 1, got 0"),
        (momentum, {"seeds": 0}, "seeds must be an int of at least 1, got 0"),
        (momentum, {"tuning_seeds": 0}, "tuning_seeds must be an int of at least 1, got 0"),
        (momentum, {"seeds": 100_001}, "at most 100000"),
        (momentum, {"seed": -1}, "seed must be an int from 0 to 9999"),
        (momentum, {"baselines": ["adam", "lion"]}, "sgd, nesterov, rmsprop, adam, adamw, adam-fused, one .*'lion'"),
        (momentum, {"baselines": []}, "baselines must name at least one"),
        (momentum, {"baselines": ["adam", "adam"]}, "got adam twice"),
        ({"adam": momentum}, {}, "got adam twice; rename one"),
        ({}, {}, "optimizers must hold at least one"),
        (3, {}, "optimizers must be a network"),
    ],
)
def test_wrong_arguments(optimizers, options, message):
    with pytest.raises(ValueError, match=message):
        compare(TASK, optimizers, **options)


def test_errors_are_those_of_paired_seeds():
    mine = dataclasses.replace(
        result([1.0], mean=2.0, label="mine"), seed_means=[1.0, 2.0, 3.0], seed_finals=[1.0, 2.0, 3.0]
    )
    rival = dataclasses.replace(
        result([1.0], mean=4.0, label="rival"), seed_means=[2.0, 4.0, 6.0], seed_finals=[1.0, 3.0, 2.0]
    )
    found = Comparison("task", 0, 3, ["mine"], {"mine": mine, "rival": rival})
    assert found.errors("mine")["ratio_mean"] == pytest.approx(0, abs=1e-12)  # each seed is half as bad
    left_out = torch.tensor([5 / 5, 4 / 3, 3 / 4])  # by hand: sums without one seed
    expected = ((left_out - left_out.mean()).square().sum() * 2 / 3).sqrt()
    assert found.errors("mine")["ratio_final"] == pytest.approx(expected.item())
    assert "mean loss 0.50 ± 0.000 of rival's" in found.table()
    mine.seed_means[0] = math.inf
    assert found.errors("mine")["ratio_mean"] is None


def own_loop(network, lr, seed, horizon, decay):
    """Losses after 1 .. T steps of the optimizer on parameters of their own shapes, of a task by its name."""
    task = l2l.tasks.get("digits-mlp", hidden=(4,)).with_half("meta-test")
    instances = l2l.tasks.Instances(task, [seed])
    params = {name: value[0].clone().requires_grad_() for name, value in instances.unflatten(instances.start()).items()}
    optimizer = l2l.LSTMOptimizer(params.values(), network, lr)
    losses = []
    for step in range(horizon + 1):
        optimizer.param_groups[0]["lr"] = lr * decay(step)
        loss = task.loss(params, instances.draw()[0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[1:]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_rule_of_whole_tensors_sees_each_instances_own(schedule):
    """Stacked into one tensor, instances would share a root mean square, and no tensor would be a matrix."""
    task = l2l.tasks.get("digits-mlp", hidden=(4,))
    found = compare(
        task, "l2l-base", horizon=20, seeds=2, baselines=["sgd"], tuning_seeds=1, schedule=schedule, seed=3
    )  # fmt: skip
    decay = {"constant": lambda t: 1.0, "cosine": lambda t: warm_cosine(1.0, 20, t)}[schedule]
    lr = found.optimizers["l2l-base"].lr if schedule == "constant" else 1e-3
    losses = [own_loop("l2l-base", lr, seed, 20, decay) for seed in held_out_seeds(3, 2)]
    assert found.optimizers["l2l-base"].seed_means == pytest.approx([sum(own) / 20 for own in losses], rel=1e-5)


def test_a_learned_rate_is_tuned_like_the_others():
    options = {"horizon": 10, "seeds": 2, "tuning_seeds": 2, "baselines": ["adamw"], "schedule": "cosine"}
    task = l2l.tasks.get("digits-mlp", hidden=(4,))
    as_it_comes = compare(task, "l2l-base", **options).optimizers["l2l-base"]
    found = compare(task, "l2l-base", **options, tune_learned=True)
    tuned = found.optimizers["l2l-base"]
    assert found.learned == ["l2l-base"]
    assert found.baselines == ["adamw-cosine"]
    assert tuned.lr > 1e-3  # ten steps want larger ones than a thousand do
    assert tuned.mean_loss < as_it_comes.mean_loss


def test_schedules_and_tuning_that_cannot_be_are_refused():
    task, adam = Quadratic(dimension=4), {"mine": lambda params: torch.optim.Adam(params)}
    with pytest.raises(ValueError, match=r"schedule must be one of .*cosine"):
        compare(task, "l2l-quadratic", horizon=5, schedule="step")
    with pytest.raises(ValueError, match="depends on the horizon: use one horizon"):
        compare_horizons(task, "l2l-quadratic", (5, 10), schedule="cosine")
    with pytest.raises(ValueError, match="optimizers must be networks, or their names, with tune_learned=True"):
        compare(task, adam, horizon=5, tune_learned=True)
