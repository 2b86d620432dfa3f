"""A folder that keeps what was measured, so that a run that was killed goes on and a later one is cheap."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from l2l_fast.evaluate.baselines import BASELINES, Baseline, Tuned, tune_horizons
from l2l_fast.evaluate.trajectories import Lane, Progress, trajectories
from l2l_fast.files import replacing
from l2l_fast.tasks.base import Task

FORMAT_VERSION = 1


class Store:
    """Values by everything that decides them; each is a file, which appears whole or not at all.

    Args:
        folder: where the files are; None keeps nothing.
        facts: what decides every value, by name: the task and its options, the version of torch.

    Example:
        >>> import tempfile
        >>> from l2l_fast.evaluate.store import Store
        >>> store = Store(tempfile.mkdtemp(), task="quadratic")
        >>> store.put(3.5, rate=0.1)
        >>> store.get(rate=0.1), store.get(rate=0.2), store.of(task="other").get(rate=0.1)
        (3.5, None, None)
    """

    def __init__(self, folder: str | PathLike | None, **facts) -> None:
        self.folder, self.facts = folder and Path(folder), facts

    def of(self, **facts) -> Store:
        """The same folder, for values that these facts decide as well."""
        return Store(self.folder, **self.facts | facts)

    def get(self, **facts):
        """The value that was put under the same facts; None if there is none."""
        path = self.path(**facts)
        if path is None or not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)["value"]
        except Exception:  # not a file of ours, or damaged: it is measured again
            return None

    def put(self, value, **facts) -> None:
        """Keep a tensor, or numbers and strings in lists and dictionaries."""
        path = self.path(**facts)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = io.BytesIO()
        torch.save({"facts": self._key(facts), "value": value}, contents)
        with replacing(path) as file:
            file.write(contents.getbuffer())

    def _key(self, facts) -> str:
        return json.dumps({"format_version": FORMAT_VERSION} | self.facts | facts, sort_keys=True)

    def path(self, **facts) -> Path | None:
        """Where the value under these facts is kept, now or later."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(self._key(facts).encode()).hexdigest()[:24]}.pt"


def tuning_facts(baseline: Baseline, horizons: Sequence[int], seeds: range, device: torch.device | str) -> dict | None:
    """What decides a tuning, beside the store's own facts; None for a baseline of one's own."""
    if BASELINES.get(baseline.name) is not baseline:
        return None
    return {"tuning": baseline.name, "exponents": baseline.exponents, "horizons": sorted(horizons),
            "seeds": [seeds.start, seeds.stop], "device": torch.device(device).type}  # fmt: skip


def stored_tuning(
    task: Task,
    baseline: Baseline,
    horizons: Sequence[int],
    *,
    seeds: range,
    device: torch.device | str,
    progress: Progress | None,
    store: Store,
) -> dict[int, Tuned]:
    """:func:`tune_horizons`, from the store where it is there. Baselines of one's own are tuned every time."""
    facts = tuning_facts(baseline, horizons, seeds, device)
    found = store.get(**facts) if facts else None
    if found is not None:
        return {horizon: Tuned(baseline, **entry) for horizon, entry in found.items()}
    tuned = tune_horizons(task, baseline, horizons, seeds=seeds, device=device, progress=progress)
    if facts:
        fields = [field.name for field in dataclasses.fields(Tuned) if field.name != "baseline"]
        store.put({h: {name: getattr(entry, name) for name in fields} for h, entry in tuned.items()}, **facts)
    return tuned


def lane_facts(lane: Lane, horizon: int, seeds: range, device: torch.device | str) -> dict | None:
    """What decides a lane's losses, beside the store's own facts; None for one that nobody can name."""
    shared = {"horizon": horizon, "seeds": [seeds.start, seeds.stop], "device": torch.device(device).type}
    return None if lane.identity is None else shared | dict(lane.identity)


def stored_trajectories(
    task: Task,
    lanes: Iterable[Lane],
    *,
    horizon: int,
    seeds: range,
    device: torch.device | str,
    on_step: Callable[[int], None] | None = None,
    store: Store,
) -> list[Tensor]:
    """:func:`trajectories`, a [B, horizon + 1] for each lane; lanes that the store has are not run again."""
    lanes = list(lanes)
    facts = [lane_facts(lane, horizon, seeds, device) for lane in lanes]
    losses = [None if fact is None else store.get(**fact) for fact in facts]
    missing = [k for k, found in enumerate(losses) if found is None]
    if missing:
        run = [lanes[k] for k in missing]
        new = trajectories(task, run, horizon=horizon, seeds=seeds, device=device, on_step=on_step)
        for k, found in zip(missing, new, strict=True):
            losses[k] = found
            if facts[k] is not None:
                store.put(found.clone(), **facts[k])
    return losses
