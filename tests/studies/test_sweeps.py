"""Sweeps: what a trial gives, how it goes on, and four workers on one study of which one is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import l2l_fast as l2l
from l2l_fast.evaluate.compare import held_out_seeds, learned_lanes
from l2l_fast.evaluate.trajectories import mean_loss, trajectories
from l2l_fast.files import locked
from l2l_fast.studies import Range, Sweep, sweep
from l2l_fast.studies.sweeps import Worker

optuna = pytest.importorskip("optuna", reason="sweeps need Optuna")
TINY = {"meta_steps": 4, "horizon": 10, "seeds": 3}
COMMAND = [sys.executable, "-c", "from l2l_fast.cli import main; main()"]


def tiny(**options):
    options = {"meta_lr": [0.1, 0.01]} | options
    return Sweep("quadratic", options | {"instances": [2], "validation_instances": [2]}, **TINY)


# ---------------------------------------------------------------- what a trial gives


def test_a_trial_is_what_the_library_gives_by_hand(tmp_path):
    found = sweep(tiny(), tmp_path)
    assert [point.parameters["meta_lr"] for point in found.points] == [0.1, 0.01]
    for point in found.points:
        recipe = {"tasks": [{"name": "quadratic"}], "network": {"features": "identity", "num_layers": 1},
                  "training": {"instances": 2, "validation_instances": 2, "meta_lr": point.parameters["meta_lr"],
                               "horizon": 10, "validate_every": 10}, "meta_steps": 4}  # fmt: skip
        done = l2l.train(recipe, progress=False)
        assert done.history.meta_losses == point.meta_losses[0]
        task = l2l.tasks.get("quadratic")
        lanes = learned_lanes(done.network).values()
        seeds = held_out_seeds(0, 3)
        losses = trajectories(task, list(lanes), horizon=10, seeds=seeds)
        assert point.mean_loss == mean_loss(losses[0])
        assert point.curve.tolist() == losses[0].double().mean(0).tolist()
        kept = l2l.CoordinatewiseLSTM.from_pretrained(point.networks[0].split(":", 1)[1])
        assert torch.equal(kept.flat_weights(), done.network.flat_weights())
    assert found.best is min(found.points, key=lambda point: point.mean_loss)


def test_what_is_finished_is_not_run_again_and_more_values_join(tmp_path, monkeypatch):
    ran, run = [], Sweep.run
    monkeypatch.setattr(Sweep, "run", lambda self, slot, *rest: ran.append(slot) or run(self, slot, *rest))
    first = sweep(tiny(), tmp_path)
    again = sweep(tiny(meta_lr=[0.01, 0.1, 0.001]), tmp_path)
    assert [slot.split(",")[0] for slot in ran] == ["meta_lr=0.1", "meta_lr=0.01", "meta_lr=0.001"]
    assert again.points[1].curve.tolist() == first.points[0].curve.tolist()
    other = Sweep("quadratic", first.what.options, **TINY | {"meta_steps": 5})
    assert other.study != first.what.study


def test_a_trial_goes_on_from_its_own_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("l2l_fast.studies.sweeps.CHECKPOINT_EVERY", 1)
    what = tiny(meta_lr=[0.1])
    whole = sweep(what, tmp_path / "whole")
    steps = []

    def stop(description, done, total):
        if description != "trials":
            steps.append(done)
            if len(steps) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(what, tmp_path / "parts", progress=stop)
    found = sweep(what, tmp_path / "parts", progress=stop)
    assert steps == [1, 2, 3, 4]
    assert found.points[0].meta_losses == whole.points[0].meta_losses
    assert found.points[0].curve.tolist() == whole.points[0].curve.tolist()


def test_a_trial_whose_silent_worker_lives_waits_for_it(tmp_path):
    what, folder = tiny(meta_lr=[0.1]), tmp_path / "trial"
    (folder / "checkpoint").mkdir(parents=True)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(folder / "checkpoint"))
        threading.Timer(0.5, held.close).start()
        value, _ = what.run("meta_lr=0.1,seed=0", {"meta_lr": 0.1, "instances": 2, "validation_instances": 2}, folder)
    assert value > 0


def test_a_search_tries_as_many_points_as_it_is_asked_for(tmp_path):
    options = {"meta_lr": Range(0.001, 0.1), "unroll": Range(2, 8), "features": ["identity", "moments"]}
    what = Sweep("quadratic", options | {"instances": [2], "validation_instances": [2]}, trials=5, **TINY)
    found = sweep(what, tmp_path)
    assert len(found.points) == 5
    assert len({point.parameters["meta_lr"] for point in found.points}) == 5
    for point in found.points:
        assert 0.001 <= point.parameters["meta_lr"] <= 0.1
        assert point.parameters["unroll"] in range(2, 9)
        assert point.unroll == point.parameters["unroll"]
        network = l2l.CoordinatewiseLSTM.from_pretrained(point.networks[0].split(":", 1)[1])
        assert network.config.features == point.parameters["features"]


@pytest.mark.filterwarnings("ignore:the network is as it was before training")
def test_what_diverged_is_told_and_never_the_best(tmp_path):
    found = sweep(tiny(output_scale=[0.1, 1e30], meta_lr=[0.1]), tmp_path)
    assert [point.mean_loss < float("inf") for point in found.points] == [True, False]
    assert found.best is found.points[0]
    found.write(tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["points"][1]["mean_loss"] is None


@pytest.mark.parametrize(
    ("options", "more", "words"),
    [
        ({}, {}, "options must be values by name"),
        ({"meta_learning": [1]}, {}, "options must be named among .*meta_lr"),
        ({"meta_lr": []}, {}, "meta_lr must be different values in a list"),
        ({"meta_lr": [0.1, 0.1]}, {}, "meta_lr must be different values in a list"),
        ({"meta_lr": [0.1, -1.0]}, {}, "meta_lr must be a positive number, got -1.0"),
        ({"features": ["sums"]}, {}, "features must be one of 'identity'"),
        ({"meta_lr": Range(0.1, 0.01)}, {}, "meta_lr must be a range LOW:HIGH of numbers, the lower first"),
        ({"meta_lr": [0.1]}, {"trials": 3}, "trials must be None where all values are listed"),
        ({"meta_lr": Range(0.01, 0.1)}, {"trials": 0}, "trials must be an int of at least 1, got 0"),
        ({"meta_lr": Range(0.01, 0.1)}, {"meta_seeds": 2}, "meta_seeds must be 1 for a search"),
        ({"meta_lr": [0.1]}, {"meta_steps": 0}, "meta_steps must be an int of at least 1, got 0"),
        ({"meta_lr": [0.1]}, {"device": "tpu9"}, "device must be one that this torch can use"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(options, more, words):
    with pytest.raises(ValueError, match=words):
        Sweep("quadratic", options, **more)


# ---------------------------------------------------------------- several workers


def workers_of(queue):
    """Process ids of the workers that run a trial now."""
    running = queue.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    return {int(trial.user_attrs["worker"].split(":")[-1]) for trial in running if "worker" in trial.user_attrs}


def test_four_workers_finish_twenty_trials_though_one_is_killed(storage, tmp_path):
    what = Sweep("quadratic", {"meta_lr": [0.1, 0.03, 0.01, 0.003, 0.001], "instances": [2]}, meta_seeds=4, **TINY)
    command = [
        *COMMAND, "sweep", "quadratic", "--meta-lr", "0.1,0.03,0.01,0.003,0.001", "--vary", "instances=2",
        "--meta-seeds", 4, "--meta-steps", 4, "--horizon", 10, "--seeds", 3, "--storage", storage, "--grace", 10,
        "--json", "--out", tmp_path,
    ]  # fmt: skip
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=quiet, text=True)
        for _ in range(4)
    ]
    by_id, killed = {worker.pid: worker for worker in workers}, None
    try:
        with Worker(what, tmp_path, storage, 10).queue() as queue:
            while killed is None and queue.finished() < 16:
                for process in workers_of(queue) & by_id.keys():
                    os.kill(process, signal.SIGSTOP)
                    if process in workers_of(queue):  # it cannot end its trial any more
                        killed = by_id[process]
                        os.kill(process, signal.SIGKILL)
                        break
                    os.kill(process, signal.SIGCONT)
                time.sleep(0.05)
            assert killed is not None
            ended = [worker.communicate(timeout=300) for worker in workers]
            trials = queue.study.get_trials(deepcopy=False)
    finally:
        for worker in workers:
            worker.kill()
    assert sorted(worker.returncode for worker in workers) == [-signal.SIGKILL, 0, 0, 0], ended
    complete = [trial.user_attrs["slot"] for trial in trials if trial.state.name == "COMPLETE"]
    assert sorted(complete) == sorted(what.slots())
    assert len(complete) == 20
    lost = [trial for trial in trials if trial.user_attrs.get("worker", "").endswith(f":{killed.pid}")]
    assert sum(trial.state.name == "FAIL" for trial in lost) == 1
    others = [trial for trial in trials if trial.state.name == "FAIL" and trial not in lost]
    assert all("dropped" in trial.user_attrs for trial in others)  # none was run twice
    reports = [json.loads(out) for worker, (out, _) in zip(workers, ended, strict=True) if worker is not killed]
    assert reports[0] == reports[1] == reports[2]
    alone = sweep(what, tmp_path / "alone")
    assert [entry["mean_losses"] for entry in reports[0]["points"]] == [point.mean_losses for point in alone.points]


def test_workers_of_one_command_share_its_trials(tmp_path):
    seen = []
    found = sweep(tiny(), tmp_path, workers=2, progress=lambda *what: seen.append(what))
    assert seen[-1] == ("trials", 2, 2)
    assert [point.mean_losses for point in found.points] == [
        point.mean_losses for point in sweep(tiny(), tmp_path / "alone").points
    ]


def test_workers_that_all_fail_are_told(tmp_path, capfd):
    what = tiny(meta_lr=[0.1])
    (tmp_path / what.study).write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"every worker has ended \(exit codes 1, 1\) and 1 of 1 trials are left"):
        sweep(what, tmp_path, workers=2)
    assert "checkpoint must be a folder" in capfd.readouterr().err
