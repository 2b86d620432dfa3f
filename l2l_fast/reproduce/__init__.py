"""Every comparison of the paper deck, and questions beyond it, as rows that can be run again and held against bars."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike

import torch

from l2l_fast.meta.recipes import train_once
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.reproduce.figures import Findings
from l2l_fast.reproduce.kinds import judge
from l2l_fast.reproduce.meta_lr import meta_lr
from l2l_fast.reproduce.proposal import proposal
from l2l_fast.reproduce.rows import FULL, QUICK, ROWS, Settings, find
from l2l_fast.reproduce.run import Run

__all__ = ["FULL", "QUICK", "ROWS", "Findings", "Run", "Settings", "find", "reproduce"]


Networks = Mapping[str, torch.nn.Module | str | PathLike]


def reproduce(name: str, run: Run, networks: Networks | None = None, *, beside: Networks | None = None) -> Findings:
    """Run a row, and write its JSON, tables and pictures into a subfolder of the run's folder.

    Args:
        name: of the row, a key of ``ROWS``.
        run: where and how much.
        networks: what is judged, by the names that tables have; the row's own if None: a shipped network, or those
            that it trains. The rows ``meta-lr`` and ``proposal`` judge their own alone.
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
        return proposal(run)
    if networks is None:
        networks = {row.network: row.network} if row.network else _trained(name, run, beside or {})
    return judge(name, {label: _network(one) for label, one in networks.items()}, run)


def _network(network: torch.nn.Module | str | PathLike) -> CoordinatewiseLSTM:
    return network if isinstance(network, torch.nn.Module) else CoordinatewiseLSTM.from_pretrained(network)


def _trained(name: str, run: Run, beside: Networks) -> Networks:
    """The networks of a row's recipes, and those that a person wants beside them."""
    networks = {}
    with run.bars(f"{name}: meta-training") as progress:
        for recipe in ROWS[name].recipes:
            folder = train_once(
                recipe, run.dataset, run.folder / "trained", meta_steps=run.settings.meta_steps, seed=run.seed,
                device=run.device, on_step=progress and partial(progress, f"recipe {recipe}"),
            )  # fmt: skip
            networks[recipe] = folder
    return networks | {f"{label}, given" if label in networks else label: one for label, one in beside.items()}
