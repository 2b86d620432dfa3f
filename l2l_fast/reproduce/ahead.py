"""What rows will ask the store for, measured ahead by several processes: rows then find it there.

First what needs nothing else, tunings and trainings; then lanes, which need the tuned rates and the networks. Each
piece is what one process would have measured in one batch, so its numbers are the same to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from l2l_fast.evaluate.store import lane_facts, stored_trajectories, tuning_facts
from l2l_fast.evaluate.trajectories import Lane, lanes_together
from l2l_fast.meta.recipes import is_trained, train_once
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce.kinds import contest, long_lanes
from l2l_fast.reproduce.processes import spread
from l2l_fast.reproduce.rows import Case, Row
from l2l_fast.reproduce.run import Run, no_bars

Networks = Mapping[str, CoordinatewiseLSTM]


@dataclass(frozen=True)
class Piece:
    """Something to measure; it can be sent to a process.

    Attributes:
        run: without its bars.
        row, case: what it is for.
        networks: those that are judged, by name.
        recipe: to train.
        baseline: place among the row's of the one to tune.
        lanes: names of the lanes to run.
    """

    run: Run
    row: Row
    case: Case | None = None
    networks: Networks | None = None
    recipe: str | None = None
    baseline: int | None = None
    lanes: tuple = ()


def train_recipe(recipe: str, run: Run, on_step: Callable[[int, int], None] | None = None):
    """The folder of the network that a row's recipe makes."""
    return train_once(recipe, run.dataset, device=run.device, on_step=on_step, **_where(run))


def _is_trained(recipe: str, run: Run) -> bool:
    return is_trained(recipe, run.dataset, **_where(run))


def _where(run: Run) -> dict:
    return {"folder": run.folder / "trained", "meta_steps": run.settings.meta_steps, "seed": run.seed}


def measure_ahead(
    rows: Mapping[str, tuple[Row, Networks | None]], run: Run, networks_of: Callable[[str], Networks]
) -> None:
    """Put all into the store that these rows will look for there, by ``run.jobs`` processes; the rest is for the rows.

    Args:
        rows: by name, the row and the networks that it judges; None for those that it trains.
        run: where and how much.
        networks_of: of a row's name, the networks that it trains, once they are trained.
    """
    if run.jobs == 1:
        return
    rows = {name: pair for name, pair in rows.items() if pair[0].kind in ("compare", "long")}
    plain = dataclasses.replace(run, bars=no_bars, command=str)
    recipes = {recipe: row for row, networks in rows.values() if networks is None for recipe in row.recipes}
    first = [Piece(plain, row, recipe=recipe) for recipe, row in recipes.items() if not _is_trained(recipe, run)]
    with run.bars(f"measured ahead by {run.jobs} processes") as progress:
        _spread([*first, *_tunings(rows, plain)], run, progress and partial(progress, "trainings and tunings"))
        ready = {name: (row, networks_of(name) if networks is None else networks)
                 for name, (row, networks) in rows.items()}  # fmt: skip
        _spread(list(_lanes(ready, plain)), run, progress and partial(progress, "lanes"))


def _spread(pieces: list[Piece], run: Run, progress) -> None:
    if len(pieces) > 1:  # one alone is as well measured by its row
        for number, _ in enumerate(spread(_measure, pieces, run.jobs)):
            if progress:
                progress(number + 1, len(pieces))


def _measure(piece: Piece) -> None:
    if piece.recipe is not None:
        train_recipe(piece.recipe, piece.run)
    elif piece.baseline is not None:
        found = contest(piece.case, piece.row, _NOBODY, piece.run)
        found.tuned(found.baselines[piece.baseline])
    else:
        lanes, shared = _running(piece.case, piece.row, piece.networks, piece.run)
        stored_trajectories(lanes=[lanes[name] for name in piece.lanes], **shared)


_NOBODY: Mapping = {"nobody": torch.optim.SGD}  # a tuning asks for no network, a comparison must have one


def _tunings(rows, run: Run) -> Iterable[Piece]:
    """Of each case, the baselines that are not tuned yet; of two that are the same, one."""
    seen = set()
    for row, _ in rows.values():
        for case in row.cases if row.kind == "compare" else ():
            found = contest(case, row, _NOBODY, run)
            for number, baseline in enumerate(found.baselines):
                facts = tuning_facts(baseline, found.horizons, found.tuning, found.device)
                path = facts and found.store.path(**facts)
                if path and path not in seen and not path.exists():
                    seen.add(path)
                    yield Piece(run, row, case, baseline=number)


def _lanes(rows, run: Run) -> Iterable[Piece]:
    """Of each case, the lanes that are not run yet, as many in a piece as one batch has."""
    seen = set()
    for row, networks in rows.values():
        for case in row.cases:
            lanes, shared = _running(case, row, networks, run)
            missing = []
            for name, lane in lanes.items():
                facts = lane_facts(lane, shared["horizon"], shared["seeds"], shared["device"])
                path = facts and shared["store"].path(**facts)
                if path and path not in seen and not path.exists():
                    seen.add(path)
                    missing.append(name)
            if missing:
                together = lanes_together(shared["task"], shared["seeds"], shared["device"])
                for place in range(0, len(missing), together):
                    yield Piece(run, row, case, networks, lanes=tuple(missing[place : place + together]))


def _running(case: Case, row: Row, networks: Networks, run: Run) -> tuple[dict[object, Lane], dict]:
    """All lanes of a case, by name, and how they are run."""
    if row.kind == "long":
        return long_lanes(case, networks, run)
    found = contest(case, row, networks, run)
    shared = {"task": found.task, "horizon": found.horizons[-1], "seeds": found.test}
    return found.lanes(), shared | {"device": found.device, "store": found.store}
