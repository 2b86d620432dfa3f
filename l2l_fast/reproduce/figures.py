"""What a row of ``l2l-fast reproduce`` found: figures by case and network, held against their bars."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike

from l2l_fast.evaluate.comparison import Comparison
from l2l_fast.files import write_text
from l2l_fast.reproduce.rows import METRICS
from l2l_fast.writing import json_text, with_error

MEDIAN = "median"


@dataclass
class Entry:
    """One case at one horizon.

    Attributes:
        label: what was run.
        figures: network -> metric -> figure; None where a loss was not reached or not finite, which is no success.
        bars: metric -> the largest figure allowed.
        rivals: the best tuned baselines, by mean and by final loss.
        errors: network -> metric -> standard error over the held-out seeds, of the ratios that have one.
        files: names of what was written about it, in the row's folder.
    """

    label: str
    figures: dict[str, dict[str, float | None]]
    bars: dict[str, float] = field(default_factory=dict)
    rivals: str = ""
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, comparison: Comparison, label: str, bars: dict[str, float]) -> Entry:
        """The ratios of a comparison's learned optimizers."""
        figures = {}
        for name in comparison.learned:
            ratios = comparison.ratios(name)
            figures[name] = {metric: ratios[metric] for metric in METRICS if metric in ratios}
        best = dict.fromkeys([comparison.best_baseline, comparison.best_baseline_final])
        rivals = " / ".join(comparison.optimizers[name].label for name in best)
        errors = {name: comparison.errors(name) for name in comparison.learned}
        return cls(label, figures, dict(bars), rivals, errors)

    @property
    def metrics(self) -> list[str]:
        """In the order of ``METRICS``."""
        return [metric for metric in METRICS if any(metric in figures for figures in self.figures.values())]

    def median(self, metric: str) -> float | None:
        """Over the networks; one that has no figure counts as the worst."""
        values = [figures.get(metric) for figures in self.figures.values()]
        middle = statistics.median([math.inf if value is None else value for value in values])
        return middle if math.isfinite(middle) else None

    def met(self, metric: str) -> bool | None:
        """Whether the median is within the bar; None without a bar."""
        if metric not in self.bars:
            return None
        value = self.median(metric)
        return value is not None and value <= self.bars[metric]


@dataclass
class Findings:
    """All entries of a row.

    Attributes:
        row: its name.
        title, question: of the row.
        dataset: "digits" or "mnist".
        networks: what was judged, by name.
        alike: True where the networks are one recipe's meta-seeds, so that their median says something.
        seeds: held-out seeds.
        entries: what was found.
        pictures: file name -> caption, in the row's folder.
        command: what was run.
        environment: device, versions, date.
    """

    row: str
    title: str
    question: str
    dataset: str
    networks: list[str]
    alike: bool
    seeds: int
    entries: list[Entry] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    command: str = ""
    environment: dict = field(default_factory=dict)

    def judged(self) -> list[bool]:
        """One for every bar: met or not."""
        return [entry.met(metric) for entry in self.entries for metric in entry.bars]

    def lines(self, entry: Entry) -> Iterator[tuple[str, list[str]]]:
        """Networks of an entry, and their median where it says something, with their figures as tables write them."""
        for name, figures in entry.figures.items():
            errors = entry.errors.get(name, {})
            yield name, [number(figures.get(metric), metric, errors.get(metric)) for metric in entry.metrics]
        if self.alike and len(entry.figures) > 1:
            yield MEDIAN, [number(entry.median(metric), metric) for metric in entry.metrics]

    # ------------------------------------------------------------ JSON

    def to_dict(self) -> dict:
        """Everything, with what follows from it."""
        content = dataclasses.asdict(self)
        for entry, written in zip(self.entries, content["entries"], strict=True):
            written["median"] = {metric: entry.median(metric) for metric in entry.metrics} if self.alike else None
            written["met"] = {metric: entry.met(metric) for metric in entry.bars}
        judged = self.judged()
        return content | {"bars_met": sum(judged), "bars": len(judged)}

    def to_json(self, path: str | PathLike) -> None:
        """Write :meth:`to_dict`."""
        write_text(path, json_text(self.to_dict()) + "\n")

    # ------------------------------------------------------------ for people

    def table(self) -> str:
        """Plain text: a line a network below each case, the bars in a line of their own."""
        lines = [f"{self.row}: {self.title}, {self.seeds} held-out seeds"]
        for entry in self.entries:
            against = f", against {entry.rivals}" if entry.rivals else ""
            rows = [("", [METRICS[metric] for metric in entry.metrics])]
            if entry.bars:
                rows.append(("bar", [bar(entry, metric) for metric in entry.metrics]))
            rows += self.lines(entry)
            verdicts = [verdict(entry.met(metric)) for metric in entry.metrics]
            rows[-1] = rows[-1][0], [" ".join(pair).strip() for pair in zip(rows[-1][1], verdicts, strict=True)]
            columns = zip(*(cells for _, cells in rows), strict=True)
            widths = [max(len(name) for name, _ in rows), *(max(map(len, column)) for column in columns)]
            lines += ["", entry.label + against]
            for name, cells in rows:
                padded = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
                lines.append("   ".join([f"  {name:<{widths[0]}}", *padded]).rstrip())
        if judged := self.judged():
            lines += ["", f"{sum(judged)} of {len(judged)} bars met"]
        return "\n".join(lines)


def number(value: float | None, metric: str, error: float | None = None) -> str:
    """A figure as tables write it, with its standard error if it has one."""
    if value is None:
        return "not reached" if metric in ("ratio_steps", "ratio_seconds") else "diverged"
    if metric.startswith("ratio_"):
        return with_error(value, error)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"  # 1,296 rather than 1.3e+03


def bar(entry: Entry, metric: str) -> str:
    """Such as "<= 0.8", or nothing."""
    return f"<= {entry.bars[metric]:g}" if metric in entry.bars else ""


def verdict(met: bool | None) -> str:
    """In a word; nothing without a bar."""
    return {None: "", True: "met", False: "missed"}[met]
