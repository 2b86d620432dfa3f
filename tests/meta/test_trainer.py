"""The meta-trainer: it learns, it resumes to the last bit, it refuses what makes no sense."""

import math
import subprocess
import sys

import pytest
import torch
from torch import distributed

import l2l_fast as l2l
from l2l_fast.meta import Horizon, LogUniform, MetaTrainer, Staged
from l2l_fast.meta.estimators import TruncatedBackpropagation
from l2l_fast.meta.unroll import Rule, Trajectory
from l2l_fast.tasks import Instances, Quadratic


def make_network(features="identity", hidden=4, **options):
    torch.manual_seed(0)
    return l2l.CoordinatewiseLSTM(features, hidden, 1, **options)


def make_trainer(network=None, tasks="quadratic", **options):
    defaults = {"instances": 4, "unroll": 5, "horizon": 12, "validate_every": 4, "validation_instances": 2}
    return MetaTrainer(network or make_network(), tasks, **defaults | {"progress": False} | options)


def test_it_learns():
    network = make_network(hidden=8)
    options = {"instances": 32, "horizon": 40, "meta_lr": 0.01, "validate_every": 50, "progress": False}
    trainer = MetaTrainer(network, Quadratic(4), **options)
    history = trainer.fit(150)
    assert history.best_score < 0.5  # the mean over 40 steps of f_t / f_0; the untrained network moves nowhere
    assert history.best_score == min(score for _, score in history.validations)


def test_it_learns_with_its_update_scaled():
    network = make_network("moments", hidden=8, update_rms=0.6)
    options = {"instances": 32, "horizon": 40, "meta_lr": 0.01, "validate_every": 50, "lr": 0.1, "progress": False}
    trainer = MetaTrainer(network, Quadratic(4), **options)
    history = trainer.fit(150)
    before = MetaTrainer(
        make_network("moments", hidden=8, update_rms=0.6), Quadratic(4), **options | {"meta_lr": 1e-30}
    )
    assert history.best_score < 0.7 * before.fit(1).best_score


def test_the_rate_of_the_optimizee_is_the_networks_unless_given():
    assert make_trainer().options.lr == 1.0
    assert make_trainer(make_network(update_rms=0.6)).options.lr == 1e-3
    assert make_trainer(make_network(update_rms=0.6), lr=0.5).options.lr == 0.5


def test_the_best_weights_stay_in_the_network_and_training_goes_on_from_the_last():
    trainer = make_trainer(meta_lr=0.5)  # so large that the last weights are not the best
    trainer.fit(40)
    assert torch.equal(trainer.network.flat_weights().detach(), trainer.weights.best)
    unbroken = make_trainer(meta_lr=0.5)
    trainer.fit(60)
    assert trainer.history.meta_losses == unbroken.fit(60).meta_losses


class Stop(Exception):
    pass


def raising(call, error=Stop):
    """Of a function called with anything, the call that raises."""
    left = iter(range(call - 1, -1, -1))

    def fail(*_):
        if next(left, None) == 0:
            raise error

    return fail


OFTEN = {"meta_lr": 0.1, "average": 0.5, "parallel": 2}  # the last weights are not the best, nor their average


def test_an_exception_leaves_the_best_weights_and_changes_nothing_of_what_follows():
    trainer, unbroken = make_trainer(**OFTEN), make_trainer(**OFTEN)
    for one in (trainer, unbroken):
        one.fit(5)
    with pytest.raises(Stop):
        trainer.fit(30, on_step=raising(10))
    assert trainer.meta_step == 15
    assert torch.equal(trainer.network.flat_weights().detach(), trainer.weights.best)
    assert trainer.fit(30) == unbroken.fit(30)
    assert torch.equal(trainer.weights.current, unbroken.weights.current)
    assert torch.equal(trainer.weights.best, unbroken.weights.best)


@pytest.mark.parametrize("number", [3, 4])  # the last is at the end of the run
def test_a_validation_that_failed_is_made_up_for(monkeypatch, number):
    trainer, fail = make_trainer(**OFTEN), raising(number)
    score = trainer.validation.score
    monkeypatch.setattr(trainer.validation, "score", lambda index: fail() or score(index))
    with pytest.raises(Stop):
        trainer.fit(16)
    assert trainer.meta_step == 4 * number
    assert trainer.fit(16) == make_trainer(**OFTEN).fit(16)


class Failing(Quadratic):
    """Its loss calls a function first."""

    def __init__(self):
        super().__init__(3)
        self.first = lambda: None

    def loss(self, params, batch):
        self.first()
        return super().loss(params, batch)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_meta_step_that_failed_is_made_again_on_new_trajectories(error):
    task = Failing()
    trainer, twin = make_trainer(tasks=task, **OFTEN), make_trainer(tasks=Quadratic(3), **OFTEN)

    def in_the_tenth(step):
        if step == 9:
            task.first = raising(8, error)  # within the second of its two windows

    with pytest.raises(error):
        trainer.fit(30, on_step=in_the_tenth)
    assert trainer.meta_step == len(trainer.history.meta_losses) == 9
    assert torch.equal(trainer.network.flat_weights().detach(), trainer.weights.best)
    with pytest.raises(Stop):
        twin.fit(30, on_step=raising(9))
    twin.streams.end_all()
    twin.streams.started = trainer.streams.started
    assert trainer.fit(30) == twin.fit(30)
    assert torch.equal(trainer.weights.current, twin.weights.current)


def test_weights_loaded_between_two_fits_are_trained_from_there(monkeypatch):
    trainer = make_trainer(average=0.9, parallel=2, horizon=Staged((20, 40), patience=9))
    trainer.fit(6)
    torch.manual_seed(1)
    mine = l2l.CoordinatewiseLSTM("identity", 4, 1).flat_weights().detach()
    trainer.network.load_flat_weights_(mine)
    seen = []
    monkeypatch.setattr(trainer.validation, "score", lambda index: 100.0)  # worse than what the others had
    trainer.fit(8, on_step=lambda _: seen.append((trainer.rule.weights.clone(), trainer.weights.averaged.clone())))
    assert torch.equal(seen[0][0], mine)  # the first meta-step's
    assert all((averaged - mine).abs().max() < 3 * trainer.options.meta_lr for _, averaged in seen)
    assert trainer.history.best_score == trainer.options.horizon.best == 100.0
    assert torch.equal(trainer.network.flat_weights().detach(), seen[-1][1])
    assert [stream.trajectory.steps_done for stream in trainer.streams.running] == [10, 10]  # of their own trajectories
    trainer.network.load_flat_weights_(mine)
    trainer.fit(8)  # of which none is left
    assert torch.equal(trainer.network.flat_weights().detach(), mine)


def test_weights_loaded_before_the_first_fit_are_what_is_trained():
    torch.manual_seed(1)
    mine = l2l.CoordinatewiseLSTM("identity", 4, 1)
    trainer = make_trainer(average=0.9)
    trainer.network.load_state_dict(mine.state_dict())
    assert trainer.fit(6) == (other := make_trainer(mine, average=0.9)).fit(6)
    assert torch.equal(trainer.network.flat_weights(), other.network.flat_weights())


def test_one_meta_step_is_one_adam_step_on_the_unrolls_gradient():
    network = make_network()
    trainer = make_trainer(network, clip=None)
    weights = network.flat_weights().detach()
    stream = trainer.streams.start(0.0)
    gradient = TruncatedBackpropagation(Rule(network.config, weights)).prepare(stream.trajectory, 5)().gradient
    reference = torch.nn.Parameter(weights.clone())
    adam = torch.optim.Adam([reference], lr=trainer.options.meta_lr)
    reference.grad = gradient
    adam.step()
    trainer = make_trainer(make_network(), clip=None)
    trainer.step()
    torch.testing.assert_close(trainer.network.flat_weights(), reference)


def test_the_average_of_the_weights_is_validated_and_kept():
    trainer = make_trainer(average=0.8, meta_lr=0.1, validate_every=7)
    seen, scores = [], []
    score = trainer.validation.score
    trainer.validation.score = lambda index: scores.append(trainer.rule.weights.clone()) or score(index)
    trainer.fit(7, on_step=lambda step: seen.append(trainer.weights.read()))
    expected = make_network().flat_weights().detach()
    for step, weights in enumerate(seen, 1):
        decay = min(0.8, step / (step + 9))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(scores[0], expected)
    torch.testing.assert_close(trainer.network.flat_weights(), expected)
    assert not torch.allclose(trainer.weights.current, expected)


@pytest.mark.parametrize("clip_windows", [None, 230.0])  # two of the three have a larger norm
def test_parallel_trajectories_are_averaged(clip_windows):
    sgd = {"clip": None, "meta_optimizer": lambda params: torch.optim.SGD(params, lr=0.01)}
    trainer = make_trainer(parallel=3, horizon=30, clip_windows=clip_windows, **sgd)
    before = trainer.network.flat_weights().detach()
    expected, norms = torch.zeros_like(before), []
    for number in range(3):
        stream = make_trainer().streams.make(number, 0, 12, led=False)
        rule = Rule(trainer.network.config, before)
        gradient = TruncatedBackpropagation(rule).prepare(stream.trajectory, 5)().gradient
        norms.append(gradient.norm().item())
        expected += gradient * min(1.0, (clip_windows or math.inf) / norms[-1]) / 3
    assert min(norms) < 230.0 < max(norms)
    trainer.step()
    torch.testing.assert_close(before - trainer.network.flat_weights().detach(), 0.01 * expected)


def test_parallel_trajectories_are_out_of_step():
    trainer = make_trainer(parallel=3, horizon=30)
    trainer.step()
    assert [stream.horizon for stream in trainer.streams.running] == [10, 20, 30]
    for _ in range(5):
        trainer.step()
    assert sorted(stream.trajectory.steps_done for stream in trainer.streams.running if stream) == [10, 20]


def test_tasks_take_turns():
    tasks = [Quadratic(3, name="three"), Quadratic(5, name="five")]
    trainer = make_trainer(tasks=tasks, horizon=5)
    seen = []
    for _ in range(4):
        trainer.step()
        seen.append(trainer.streams.started)
    assert [trainer.streams.make(n, n % 2, 5, False).trajectory.theta.shape[1] for n in range(4)] == [3, 5, 3, 5]
    assert seen == [1, 2, 3, 4]
    assert [step for step, _ in trainer.fit(8).validations] == [4, 8]  # one score over both tasks


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0] * 6),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine"}, [1.0, 0.933, 0.7525, 0.505, 0.2575, 0.077]),
        ({"schedule": "cosine", "warmup": 1}, [0.5, 0.933, 0.7525, 0.505, 0.2575, 0.077]),
    ],
)
def test_the_rate_comes_up_and_goes_down(options, expected):
    trainer, rates = make_trainer(meta_lr=0.01, **options), []
    trainer.fit(6, on_step=lambda _: rates.append(trainer.meta_optimizer.param_groups[0]["lr"] / 0.01))
    assert rates == pytest.approx(expected, abs=1e-3)


def test_a_meta_optimizer_of_ones_own_keeps_its_rate():
    trainer = make_trainer(meta_optimizer=lambda params: torch.optim.SGD(params, lr=0.7))
    trainer.fit(2)
    assert trainer.meta_optimizer.param_groups[0]["lr"] == 0.7


def test_instances_do_not_depend_on_their_company():
    alone = make_trainer(instances=1).streams.start(0.0).trajectory
    together = make_trainer(instances=4).streams.start(0.0).trajectory
    assert torch.equal(alone.theta[0], together.theta[0])


OPTIONS = {
    "plain": {},
    "moving": {"scaling": 1.0, "objective": "relative", "parallel": 2, "horizon": LogUniform(3, 20)},
    "led": {"imitation": 0.5, "parallel": 3, "schedule": "cosine"},
    "staged": {"horizon": Staged((6, 12), patience=1), "objective": "log"},
    "warmup": {"warmup": 10, "schedule": "cosine"},
    "second": {"second_derivatives": True, "loss_weights": [0.0, 0.0, 1.0, 1.0, 1.0]},
    "soap": {"meta_optimizer": "soap", "average": 0.9},
    "sgd": {"meta_optimizer": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)},
    "scaled updates": {"update_rms": 0.6, "coordinates": 9, "weight_decay": 0.1},
    "scaled updates, led": {"update_rms": 0.6, "imitation": 0.5},
    "scaled updates, second": {"update_rms": 0.6, "second_derivatives": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("task", ["quadratic", "digits-mlp"])
def test_resumed_run_equals_the_unbroken_one_to_the_last_bit(tmp_path, name, task):
    def fresh(**more):
        options = {key: (Staged((6, 12), patience=1) if name == "staged" and key == "horizon" else value)
                   for key, value in OPTIONS[name].items()}  # fmt: skip
        network = make_network("moments", update_rms=options.pop("update_rms", None))
        return make_trainer(network, task, checkpoint_every=3, instances=2, **options, **more)

    unbroken = fresh()
    expected = unbroken.fit(14)

    killed = fresh(checkpoint=tmp_path)
    with pytest.raises(Stop):  # after meta-step 8, between checkpoints; the last one is of meta-step 6
        killed.fit(14, on_step=raising(8))
    resumed = fresh(checkpoint=tmp_path)
    found = resumed.fit(14)
    assert found == expected
    assert torch.equal(resumed.weights.current, unbroken.weights.current)
    assert torch.equal(resumed.network.flat_weights(), unbroken.network.flat_weights())


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    make_trainer(checkpoint=tmp_path).fit(2)
    with pytest.raises(ValueError, match=r"belongs to a run with unroll=5 \(now 6\)"):
        make_trainer(checkpoint=tmp_path, unroll=6).fit(2)
    with pytest.raises(ValueError, match=r"update_rms=None \(now 0.6\)"):
        make_trainer(make_network(update_rms=0.6), lr=1.0, checkpoint=tmp_path).fit(2)


def test_diverging_meta_steps_are_skipped_and_the_network_survives():
    class Cliff(Quadratic):
        def loss(self, params, batch):
            return super().loss(params, batch) * float("nan")

    trainer = make_trainer(tasks=Cliff(3))
    before = trainer.network.flat_weights().detach()
    with pytest.warns(UserWarning, match="network is as it was before training: all 4 meta-steps were skipped") as told:
        history = trainer.fit(4)
    assert [warning.filename for warning in told] == [__file__]
    assert history.skipped == 4
    assert history.best_score == float("inf")
    assert torch.equal(trainer.network.flat_weights().detach(), before)


def test_validations_that_are_never_finite_are_told(monkeypatch):
    trainer = make_trainer()
    before = trainer.network.flat_weights().detach()
    monkeypatch.setattr(trainer.validation, "score", lambda index: math.nan)
    with pytest.warns(UserWarning, match="the network is as it was before training: none of 2 validations was finite"):
        trainer.fit(8)
    assert torch.equal(trainer.network.flat_weights().detach(), before)


def test_no_time_is_no_reason_to_warn():
    assert make_trainer().fit(4, max_seconds=0).meta_losses == []


def test_max_seconds_stops_early():
    trainer = make_trainer()
    trainer.fit(10**6, max_seconds=0.3)
    assert 1 <= trainer.meta_step < 10**6


def test_tensorboard_and_progress(tmp_path, capfd):
    make_trainer(log_dir=tmp_path, progress=True).fit(4)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "meta-training" in shown.err
    assert "4/4" in shown.err


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'l2l_fast\[tensorboard\]'"):
        make_trainer(log_dir=tmp_path).fit(1)


def test_validation_uses_its_own_instances():
    trainer = make_trainer()
    trainer.fit(4)
    (step, score), *_ = trainer.history.validations
    trajectory = trainer.streams.start(0.0).trajectory
    assert step == 4
    assert 0 < score < 10
    assert trajectory.theta.shape == (4, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks must name at least one"),
        ({"tasks": "quadratc"}, "quadratic"),
        ({"tasks": [5]}, "tasks must be a task, its name, or a sequence of them, got 5"),
        ({"tasks": 5}, "tasks must be a task"),
        ({"network": torch.nn.Linear(1, 1)}, "network must be a CoordinatewiseLSTM, got <class"),
        ({"network": make_network().double()}, r"network must be of dtype float32, .* got torch\.float64"),
        ({"unroll": 0}, "unroll must be an int of at least 1, got 0"),
        ({"unroll": 2.5}, "unroll must be an int of at least 1, got 2.5"),
        ({"instances": 0}, "instances must be an int of at least 1"),
        ({"coordinates": 1.5}, "coordinates must be an int of at least 1, or None"),
        ({"average": 1.0}, "average must be a number in"),
        ({"average": None}, "average must be a number in"),
        ({"lr": math.nan}, "lr must be a positive number, or two with the lower first or None, got nan"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"weight_decay": math.nan}, "weight_decay must be a number of at least 0"),
        ({"weight_decay": -5}, "weight_decay must be a number of at least 0, got -5"),
        ({"seed": -1}, "seed must be an int of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"meta_optimizer": "sgd"}, "meta_optimizer must be one of"),
        ({"meta_lr": 0.0}, "meta_lr must be a positive number"),
        ({"meta_lr": math.inf}, "meta_lr must be a positive number, got inf"),
        ({"meta_lr": "0.1"}, "meta_lr must be a positive number, got '0.1'"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"warmup": -1}, "warmup must be an int of at least 0"),
        ({"objective": "mean"}, "objective must be one of"),
        ({"clip": 0.0}, "clip must be a positive number or None"),
        ({"clip_windows": -1.0}, "clip_windows must be a positive number or None"),
        ({"clip": math.nan}, "clip must be a positive number or None"),
        ({"scaling": -1.0}, r"scaling must be in \[0, 10\]"),
        ({"scaling": 1000}, r"scaling must be in \[0, 10\], got 1000"),
        ({"loss_weights": [1.0]}, "loss_weights must be of length unroll = 5"),
        ({"loss_weights": 1.0}, "loss_weights must be of length unroll = 5"),
        ({"loss_weights": [1.0] * 4 + [math.nan]}, "loss_weights must be finite numbers"),
        ({"imitation": 1.5}, r"imitation must be in \[0, 1\]"),
        ({"imitation": (0.5,)}, r"imitation must be in \[0, 1\]"),
        ({"imitation": None}, r"imitation must be in \[0, 1\]"),
        ({"imitation": 0.5, "second_derivatives": True}, "imitation must be 0 with second_derivatives"),
        ({"horizon": 0}, "horizon must be an int of at least 1"),
        ({"horizon": 2.5}, "horizon must be an int of at least 1, or a curriculum .* got 2.5"),
        ({"horizon": "100"}, "horizon must be an int of at least 1, or a curriculum .* got '100'"),
        ({"horizon": None}, "horizon must be an int of at least 1"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"meta_steps": 0}, "meta_steps must be an int of at least 1, got 0"),
        ({"meta_steps": 2.5}, "meta_steps must be an int of at least 1, got 2.5"),
        ({"meta_steps": 2, "max_seconds": math.nan}, "max_seconds must be a number, got nan"),
    ],
)
def test_fit_refuses_nonsense(arguments, message):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.fit(**arguments)
    assert trainer.meta_step == 0


def test_the_largest_scaling_skips_no_meta_step():
    assert make_trainer(scaling=10, instances=1).fit(20).skipped == 0


_RANK = """
import sys, torch, torch.distributed as dist, l2l_fast as l2l
rank, world, instances = map(int, sys.argv[1:4])
folder, options = sys.argv[4], eval(sys.argv[5])
options |= dict(horizon=12, unroll=5, validate_every=3, clip=None, progress=False)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
torch.manual_seed(0)
network = l2l.CoordinatewiseLSTM("moments", 4, 1)
network.bias_hh_l0.requires_grad_(False)
checkpoint = f"{folder}/checkpoint" if world > 1 else None
trainer = l2l.MetaTrainer(network, "quadratic", instances=instances, checkpoint=checkpoint, **options)
trainer.fit(7)
if world > 1:  # and a resumed run on the same ranks goes on
    trainer = l2l.MetaTrainer(network, "quadratic", instances=instances, checkpoint=checkpoint, **options)
trainer.fit(9)
torch.save(trainer.weights.current, f"{folder}/weights-{world}-{rank}")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "pes"}, {"estimator": "es+backpropagation", "perturbed_share": "variance"}],
    ids=lambda options: options.get("estimator", "backpropagation"),
)
def test_two_ranks_equal_one_with_twice_the_instances(tmp_path, options):
    def run(rank, world, instances):
        arguments = [sys.executable, "-c", _RANK, str(rank), str(world), str(instances), str(tmp_path), repr(options)]
        return subprocess.Popen(arguments)

    processes = [run(0, 2, 3), run(1, 2, 3), run(0, 1, 6)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    alone = torch.load(tmp_path / "weights-1-0")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"weights-2-{rank}"), alone, rtol=1e-5, atol=1e-6)


def test_torchrun_without_a_process_group_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2 .* call torch\.distributed\.init_process_group\(\)"):
        make_trainer()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        make_trainer()
    finally:
        distributed.destroy_process_group()
    for size in ("1", "", "two"):  # that of somebody else is not ours to judge
        monkeypatch.setenv("WORLD_SIZE", size)
        make_trainer()


def test_horizon_object_and_int_are_the_same():
    assert make_trainer(horizon=9).fit(3) == make_trainer(horizon=Horizon(9)).fit(3)


def test_instances_report_their_coordinates():
    trajectory = Trajectory(Instances(Quadratic(3), [1, 2]), make_network().config)
    assert trajectory.state.shape == (2, 3, 8)


def test_a_validation_says_which_task_it_is_at():
    told = []
    trainer = MetaTrainer(l2l.CoordinatewiseLSTM("moments", 4, 1), ["quadratic"] * 2, horizon=20, progress=False)
    trainer.validate(told.append)
    assert told == ["validating, 1 of 2", "validating, 2 of 2"]
    assert len(trainer.history.validations) == 1
