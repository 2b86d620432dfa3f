"""Captured meta-training is eager meta-training, bit for bit."""

import pytest
import torch
from recorder import Recorder

import l2l_fast as l2l
from l2l_fast.meta import LogUniform, MetaTrainer
from l2l_fast.meta.estimators import TruncatedBackpropagation
from l2l_fast.meta.graphs import WARM_UP, Graphs
from l2l_fast.meta.unroll import OBJECTIVES, Rule, Trajectory
from l2l_fast.tasks import Instances, ModuleTask, Quadratic, get


def make_trainer(task="quadratic", features="moments", update_rms=None, **options):
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM(features, 4, 1, update_rms=update_rms)
    defaults = {"instances": 3, "unroll": 5, "horizon": 12, "validate_every": 4, "validation_instances": 2}
    return MetaTrainer(network, task, **defaults | {"progress": False} | options)


def captured(trainer):
    """The trainer with a recorder where a GPU has graphs."""
    trainer.graphs.capture = Recorder()
    trainer.update.capturable = trainer.update.skips
    if trainer.update.capturable:
        for group in trainer.meta_optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)  # the fused CPU kernel reads float64
    return trainer


def assert_same_run(one, other, meta_steps):
    one.fit(meta_steps)
    other.fit(meta_steps)
    # Written out, since a NaN of a diverged trajectory is no equal of itself.
    assert repr(one.history) == repr(other.history)
    assert torch.equal(one.weights.current, other.weights.current)


# ---------------------------------------------------------------- the recorder itself


def test_a_recording_does_nothing_until_it_is_replayed():
    x, y = torch.ones(3), torch.zeros(3)

    def work():
        y.add_(x.expand(2, 3).sum(0) * 2)
        x.mul_(3)

    replay = Recorder().record(work)
    assert x.tolist() == [1.0] * 3
    assert y.tolist() == [0.0] * 3
    replay()
    replay()
    assert x.tolist() == [9.0] * 3
    assert y.tolist() == [4.0 + 12.0] * 3


def test_a_number_of_the_host_is_fixed_and_a_number_of_the_device_is_refused():
    x, number = torch.ones(2), [2.0]
    replay = Recorder().record(lambda: x.mul_(number[0]))
    number[0] = 5.0
    replay()
    assert x.tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="waits for the device"):
        Recorder().record(lambda: x.mul_(x.sum().item()))


# ---------------------------------------------------------------- one trajectory after another in the same memory


def scaled(instances, seed, scaling):
    start = instances.start()
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(start.shape, generator=generator) + 0.5 if scaling else None


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("update_rms", [None, 0.6])
@pytest.mark.parametrize("name", ["quadratic", "digits-mlp"])
def test_a_replayed_window_is_unroll(name, update_rms, objective, scaling):
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("both", 4, 2)
    task, count = get(name), 2 if name == "quadratic" else 1
    lr = 0.7 if update_rms is None else 0.05
    rule = Rule(network.config, network.flat_weights().detach(), lr, 0.01, update_rms)
    weights, graphs = torch.linspace(0.5, 1.5, 4), Graphs(Recorder())
    held, found = None, [torch.zeros(()), torch.zeros_like(rule.weights)]
    estimator = TruncatedBackpropagation(rule, objective, weights)

    def work(estimate):
        for place, result in zip(found, estimate(), strict=True):
            place.copy_(result)

    for number in range(6):

        def start():
            instances = Instances(task, range(10 * number, 10 * number + count))  # noqa: B023
            return instances, scaled(instances, number, scaling)  # noqa: B023

        fresh, fresh_scaling = start()
        expected = Trajectory(fresh, network.config, scaling=fresh_scaling)
        again, again_scaling = start()
        if held is None:
            held = Trajectory(again, network.config, scaling=again_scaling, window=4)
        else:
            held.place(again, again_scaling)
            graphs("start", held.evaluate_start_)
        assert torch.equal(held.losses, expected.losses)
        for length in (4, 4, 3):  # the horizon is no multiple of the window
            results = estimator.prepare(expected, length)()
            estimate = estimator.prepare(held, length)
            graphs(length, lambda: work(estimate))  # noqa: B023
            assert all(torch.equal(a, b) for a, b in zip(found, results, strict=True))
            assert torch.equal(held.losses, expected.losses)
        for tensor in ("theta", "state", "grad", "losses", "first_losses", "step"):
            assert torch.equal(getattr(held, tensor), getattr(expected, tensor)), tensor
        assert held.steps_done == expected.steps_done == 11
        rule.weights.mul_(0.9)
    assert graphs.capture.recorded == 3
    assert graphs.capture.replayed == (5 - WARM_UP) + (12 - WARM_UP) + (6 - WARM_UP)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_a_replayed_step_of_the_optimizer_is_a_step(orthogonalize):
    """With the update scaled over each tensor, too, nothing waits for the device or takes a number from the host."""
    network, runs = l2l.CoordinatewiseLSTM("both", 4, 1, update_rms=0.6), []
    for captured in (False, True):
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (7,), (2, 3, 2, 2))]
        options = {"lr": torch.tensor(0.1), "weight_decay": 0.1, "orthogonalize": orthogonalize}
        optimizer, graphs = l2l.LSTMOptimizer(params, network, **options), Graphs(Recorder() if captured else None)
        for param in params:
            param.grad = torch.zeros_like(param)
        for _ in range(6):
            for param in params:
                param.grad.normal_()
            graphs("step", optimizer.step)
            options["lr"].mul_(0.9)
        runs.append(params)
    assert graphs.capture.replayed == 6 - WARM_UP
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_tensors_keep_their_places():
    network = l2l.CoordinatewiseLSTM("moments", 4, 1)
    trajectory = Trajectory(Instances(get("digits-mlp"), [1]), network.config, window=5)
    estimator = TruncatedBackpropagation(Rule(network.config, network.flat_weights().detach()))

    def places():
        names = ("theta", "state", "step", "grad", "losses", "first_losses", "_batches")
        return [getattr(trajectory, name).data_ptr() for name in names]

    before, saved = places(), trajectory.state_dict()
    estimator.prepare(trajectory, 5)()
    trajectory.place(Instances(get("digits-mlp"), [2]))
    estimator.prepare(trajectory, 3)()
    trajectory.load_state_dict(saved)
    assert places() == before


# ---------------------------------------------------------------- the trainer


OPTIONS = {
    "plain": {},
    "moving": {"scaling": 1.0, "objective": "relative", "parallel": 2, "horizon": LogUniform(3, 20)},
    "led": {"imitation": 0.5, "parallel": 3, "schedule": "cosine"},
    "log": {"objective": "log", "loss_weights": [0.0, 0.0, 1.0, 1.0, 2.0], "lr": 0.5, "weight_decay": 0.1},
    "second": {"second_derivatives": True},
    "sgd": {"meta_optimizer": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9), "schedule": "cosine"},
    "unclipped": {"clip": None},
    "windows": {"clip_windows": 0.1, "parallel": 2},
    "mixture": {"parallel": 2},
    "sampled": {"coordinates": 7, "parallel": 2},
    "scaled updates": {"update_rms": 0.6, "coordinates": 7, "lr": 0.1, "weight_decay": 0.1},
}


def module_task():
    inputs = torch.linspace(-1, 1, 32).unsqueeze(1)
    return ModuleTask(lambda: torch.nn.Linear(1, 2), (inputs, inputs.expand(32, 2).sin()), torch.nn.functional.mse_loss)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("task", ["quadratic", "digits-mlp", "module"])
def test_captured_meta_training_is_the_eager_one(task, name):
    task = module_task() if task == "module" else task
    tasks = [task, Quadratic(3, name="three")] if name == "mixture" else task
    graphs = captured(make_trainer(tasks, **OPTIONS[name]))
    assert_same_run(graphs, make_trainer(tasks, **OPTIONS[name]), 30)
    assert graphs.graphs.capture.replayed > 20


def test_every_meta_step_of_a_long_run_is_replays():
    trainer = captured(make_trainer(horizon=10))
    trainer.fit(20)
    recorder = trainer.graphs.capture
    warmed, recorded = recorder.warmed, recorder.recorded
    assert recorded == 5  # a window, a start and the update; a window and a start of the validation
    trainer.fit(40)
    assert (recorder.warmed, recorder.recorded) == (warmed, recorded)


def test_too_many_lengths_run_eagerly():
    options = {"horizon": LogUniform(1, 15), "parallel": 2}
    trainer = captured(make_trainer(**options))
    trainer.graphs.limit = 4
    assert_same_run(trainer, make_trainer(**options), 40)
    assert trainer.graphs.capture.recorded == 4


def test_a_run_goes_on_captured_where_an_eager_one_stopped(tmp_path):
    make_trainer(checkpoint=tmp_path).fit(8)
    resumed = captured(make_trainer(checkpoint=tmp_path))
    assert_same_run(resumed, make_trainer(), 24)
    again = make_trainer(checkpoint=tmp_path)  # and the other way round
    assert_same_run(again, make_trainer(), 32)
    assert isinstance(again.meta_optimizer.param_groups[0]["lr"], float)


class Cliff(Quadratic):
    """Some of its trajectories diverge from the first step on."""

    def loss(self, params, batch):
        loss = super().loss(params, batch)
        return torch.where(batch[1][0] > 1.5, float("nan"), loss)


def test_diverged_meta_steps_are_skipped_on_the_device():
    trainer, eager = captured(make_trainer(Cliff(3))), make_trainer(Cliff(3))
    assert_same_run(trainer, eager, 40)
    assert 0 < trainer.history.skipped < 40
    count = trainer.meta_optimizer.state[trainer.parameters[0]]["step"]
    assert count == 40 - trainer.history.skipped


def test_a_task_that_waits_for_the_device_is_found_out():
    class Waits(Quadratic):
        def loss(self, params, batch):
            return super().loss(params, batch) * (1.0 if torch.equal(batch[1], batch[1]) else 0.0)

    with pytest.raises(RuntimeError, match="waits for the device"):
        captured(make_trainer(Waits(3), instances=1)).fit(10)


def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="graphs must be False or None on cpu, got True"):
        make_trainer(graphs=True)
    assert make_trainer(graphs=False).graphs.capture is None
