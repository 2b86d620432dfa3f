"""Pictures of losses over steps. matplotlib is imported where it is used, and its global state is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from l2l_fast.files import replacing

# Okabe and Ito's colours, told apart with any colour vision; black and vermilion are kept for what is emphasised.
_EMPHASISED = ["#D55E00", "#000000", "#8B0000", "#444444"]
_PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F", "#B8A200"]
_DASHES = ["-", "-", "-", "-", (0, (4, 3)), (0, (1, 2)), (0, (6, 2, 1, 2))]
BAND = "mean ± standard error\nover seeds"  # what every band shows


def plot_curves(
    curves: Mapping[str, np.ndarray | torch.Tensor],
    path: str | PathLike,
    title: str,
    *,
    emphasised: Sequence[str] = (),
    xlabel: str = "step (parameter updates)",
    ylabel: str = "loss",
    log: bool = True,
) -> None:
    """Picture of any family of curves: the mean over seeds, with its standard error as a band.

    Args:
        curves: label -> values [seeds, steps], the first column at step 0; [steps] is one seed.
        path: the file; its ending says the format.
        title: above the picture.
        emphasised: labels to draw boldly.
        xlabel, ylabel: what the axes show, with units.
        log: logarithmic vertical axis.

    Raises:
        ImportError: without matplotlib.
        ValueError: no curves.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from l2l_fast.evaluate import plot_curves
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "sweep.png"
        >>> plot_curves({"0.01": torch.rand(3, 20), "0.1": torch.rand(3, 20)}, path, "meta-learning rates")
        >>> path.stat().st_size > 1000
        True
    """
    lines = {}
    for label, values in curves.items():
        values = np.atleast_2d(_array(values))
        with np.errstate(all="ignore"):  # a diverged curve has no spread
            error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(values.shape[1])
            lines[label] = (values.mean(0), error)
    several = any(_array(values).ndim > 1 and len(values) > 1 for values in curves.values())
    band = BAND if several else None
    draw(lines, path, title, emphasised, xlabel=xlabel, ylabel=ylabel, log=log, band=band)


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu().double() if isinstance(values, torch.Tensor) else values, dtype=float)


def draw(
    lines, path, title, emphasised, *, band, xlabel="step (parameter updates)", ylabel="loss", log=True, x=None,
    ticks=None,
) -> None:  # fmt: skip
    """Draw lines {label: (mean [T], half width of the band [T])} to a file, against steps or a positive ``x`` [T]."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install l2l_fast[plot]") from error
    if not lines:
        raise ValueError("curves must hold at least one curve, got none")
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Points are compared with one another; a curve, with where it began.
    limits = _limits([np.sort(mean)[::-1] if x is not None else mean for mean, _ in lines.values()], log)
    bold, plain = 0, 0
    for label, (mean, error) in lines.items():
        strong = label in emphasised
        if strong:
            # Beyond four, the colours come again, broken.
            again, color = divmod(bold, len(_EMPHASISED))
            style = {
                "color": _EMPHASISED[color],
                "linewidth": 2.6,
                "zorder": 4,
                "linestyle": ("-", "--", ":")[again % 3],
            }
            bold += 1
        else:
            # Later lines are broken, so that of two lines that coincide (Adam, AdamW) both are seen.
            color, dash = _PALETTE[plain % len(_PALETTE)], _DASHES[plain % len(_DASHES)]
            style = {"color": color, "linewidth": 1.6, "zorder": 3, "linestyle": dash}
            plain += 1
        if not np.isfinite(mean).all():
            label += ", diverged"
        elif limits and mean[-1] > limits[1]:
            label += ", off the scale"
        mean = np.where(np.isfinite(mean), mean, np.nan)
        error = np.where(np.isfinite(error), error, 0)
        low = mean - error
        if log:  # a mean may be smaller than its error, and 0 is not on the axis
            mean = np.where(mean > 0, mean, np.nan)
            low = np.maximum(low, 0.2 * mean)
        steps = np.arange(len(mean)) if x is None else x
        axes.plot(steps, mean, label=label, marker=None if x is None else "o", markersize=4, **style)
        axes.fill_between(steps, low, mean + error, color=style["color"], alpha=0.14, linewidth=0, zorder=2)
    if log:
        axes.set_yscale("log")
        decades = np.log10(limits[1] / limits[0]) if limits else 0
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.2 rather than 2 x 10^-1
        axes.yaxis.set_minor_formatter(NullFormatter())
    if limits:
        axes.set_ylim(*limits)
    if x is None:
        axes.set_xlim(0, max(1, max(len(mean) for mean, _ in lines.values()) - 1))
    else:
        axes.set_xscale("log")
        axes.set_xticks(x, ticks or [f"{value:g}" for value in x])
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(xlabel)
    axes.set_ylabel(f"{ylabel} (logarithmic scale)" if log else ylabel)
    axes.set_title(title)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes: nowhere inside is free of curves for sure.
    figure.legend(title=band, frameon=False, fontsize=9, title_fontsize=8, loc="outside right upper")
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")  # as matplotlib does
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _limits(means: list[np.ndarray], log: bool) -> tuple[float, float] | None:
    """Vertical limits that show every curve but do not follow a diverging one."""
    starts = [mean[0] for mean in means if len(mean) and np.isfinite(mean[0])]
    values = np.concatenate([mean[np.isfinite(mean)] for mean in means])
    values = values[values > 0] if log else values
    if not values.size or not starts:
        return None
    top = max(starts)
    if log:
        top = min(values.max(), 3 * top) if top > 0 else values.max()
        low = values.min()
        margin = (top / low) ** 0.05 if top > low else 1.5
        return low / margin, top * margin
    top, low = min(values.max(), top + 0.5 * abs(top)), values.min()
    margin = 0.05 * (top - low) or 0.5
    return low - margin, top + margin
