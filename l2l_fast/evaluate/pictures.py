"""Pictures of comparisons: one, a row of them by start scale, and what they are worth against their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np

from l2l_fast.evaluate.comparison import Comparison, Result
from l2l_fast.evaluate.plots import BAND, draw


def plot_comparison(comparison: Comparison, path: str | PathLike) -> None:
    """Picture of a comparison: loss against step, each optimizer at the rate of its lowest mean loss.

    line: mean over seeds;   band: the mean plus and minus its standard error over seeds, std / sqrt(seeds)

    Args:
        comparison: what to draw; its learned optimizers are emphasised.
        path: the file; its ending says the format.

    Raises:
        ImportError: without matplotlib.

    Example:
        >>> import pathlib, tempfile, torch, l2l_fast as l2l
        >>> from l2l_fast.evaluate import compare, plot_comparison
        >>> mine = {"mine": lambda params: torch.optim.Adam(params, lr=0.1)}
        >>> found = compare(l2l.tasks.Quadratic(), mine, horizon=20, seeds=3, baselines=["sgd"])
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "comparison.png"
        >>> plot_comparison(found, path)
        >>> path.stat().st_size > 1000
        True
    """
    comparison.plot(path)


def plot_start_scales(comparisons: Mapping[float, Comparison], path: str | PathLike, title: str) -> None:
    """Picture of the mean loss over the horizon against the scale that trajectories start from.

    line: mean over seeds;   band: the mean plus and minus its standard error over seeds, std / sqrt(seeds)

    Args:
        comparisons: by start scale, all of the same optimizers.
        path: the file; its ending says the format.
        title: above the picture.

    Raises:
        ImportError: without matplotlib.
    """
    scales = sorted(comparisons)
    first, lines = comparisons[scales[0]], {}
    for name, result in first.optimizers.items():
        lines[result.label] = _mean_losses([comparisons[scale].optimizers[name] for scale in scales], first.seeds)
    labels = {"xlabel": "standard deviation of the weights at the start (logarithmic scale)"}
    labels["ylabel"] = f"mean loss over {first.horizon} steps"
    emphasised = [first.optimizers[name].label for name in first.learned]
    draw(lines, path, title, emphasised, band=BAND, x=np.array(scales), **labels)


def plot_front(costs: Mapping[str, float], comparisons: Sequence[Comparison], path: str | PathLike, title: str) -> None:
    """Picture of quality against cost: a point a network, a line a comparison.

    line: mean loss over that of the best baseline;   band: plus and minus its standard error over seeds

    Args:
        costs: nanoseconds a coordinate and step, by network.
        comparisons: all of these networks.
        path: the file; its ending says the format.
        title: above the picture.

    Raises:
        ImportError: without matplotlib.
    """
    names = sorted(costs, key=costs.get)
    lines = {}
    for found in comparisons:
        best = found.optimizers[found.best_baseline].mean_loss
        values, error = _mean_losses([found.optimizers[name] for name in names], found.seeds)
        lines[f"{found.task}, {found.horizon} steps"] = (values / best, error / best)
    # On two levels by turns: networks that cost alike stand close together.
    ticks = ["\n\n" * (i % 2) + f"{name}\n{costs[name]:.3g}" for i, name in enumerate(names)]
    labels = {"xlabel": "network, and nanoseconds a coordinate and step (logarithmic scale)"}
    labels["ylabel"] = "mean loss over the best baseline's"
    labels["band"] = BAND
    draw(lines, path, title, [], x=np.array([costs[name] for name in names]), ticks=ticks, log=False, **labels)


def _mean_losses(results: Sequence[Result], seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses over the horizon, and their standard errors over seeds."""
    error = np.array([result.mean_loss_std for result in results]) / max(1, seeds) ** 0.5
    return np.array([result.mean_loss for result in results]), error
