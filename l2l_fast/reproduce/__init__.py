"""Every comparison of the paper deck, and questions beyond it, as rows that can be run again and held against bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from os import PathLike

import torch

from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce.ahead import measure_ahead, train_recipe
from l2l_fast.reproduce.figures import Findings
from l2l_fast.reproduce.kinds import judge
from l2l_fast.reproduce.meta_lr import meta_lr
from l2l_fast.reproduce.proposal import proposal
from l2l_fast.reproduce.rows import FULL, QUICK, ROWS, Settings, find
from l2l_fast.reproduce.run import Run

__all__ = ["FULL", "QUICK", "ROWS", "Findings", "Run", "Settings", "find", "prepare", "reproduce"]


Networks = Mapping[str, torch.nn.Module | str | PathLike]


def reproduce(name: str, run: Run, networks: Networks | None = None, *, beside: Networks | None = None) -> Findings:
    """Run a row, and write its JSON, tables and pictures into a subfolder of the run's folder.

    Args:
        name: of the row, a key of ``ROWS``.
        run: where and how much.
        networks: what is judged, by the names that tables have; the row's own if None: a shipped network, or those
            that it trains. The row ``meta-lr`` judges its own alone; ``proposal`` takes one folder of several networks.
        beside: what is judged beside the networks that a row trains.

    Raises:
        ValueError: there is no such row.
        FileNotFoundError: there is no such network.

    Example:
        >>> import pathlib, tempfile, l2l_fast as l2l
        >>> from l2l_fast.reproduce import Run, Settings, reproduce
        >>> run = Run(pathlib.Path(tempfile.mkdtemp()), settings=Settings(seeds=1, long_horizon=3))
        >>> found = reproduce("horizon", run, {"mine": l2l.CoordinatewiseLSTM("moments", 4, 1)})
        >>> found.networks, len(found.entries)
        (['mine'], 4)
    """
    find(name)
    row = ROWS[name]
    if row.kind == "meta-lr":
        return meta_lr(run)
    if row.kind == "proposal":
        return proposal(run, *(networks or {}).values())
    if networks is None and row.network:
        networks = {row.network: row.network}
    prepare([name], run, {name: networks}, beside=beside)
    if networks is None:
        networks = _trained(name, run, beside or {})
    return judge(name, _loaded(networks), run)


def prepare(
    names: Iterable[str], run: Run, networks: Mapping[str, Networks | None], *, beside: Networks | None = None
) -> None:
    """Measure what several rows need in ``run.jobs`` processes, so that :func:`reproduce` finds it; one does nothing.

    Args:
        names: of the rows.
        run: where and how much.
        networks: by row, what is judged; None for rows that train their networks.
        beside: what is judged beside the networks that rows train.
    """
    rows = {name: (ROWS[name], networks[name] and _loaded(networks[name])) for name in names}
    measure_ahead(rows, run, lambda name: _loaded(_trained(name, run, beside or {})))


def _loaded(networks: Networks) -> dict[str, CoordinatewiseLSTM]:
    return {label: _network(one) for label, one in networks.items()}


def _network(network: torch.nn.Module | str | PathLike) -> CoordinatewiseLSTM:
    return network if isinstance(network, torch.nn.Module) else CoordinatewiseLSTM.from_pretrained(network)


def _trained(name: str, run: Run, beside: Networks) -> Networks:
    """The networks of a row's recipes, and those that a person wants beside them."""
    networks = {}
    with run.bars(f"{name}: meta-training") as progress:
        for recipe in ROWS[name].recipes:
            networks[recipe] = train_recipe(recipe, run, progress and partial(progress, f"recipe {recipe}"))
    return networks | {f"{label}, given" if label in networks else label: one for label, one in beside.items()}
