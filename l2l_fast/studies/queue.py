"""A queue of trials in a database, shared by workers on any number of machines: each is run once, whoever is killed.

It is an Optuna study, so Optuna's samplers choose what is left open and its tools show it. A *slot* is a trial that is
wanted. What is taken up for it is an attempt, a trial of the study; its oldest attempt that has not failed is the
slot's own, and any other is dropped before it runs. So any worker may put a slot back, and none is run twice.

A worker that runs an attempt says so every few seconds. One that has been silent for ``grace`` seconds has been killed:
its attempt has failed, and its slot goes back with the parameters that it had.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from l2l_fast.checks import is_whole, require

ATTEMPTS = 3  # that end without a word, after which a slot is given up: something in it kills its workers
BUSY_SECONDS = 60  # that a worker waits for another one's transaction on SQLite
_OPENINGS = 8  # tries to open a storage: tables that several workers make at once are made by one of them
_SLOT, _WORKER, _RELEASED, _DROPPED = "slot", "worker", "released", "dropped"  # attributes of trials


class TakenAway(Exception):
    """A worker was silent for so long that its attempt has been given to another one."""


@dataclass(frozen=True)
class Result:
    """What the attempt that finished a slot has left.

    Attributes:
        parameters: of the trial, by name.
        value: what is to be small.
        facts: what else was said of it.
    """

    parameters: dict
    value: float
    facts: dict


class Queue:
    """Slots in a database; ``with`` closes its connections.

    Args:
        storage: the database, as SQLAlchemy writes it: ``sqlite:///runs/study.db``, ``postgresql+psycopg://host/name``.
        name: of the study; the same name is the same queue.
        slots: by name, the parameters that are fixed; None leaves all of them to the sampler.
        space: Optuna's distributions of the parameters, by name.
        grace: seconds of silence after which a worker counts as killed.
        seed: of what the sampler draws; with the slot's name it decides all that does not follow from other trials.

    Raises:
        ImportError: without Optuna, or without the database's driver.
        ValueError: the storage cannot be opened.
    """

    def __init__(
        self, storage: str, name: str, slots: Mapping[str, dict | None], space: Mapping[str, object], *,
        grace: int = 60, seed: int = 0,
    ) -> None:  # fmt: skip
        require(is_whole(grace, 2), "grace", grace, "an int of at least 2")
        self.optuna = require_optuna()
        self.slots, self.space, self.seed = dict(slots), dict(space), seed
        self.beat, self.poll = max(1, grace // 4), min(1.0, grace / 4)
        self.storage = self._open(storage, grace)
        self.study = self.optuna.create_study(
            storage=self.storage, study_name=name, direction="minimize", load_if_exists=True
        )
        self._study_id = self.storage.get_study_id_from_name(name)
        self._absent: dict[str, float] = {}  # slots seen without an attempt that may yet finish them, since when
        for slot, attempts in self._attempts().items():
            if not attempts and not self._of(slot):  # another worker may have been quicker
                self._add(slot, self.slots[slot])

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *error) -> None:
        """Close the database's connections."""
        self.storage.remove_session()
        self._engine.dispose()

    def work(
        self,
        run: Callable[[str, dict], tuple[float, dict]],
        on_change: Callable[[int], None] = lambda finished: None,
    ) -> None:
        """Run what is left until every slot is finished, those of workers that are killed meanwhile included.

        Args:
            run: of a slot's name and its parameters, the value and facts fit for JSON. It may be called again for a
                slot whose worker was killed, here or elsewhere.
            on_change: called with the number of slots that are finished.
        """
        while True:
            self.take_back()
            finished = self.finished()
            on_change(finished)
            if finished == len(self.slots):
                return
            trial = self._claim()
            if trial is None:
                time.sleep(self.poll)
                continue
            with suppress(TakenAway):
                self._run(trial, run)

    def finished(self) -> int:
        """Slots that are finished, or given up."""
        return sum(self._is_finished(attempts) for attempts in self._attempts().values())

    def results(self) -> dict[str, Result]:
        """By slot, what those have left that are finished."""
        found = {}
        for slot, attempts in self._attempts().items():
            for attempt in attempts:
                if attempt.state.name == "COMPLETE":
                    found[slot] = Result(attempt.params, attempt.value, attempt.user_attrs)
                    break
        return found

    def take_back(self) -> None:
        """Put slots back whose workers were killed."""
        with _quiet():
            self.optuna.storages.fail_stale_trials(self.study)
        # One that is killed between these two acts leaves a slot to nobody. Waited for, each worker as long as it
        # likes, so that not all put it back at once.
        now = time.monotonic()
        for slot, attempts in self._attempts().items():
            if self._is_finished(attempts) or any(not attempt.state.is_finished() for attempt in attempts):
                self._absent.pop(slot, None)
            elif now > self._absent.setdefault(slot, now + self.poll * random.uniform(2, 6)):
                self._requeue(slot, attempts[-1].params if attempts else {})

    # ------------------------------------------------------------ attempts

    def _attempts(self) -> dict[str, list]:
        """Of each slot, its attempts as they were added."""
        found: dict[str, list] = {slot: [] for slot in self.slots}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.user_attrs.get(_SLOT) in found:
                found[trial.user_attrs[_SLOT]].append(trial)
        return found

    def _of(self, slot: str) -> list:
        return self._attempts()[slot]

    @staticmethod
    def _is_finished(attempts: list) -> bool:
        failed = [attempt.user_attrs.keys() for attempt in attempts if attempt.state.name == "FAIL"]
        silent = sum(not said & {_RELEASED, _DROPPED} for said in failed)
        return silent >= ATTEMPTS or any(attempt.state.name == "COMPLETE" for attempt in attempts)

    def _add(self, slot: str, parameters: dict | None) -> None:
        parameters = parameters or {}
        self.study.add_trial(self.optuna.trial.create_trial(
            state=self.optuna.trial.TrialState.WAITING, params=parameters,
            distributions={name: self.space[name] for name in parameters}, user_attrs={_SLOT: slot},
        ))  # fmt: skip

    def _requeue(self, slot: str, parameters: dict) -> None:
        if slot in self.slots and not self._is_finished(self._of(slot)):
            self._add(slot, parameters or self.slots[slot])

    def _claim(self):
        """The oldest attempt that waits, now ours; None if there is none."""
        states = self.optuna.trial.TrialState
        for waiting in self.study.get_trials(deepcopy=False, states=(states.WAITING,)):
            slot = waiting.user_attrs.get(_SLOT)
            if slot not in self.slots:
                continue
            place = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, waiting.number)
            try:
                self.storage.record_heartbeat(place)  # first: silence is only found where there was a word
                if not self.storage.set_trial_state_values(place, states.RUNNING):
                    continue
                older = [one for one in self._of(slot) if one.number < waiting.number and one.state.name != "FAIL"]
                if older:
                    self._end(place, _DROPPED, "another attempt has its slot")
                    continue
            except self.optuna.exceptions.UpdateFinishedTrialError:
                continue
            # What is drawn at random differs between slots, and not between workers.
            text = f"{self.seed} {slot}".encode()
            drawn = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
            self.study.sampler = self.optuna.samplers.TPESampler(seed=drawn)
            return self.optuna.trial.Trial(self.study, place)
        return None

    def _run(self, trial, run: Callable[[str, dict], tuple[float, dict]]) -> None:
        place = self.storage.get_trial_id_from_study_id_trial_number(self._study_id, trial.number)
        slot = trial.user_attrs[_SLOT]
        try:
            with _beating(self.storage, place, self.beat):
                trial.set_user_attr(_WORKER, f"{socket.gethostname()}:{os.getpid()}")
                parameters = {name: self._suggest(trial, name) for name in self.space}
                value, facts = run(slot, parameters)
                for name, fact in facts.items():
                    trial.set_user_attr(name, fact)
                self.storage.set_trial_state_values(place, self.optuna.trial.TrialState.COMPLETE, [value])
        except self.optuna.exceptions.UpdateFinishedTrialError:
            raise TakenAway(slot) from None
        except BaseException as error:  # Ctrl-C included: others need not wait until we have been silent for long
            with suppress(self.optuna.exceptions.UpdateFinishedTrialError):
                self._end(place, _RELEASED, f"{type(error).__name__}: {error}"[:500])
                self._requeue(slot, self.storage.get_trial(place).params)
            raise

    def _end(self, place: int, kind: str, why: str) -> None:
        self.storage.set_trial_user_attr(place, kind, why)
        self.storage.set_trial_state_values(place, self.optuna.trial.TrialState.FAIL)

    def _suggest(self, trial, name: str):
        """A parameter's value: the attempt's own, or the sampler's choice."""
        kind, distributions = self.space[name], self.optuna.distributions
        if isinstance(kind, distributions.CategoricalDistribution):
            return trial.suggest_categorical(name, kind.choices)
        suggest = trial.suggest_int if isinstance(kind, distributions.IntDistribution) else trial.suggest_float
        return suggest(name, kind.low, kind.high, log=kind.log)

    # ------------------------------------------------------------ the storage

    def _open(self, url: str, grace: int):
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError

        require_url(url)
        lite = url.startswith("sqlite")
        require(not lite or ":memory:" not in url, "storage", url, "a file: no other worker sees one in memory")
        options = {"connect_args": {"timeout": BUSY_SECONDS}} if lite else {"pool_pre_ping": True}
        # Whoever finds that a worker was silent puts its slot back in the same breath.
        again = lambda study, trial: self._requeue(trial.user_attrs.get(_SLOT), trial.params)  # noqa: E731
        for opening in range(_OPENINGS):
            try:
                with _quiet():
                    storage = self.optuna.storages.RDBStorage(
                        url, engine_kwargs=options, heartbeat_interval=self.beat, grace_period=grace,
                        heartbeat_stale_trial_callback=again,
                    )  # fmt: skip
                break
            except ImportError as error:
                driver = getattr(error.__cause__, "name", None) or "its driver"
                raise ImportError(f"the storage {shown(url)} needs {driver}: pip install {driver}") from None
            except ArgumentError:
                require(False, "storage", shown(url), "a URL such as sqlite:///runs/study.db")
            except (SQLAlchemyError, self.optuna.exceptions.StorageInternalError, RuntimeError) as error:
                if opening == _OPENINGS - 1:
                    reason = " ".join(str(error.__cause__ or error).split("\n")[0].split())
                    raise ValueError(f"the storage {shown(url)} cannot be opened ({reason}): name another") from None
                time.sleep(random.uniform(0.05, 0.2))
        self._engine = storage.engine
        if lite:
            _one_transaction_at_a_time(self._engine)
        return self.optuna.storages.get_storage(storage)


def require_optuna():
    """Optuna, or a word on where to get it."""
    try:
        import optuna
    except ImportError:
        raise ImportError("sweeps need Optuna: pip install 'l2l_fast[sweep]'") from None
    return optuna


def require_url(url: str) -> None:
    good = isinstance(url, str) and "://" in url
    require(good, "storage", url, "a URL such as sqlite:///runs/study.db or postgresql+psycopg://host/name")


def shown(url: str) -> str:
    """A URL without its password."""
    require_optuna()  # which brings SQLAlchemy
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return repr(url.split("://")[0] + "://...")


def _one_transaction_at_a_time(engine) -> None:
    """SQLite knows no row locks: to read and then to write is one act only where the lock is taken first."""
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def _connect(connection, record) -> None:
        connection.isolation_level = None  # the driver leaves transactions to us

    @event.listens_for(engine, "begin")
    def _begin(connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections that were made before


@contextmanager
def _beating(storage, place: int, seconds: float) -> Iterator[None]:
    """Say every few seconds that an attempt is under way; a database that is away for a while may be back in time."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(seconds):
            with suppress(Exception):
                storage.record_heartbeat(place)
        storage.remove_session()  # of this thread

    thread = threading.Thread(target=beat, name="l2l_fast heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """Heartbeats are as old as Optuna 2.5 and still called an experiment."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        warnings.filterwarnings("ignore", category=require_optuna().exceptions.ExperimentalWarning)
        yield
