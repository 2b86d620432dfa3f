"""What a comparison found: numbers, the ratios that follow from them, JSON and a table."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from l2l_fast.evaluate.plots import BAND, draw
from l2l_fast.evaluate.trajectories import smoothed
from l2l_fast.files import write_text
from l2l_fast.writing import json_text, with_error


@dataclass
class Result:
    """One optimizer's numbers. A loss that is not finite is inf, and None in JSON.

    Attributes:
        label: how tables and legends write it.
        lr: learning rate of the run that ``mean_loss`` and ``curve`` are of (tuned for the mean, if it was tuned);
            nan for an optimizer whose param groups have several, or none.
        mean_loss: mean over seeds and over steps 1 .. horizon.
        mean_loss_std: standard deviation over seeds of the seed's own mean loss.
        lr_final: learning rate of the run that ``final_loss`` and ``curve_final`` are of (tuned for the final loss).
        final_loss: smoothed loss at the horizon, see :func:`~l2l_fast.evaluate.trajectories.smoothed`.
        seconds_per_step: median of a whole training step, gradient and update, of one instance.
        curve: mean over seeds of the loss after 0 .. horizon updates.
        curve_std: its standard deviation over seeds.
        curve_final: the same mean for the run tuned for the final loss.
        on_edge: True where tuning ended at the edge of the widest grid.
        tied: True where the second best rate was within a standard error of the best, by either measure.
        seed_means: mean loss of each held-out seed.
        seed_finals: final loss of each, of the run tuned for it.
    """

    label: str
    lr: float
    mean_loss: float
    mean_loss_std: float
    lr_final: float
    final_loss: float
    seconds_per_step: float
    curve: list[float]
    curve_std: list[float]
    curve_final: list[float]
    on_edge: bool = False
    tied: bool = False
    seed_means: list[float] = field(default_factory=list)
    seed_finals: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return not (math.isfinite(self.mean_loss) and math.isfinite(self.final_loss))


@dataclass
class Comparison:
    """Learned optimizers beside tuned baselines on one task.

    With L the learned optimizer and b over the baselines, each at its own tuned rates:

    ratio_mean = mean_L / min_b mean_b,   ratio_final = final_L / min_b final_b

    ratio_steps = (steps L needs to reach min_b final_b) / (steps that best baseline itself needs)

    ratio_seconds = ratio_steps * seconds_per_step_L / seconds_per_step_b

    Below 1 the learned optimizer is better. A ratio is None where it has no meaning: a loss was not finite, or was
    never reached within the horizon. The ``ratio_...`` attributes are the first learned optimizer's; :meth:`ratios`
    has any.

    Attributes:
        task: the task's name.
        horizon: number of updates.
        seeds: number of held-out instances.
        learned: names of the learned optimizers, first the one that ``network`` and the ratios speak of.
        optimizers: results by name, learned and baselines.
        environment: torch, CPU, threads, device, date, version.

    Example:
        >>> import torch, l2l_fast as l2l
        >>> from l2l_fast.evaluate import compare
        >>> mine = {"mine": lambda params: torch.optim.Adam(params, lr=0.1)}
        >>> found = compare(l2l.tasks.Quadratic(), mine, horizon=20, seeds=3, baselines=["sgd"])
        >>> found.best_baseline, found.ratio_mean > 0
        ('sgd', True)
    """

    task: str
    horizon: int
    seeds: int
    learned: list[str]
    optimizers: dict[str, Result]
    environment: dict = field(default_factory=dict)

    # ------------------------------------------------------------ what follows from the numbers

    @property
    def network(self) -> str:
        return self.learned[0]

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.optimizers if name not in self.learned]

    @property
    def best_baseline(self) -> str:
        """The baseline of the lowest mean loss."""
        return min(self.baselines, key=lambda name: self.optimizers[name].mean_loss)

    @property
    def best_baseline_final(self) -> str:
        """The baseline of the lowest final loss."""
        return min(self.baselines, key=lambda name: self.optimizers[name].final_loss)

    def ratios(self, name: str) -> dict[str, float | None]:
        """The four ratios of a learned optimizer, None where there is none."""
        mine, best = self.optimizers[name], self.optimizers[self.best_baseline_final]
        target = smoothed(_numbers(best.curve_final), self.horizon)[-1].item()
        steps = _divide(self._steps_to(mine.curve, target), self._steps_to(best.curve_final, target))
        seconds = _divide(mine.seconds_per_step, best.seconds_per_step)
        return {
            "ratio_mean": _divide(mine.mean_loss, self.optimizers[self.best_baseline].mean_loss),
            "ratio_final": _divide(mine.final_loss, best.final_loss),
            "ratio_steps": steps,
            "ratio_seconds": None if steps is None or seconds is None else steps * seconds,
        }

    def errors(self, name: str) -> dict[str, float | None]:
        """Standard errors over the held-out seeds of ``ratio_mean`` and ``ratio_final``, None where there is none.

        By the jackknife, which keeps the seeds paired: se^2 = (n - 1) / n sum_i (r_i - mean r)^2, r_i without seed i.
        """
        mine, best = self.optimizers[name], self.optimizers[self.best_baseline]
        best_final = self.optimizers[self.best_baseline_final]
        return {
            "ratio_mean": _jackknife(mine.seed_means, best.seed_means),
            "ratio_final": _jackknife(mine.seed_finals, best_final.seed_finals),
        }

    ratio_mean = property(lambda self: self.ratios(self.network)["ratio_mean"])
    ratio_final = property(lambda self: self.ratios(self.network)["ratio_final"])
    ratio_steps = property(lambda self: self.ratios(self.network)["ratio_steps"])
    ratio_seconds = property(lambda self: self.ratios(self.network)["ratio_seconds"])

    def _steps_to(self, curve: list[float], target: float) -> int | None:
        """Updates after which the smoothed curve is first at or below ``target``; None if it never is."""
        reached = smoothed(_numbers(curve), self.horizon)[1:] <= target
        return int(reached.nonzero()[0]) + 1 if reached.any() else None

    # ------------------------------------------------------------ JSON

    def to_json(self, path: str | PathLike) -> None:
        """Write every number and the ratios; numbers that are not finite become null."""
        results = {}
        for name, result in self.optimizers.items():
            results[name] = dataclasses.asdict(result)
            if name in self.learned:
                results[name] |= self.ratios(name) | {"errors": self.errors(name)}
        content = {
            "task": self.task,
            "horizon": self.horizon,
            "seeds": self.seeds,
            "network": self.network,
            "learned": self.learned,
            "optimizers": results,
            "best_baseline": self.best_baseline,
            "best_baseline_final": self.best_baseline_final,
            **self.ratios(self.network),
            "environment": self.environment,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json_text(content) + "\n")

    @classmethod
    def from_json(cls, path: str | PathLike) -> Comparison:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the file is something else.
        """
        fields = {entry.name for entry in dataclasses.fields(Result)}
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            optimizers = {
                name: Result(**{key: _infinite(value) for key, value in result.items() if key in fields})
                for name, result in content["optimizers"].items()
            }
            kept = {key: content[key] for key in ("task", "horizon", "seeds", "learned", "environment")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what Comparison.to_json writes: {error!r}; compare again") from None
        return cls(optimizers=optimizers, **kept)

    # ------------------------------------------------------------ for people

    def plot(self, path: str | PathLike) -> None:
        """Write the picture that :func:`~l2l_fast.evaluate.pictures.plot_comparison` describes."""
        lines = {}
        for name, result in self.optimizers.items():
            tuned = "" if name in self.learned else f" (lr {result.lr:.2g})"
            curve = np.array(result.curve, dtype=float)
            error = np.array(result.curve_std, dtype=float) / max(1, self.seeds) ** 0.5
            lines[f"{result.label}{tuned}"] = (curve, error)
        emphasised = [self.optimizers[name].label for name in self.learned]
        seeds = f"{self.seeds} held-out seed{'s' if self.seeds > 1 else ''}"
        title = f"{self.task}: {self.horizon} steps, {seeds}, baselines tuned"
        draw(lines, path, title, emphasised, band=BAND)

    def table(self) -> str:
        """Plain text of at most 80 columns: a line an optimizer, the ratios below."""
        rows = [("optimizer", "lr", "mean loss", "± std", "lr (final)", "final loss", "ms/step")]
        for name, result in self.optimizers.items():
            mark = "*" * result.on_edge + "~" * result.tied
            mean, final = _loss(result.mean_loss), _loss(result.final_loss)
            spread = f"{result.mean_loss_std:.2g}" if math.isfinite(result.mean_loss) else ""
            lrs = [f"{lr:.3g}{mark}" if math.isfinite(lr) else "-" for lr in (result.lr, result.lr_final)]
            label = result.label if len(result.label) <= 17 else result.label[:16] + "…"
            seconds = f"{1000 * result.seconds_per_step:.3g}"
            rows.append((label, lrs[0], mean, spread, lrs[1], final, seconds))
            if name == self.learned[-1]:
                rows.append(None)
        lines = [f"{self.task}: loss over {self.horizon} steps, {self.seeds} held-out seeds", ""]
        lines += [_row(row) if row else "" for row in rows]
        lines.append("")
        for name in self.learned:
            lines += textwrap.wrap(self._verdict(name), 80, subsequent_indent="  ")
        if any(result.on_edge for result in self.optimizers.values()):
            lines.append("* best at the edge of the widest grid tried: not fully tuned")
        if any(result.tied for result in self.optimizers.values()):
            lines.append("~ the second best rate is within a standard error: other seeds may choose it")
        if any(self.optimizers[name].diverged for name in self.baselines):
            lines.append("diverged: on a held-out seed, at the rate that was best on the tuning seeds")
        return "\n".join(line[:80].rstrip() for line in lines)

    def _verdict(self, name: str) -> str:
        label = self.optimizers[name].label
        if self.optimizers[name].diverged:
            return f"{label} diverged."
        ratios, errors = self.ratios(name), self.errors(name)
        best = self.optimizers[self.best_baseline].label
        best_final = self.optimizers[self.best_baseline_final].label
        parts = []
        if ratios["ratio_mean"] is not None:
            parts.append(f"mean loss {with_error(ratios['ratio_mean'], errors['ratio_mean'])} of {best}'s")
        if ratios["ratio_final"] is not None:
            parts.append(f"final loss {with_error(ratios['ratio_final'], errors['ratio_final'])} of {best_final}'s")
        if ratios["ratio_steps"] is not None:
            reached = f"{best_final}'s last loss in {ratios['ratio_steps']:.2f} of its steps"
            if ratios["ratio_seconds"] is not None:
                reached += f" and {ratios['ratio_seconds']:.2f} of its seconds"
            parts.append(reached)
        else:
            parts.append(f"{best_final}'s last loss not reached")
        return f"{label} against the best tuned baselines: {'; '.join(parts)}."


def _divide(a: float | None, b: float | None) -> float | None:
    if a is None or b is None or not math.isfinite(a) or not math.isfinite(b) or b == 0:
        return None
    return a / b


def _numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _jackknife(mine: list[float], best: list[float]) -> float | None:
    """Standard error of mean(mine) / mean(best), paired."""
    a, b = _numbers(mine), _numbers(best)
    if len(a) < 2 or len(a) != len(b) or not (a.isfinite().all() and b.isfinite().all()):
        return None
    ratios = (a.sum() - a) / (b.sum() - b)
    return math.sqrt((len(a) - 1) * ratios.var(correction=0).item())


def _infinite(value):
    if isinstance(value, list):
        return [_infinite(item) for item in value]
    return math.inf if value is None else value


def _loss(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "diverged"


def _row(cells: tuple[str, ...]) -> str:
    name, *numbers = cells
    widths = (10, 11, 9, 11, 12, 9)
    return f"{name:<18}" + "".join(f"{number:>{width}}" for number, width in zip(numbers, widths, strict=True))
