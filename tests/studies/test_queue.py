"""A queue of trials: each run once by workers that race, are killed, fall silent and come back."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time

import pytest

from l2l_fast.studies import queue
from l2l_fast.studies.queue import Queue

optuna = pytest.importorskip("optuna", reason="sweeps need Optuna")
X = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
SPAWN = multiprocessing.get_context("spawn")


def fixed(count):
    return {f"x={k}": {"x": k / count} for k in range(count)}


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def note(path, text):
    with open(path, "a") as file:  # one write of a short line is whole
        file.write(f"{text}\n")


@pytest.fixture
def make():
    """Opens queues, and closes them with the test."""
    with contextlib.ExitStack() as stack:

        def make(storage, name, slots, **options):
            return stack.enter_context(Queue(storage, name, slots, X, **{"grace": 4} | options))

        yield make


def states(study):
    return [trial.state.name for trial in study.study.get_trials()]


def _noting(storage, name, count, path):
    def run(slot, parameters):
        note(path, slot)
        return parameters["x"], {}

    with Queue(storage, name, fixed(count), X, grace=20) as study:
        study.work(run)


def test_workers_that_race_run_every_slot_once(make, storage, tmp_path):
    count, path = 24, tmp_path / "ran"
    workers = [SPAWN.Process(target=_noting, args=(storage, "race", count, path)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted(lines(path)) == sorted(fixed(count))
    found = make(storage, "race", fixed(count)).results()
    assert {slot: result.value for slot, result in found.items()} == {f"x={k}": k / count for k in range(count)}


def test_to_look_and_to_take_is_one_act(make, storage):
    """A second worker comes between the first one's look at a trial and its taking it."""
    from sqlalchemy import event

    first, second = make(storage, "act", fixed(1)), make(storage, "act", fixed(1))
    place, taken = first.storage.get_trial_id_from_study_id_trial_number(first._study_id, 0), []

    def take(worker):
        taken.append(worker.storage.set_trial_state_values(place, optuna.trial.TrialState.RUNNING))

    other = threading.Thread(target=take, args=(second,))

    @event.listens_for(first._engine, "before_cursor_execute")
    def between(connection, cursor, statement, *rest):
        if statement.startswith("UPDATE trials") and other.ident is None:
            other.start()
            other.join(0.5)

    take(first)
    other.join()
    assert sorted(taken) == [False, True]


def _killed_once(storage, name, path):
    def run(slot, parameters):
        note(path, f"{slot} {parameters['x']}")
        if len(lines(path)) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.0, {}

    with Queue(storage, name, dict.fromkeys(["a", "b", "c"]), X, grace=4) as study:
        study.work(run)


def test_a_killed_workers_slot_is_taken_up_with_its_parameters(make, storage, tmp_path):
    path = tmp_path / "ran"
    worker = SPAWN.Process(target=_killed_once, args=(storage, "killed", path))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    again = make(storage, "killed", dict.fromkeys(["a", "b", "c"]))
    assert again.finished() == 1
    _killed_once(storage, "killed", path)
    ran = lines(path)
    assert [line.split()[0] for line in ran] == ["a", "b", "c", "b"]
    assert ran[1] == ran[3]
    assert len(again.results()) == 3
    assert sorted(states(again)) == ["COMPLETE"] * 3 + ["FAIL"]


def test_two_attempts_of_a_slot_are_run_once(make, storage):
    ran, study = [], make(storage, "twice", fixed(2))
    for _ in range(2):  # as several workers may put it back at the same moment
        study._add("x=1", {"x": 0.5})
    study.work(lambda slot, parameters: (ran.append(slot) or 0.0, {}))
    assert sorted(ran) == ["x=0", "x=1"]
    assert study._claim() is None
    assert sorted(states(study)) == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]


@pytest.fixture
def lite(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


def test_what_a_silent_worker_brings_late_is_dropped(make, lite):
    ran, study = [], make(lite, "late", fixed(1))

    def run(slot, parameters):
        ran.append(slot)
        if len(ran) == 1:  # others have taken it for killed
            study.storage.set_trial_state_values(1, optuna.trial.TrialState.FAIL)
            return -1.0, {}
        return 2.0, {"said": [1, 2]}

    study.work(run)
    assert ran == ["x=0", "x=0"]
    assert (study.results()["x=0"].value, study.results()["x=0"].facts["said"]) == (2.0, [1, 2])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left")])
def test_what_ends_a_worker_with_a_word_gives_its_slot_back_at_once(make, lite, error):
    def run(slot, parameters):
        raise error

    study = make(lite, "given back", {"a": None}, grace=1000)
    for _ in range(queue.ATTEMPTS + 1):  # never given up for it
        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            study.work(run)
    chosen = [trial.params["x"] for trial in study.study.get_trials() if trial.params]
    study.work(lambda slot, parameters: (parameters["x"], {}))
    assert chosen == [study.results()["a"].value] * len(chosen)


def test_a_slot_that_kills_its_workers_is_given_up(make, lite):
    study = make(lite, "deadly", fixed(1))
    for _ in range(queue.ATTEMPTS):
        assert study.finished() == 0
        trial = study._claim()
        study.storage.set_trial_state_values(trial.number + 1, optuna.trial.TrialState.FAIL)  # without a word
        study._requeue("x=0", trial.params)
    study.work(lambda slot, parameters: pytest.fail("it would kill this worker as well"))
    assert (study.finished(), study.results(), states(study)) == (1, {}, ["FAIL"] * queue.ATTEMPTS)


def test_a_slot_that_nobody_has_is_put_back_in_time(make, lite):
    study = make(lite, "lost", fixed(1))
    trial = study._claim()
    study.storage.set_trial_state_values(trial.number + 1, optuna.trial.TrialState.FAIL)  # and killed at that moment
    begun = time.monotonic()
    study.work(lambda slot, parameters: (parameters["x"], {}))
    assert study.poll < time.monotonic() - begun < 60
    assert study.results()["x=0"].value == 0.0


def test_a_study_grows_and_what_is_finished_stays(make, lite):
    ran = []
    for count in (2, 3):
        make(lite, "more", dict.fromkeys([f"trial={k}" for k in range(count)])).work(
            lambda slot, parameters: (ran.append((slot, parameters["x"])) or 0.0, {})
        )
    assert [slot for slot, _ in ran] == ["trial=0", "trial=1", "trial=2"]
    assert len({x for _, x in ran}) == 3  # drawn by the slot, not by the worker


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("study.db", "storage must be a URL such as sqlite:///runs/study.db or .*, got 'study.db'"),
        (5, "storage must be a URL"),
        ("sqlite:///:memory:", "storage must be a file: no other worker sees one in memory"),
        ("sqlite:////no/such/folder/study.db", "the storage sqlite:////no/such/folder/study.db cannot be opened"),
        ("nonsense://host/name", "storage must be a URL|cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused(monkeypatch, url, words):
    monkeypatch.setattr(queue, "_OPENINGS", 2)
    with pytest.raises(ValueError, match=words):
        Queue(url, "study", {}, X)


def test_a_password_is_not_shown(monkeypatch):
    pytest.importorskip("psycopg", reason="no psycopg, the driver of PostgreSQL")
    monkeypatch.setattr(queue, "_OPENINGS", 1)
    with pytest.raises(ValueError, match=re.escape("studies:***@127.0.0.1:1/none cannot be opened")) as refused:
        Queue("postgresql+psycopg://studies:secret@127.0.0.1:1/none", "study", {}, X)
    assert "secret" not in str(refused.value)


def test_a_driver_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImportError, match=r"needs psycopg: pip install psycopg"):
        Queue("postgresql+psycopg://host/none", "study", {}, X)


def test_missing_optuna_says_what_to_install(monkeypatch, lite):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"sweeps need Optuna: pip install 'l2l_fast\[sweep\]'"):
        Queue(lite, "study", {}, {})
