"""What all rows of one run of ``reproduce`` share, and the record that each of them leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from l2l_fast.environment import environment
from l2l_fast.evaluate.store import Store
from l2l_fast.evaluate.trajectories import Progress
from l2l_fast.files import write_text
from l2l_fast.reproduce.figures import Findings
from l2l_fast.reproduce.rows import FULL, ROWS, Case, Settings
from l2l_fast.tasks import Task
from l2l_fast.tasks import get as get_task


def no_bars(what: str) -> AbstractContextManager[Progress | None]:
    """Shows nothing."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Run:
    """What all rows of one command share.

    Attributes:
        folder: each row writes into its own subfolder; ``store`` beside them keeps what was measured.
        dataset: "digits" or "mnist".
        settings: how much is run.
        seed: of everything random.
        device: where to run.
        command: of a row's name, what a person types to run it again.
        bars: ``with bars(what) as progress`` shows the progress of one case.
        jobs: processes, one thread each, that tunings, trainings and lanes are spread over; 1 is this one.
    """

    folder: Path
    dataset: str = "digits"
    settings: Settings = FULL
    seed: int = 0
    device: str = "cpu"
    command: Callable[[str], str] = "l2l-fast reproduce {}".format
    bars: Callable[[str], AbstractContextManager[Progress | None]] = no_bars
    jobs: int = 1

    def task(self, case: Case) -> Task:
        """The case's task, on the half that optimizers learn on."""
        return get_task(case.task.format(dataset=self.dataset), **case.options)

    def store(self, case: Case) -> Store:
        """Where figures of the case's task are kept."""
        facts = {"task": case.task.format(dataset=self.dataset), "options": dict(case.options)}
        versions = {name: environment(self.device)[name] for name in ("l2l_fast", "torch")}
        return Store(self.folder / "store", **facts, **versions)

    def findings(self, name: str, networks: list[str]) -> Findings:
        """An empty record of a row."""
        row = ROWS[name]
        return Findings(
            name, row.title, row.question, self.dataset, networks, row.network is not None, self.settings.seeds,
            command=self.command(name), environment=environment(self.device),
        )  # fmt: skip


def write(findings: Findings, folder: Path) -> None:
    """The record of a row: ``row.json`` and ``table.txt``."""
    findings.to_json(folder / "row.json")
    write_text(folder / "table.txt", findings.table() + "\n")
