"""Bias and variance of the estimators of the meta-gradient against the horizon, at equal time, on one task.

    python bench/estimators.py [--out docs]

Writes results/estimators.json and images/estimators.png below ``--out``. The rule is Adam's direction with a small LSTM
beside it, on a noisy valley whose far end it reaches after some 2,000 steps: what the weights do early matters to the
end. Exact gradients are central differences in every weight along whole trajectories, in float64. The gradient is that
of the sum of all losses up to the horizon; windows have 20 steps. Every instance, with noise and perturbations of its
own, gives one estimate; the mean of as many as 10 seconds give, one thread, has the error that is drawn: its bias, and
its standard deviation, each relative to the norm of the exact gradient. What a bias may be off by is one standard error
of the mean over the instances.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.environment import environment
from l2l_fast.meta.estimators import EvolutionStrategies, TruncatedBackpropagation
from l2l_fast.meta.unroll import Rule, Trajectory
from l2l_fast.tasks import Instances

HORIZONS = (100, 200, 500, 1000, 2000, 5000)
UNROLL, INSTANCES, EXACT, PERTURBATIONS, SIGMA, SECONDS = 20, 256, 8, 16, 0.01, 10.0


class Valley:
    """f(x; z) = sum_i k_i (x_i^2 / 2 + 0.1 z_i x_i), z ~ N(0, 1) in every step, from x = 1; k from 1 to 0.01."""

    name, resample = "valley", True

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"x": torch.ones(10)}

    def sample(self, generator: torch.Generator) -> Tensor:
        return 0.1 * torch.randn(10, generator=generator, dtype=torch.float64)

    def loss(self, params: dict[str, Tensor], batch: Tensor) -> Tensor:
        x, curvatures = params["x"].double(), torch.logspace(0, -2, 10, dtype=torch.float64)
        return (curvatures * (x.square() / 2 + batch * x)).sum()


@dataclass(frozen=True)
class Each(EvolutionStrategies):
    """Keeps every instance's gradient of the last window, [B, W]."""

    kept: list | None = None

    def gradient(self, differences: Tensor, directions: Tensor) -> Tensor:
        self.kept[:] = [super().gradient(differences, directions)]
        return self.kept[0]


@dataclass(frozen=True)
class CentralDifferences(Each):
    """The exact gradient: every weight moved by itself, for the whole trajectory."""

    def next(self, trajectory: Trajectory, length: int):
        trajectory.noise.copy_(torch.eye(trajectory.noise.shape[-1]).unsqueeze(1))
        trajectory.accumulated.zero_()
        return trajectory.next(length)

    def gradient(self, differences: Tensor, directions: Tensor) -> Tensor:
        self.kept[:] = [differences.T / (2 * self.sigma)]
        return self.kept[0]


def rule() -> Rule:
    torch.manual_seed(0)
    network = CoordinatewiseLSTM("moments", 2, 1, linear_path=True).double()
    torch.nn.init.uniform_(network.head.weight, -0.5, 0.5)
    return Rule.of(network, lr=0.005)


def along(estimator, seeds, kept: list | None = None) -> Tensor:
    """The sums of windows' gradients up to each horizon, [horizons, B, W]."""
    trajectory = Trajectory(Instances(Valley(), seeds), estimator.rule.config, torch.float64, copies=estimator.copies)
    total, found = 0, []
    while trajectory.steps_done < HORIZONS[-1]:
        estimate = estimator.prepare(trajectory, UNROLL)().gradient
        total = total + (estimate[None] if kept is None else kept[0])
        if trajectory.steps_done in HORIZONS:
            found.append(total)
    return torch.stack(found)


def seconds(estimator, windows: int = 40) -> float:
    """Of one window of one instance."""
    trajectory = Trajectory(Instances(Valley(), [0]), estimator.rule.config, torch.float64, copies=estimator.copies)
    times = []
    for _ in range(windows):
        begun = time.process_time()
        estimator.prepare(trajectory, UNROLL)()
        times.append(time.process_time() - begun)
    return sorted(times)[windows // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    one, kept, samples, cost = rule(), [], {}, {}
    size = len(one.weights)
    central = CentralDifferences(one, perturbations=2 * size, sigma=1e-5, persistent=True, kept=kept)
    exact = along(central, range(EXACT), kept)
    print("exact gradients: norms", [f"{norm:.3g}" for norm in exact.mean(1).norm(dim=1).tolist()], flush=True)
    backpropagation = TruncatedBackpropagation(one)
    samples["backpropagation"] = torch.cat([along(backpropagation, [seed]) for seed in range(EXACT)], 1)
    cost["backpropagation"] = seconds(backpropagation)
    for name, persistent in (("ES", False), ("PES", True)):
        estimator = Each(one, perturbations=PERTURBATIONS, sigma=SIGMA, persistent=persistent, kept=kept)
        samples[name] = along(estimator, range(INSTANCES), kept)
        cost[name] = seconds(EvolutionStrategies(one, perturbations=PERTURBATIONS, persistent=persistent))
        print(name, "is done", flush=True)
    for name, weigh in (("PES + backpropagation, half each", False), ("PES + backpropagation, by variance", True)):
        first, second = samples["PES"], samples["backpropagation"]
        share = second.var(1) / (first.var(1) + second.var(1)) if weigh else torch.full_like(first[:, 0], 0.5)
        samples[name] = share[:, None] * first + (1 - share)[:, None] * second.mean(
            1, keepdim=True
        )  # which has no variance to speak of
        cost[name] = cost["PES"]  # the unperturbed network goes along with PES anyway; the backward run adds
        cost[name] += cost["backpropagation"] / 2

    truth, rows = exact.mean(1), []
    for name, found in samples.items():
        for number, horizon in enumerate(HORIZONS):
            norm, count = truth[number].norm(), found.shape[1]
            estimates = SECONDS / (cost[name] * horizon / UNROLL)
            # The square of a mean's norm is too large by its variance.
            variance = found[number].var(0).sum()
            error = variance / count
            bias = ((found[number].mean(0) - truth[number]).square().sum() - error).clamp_min(0).sqrt() / norm
            deviation = (variance / estimates).sqrt() / norm
            rows.append({
                "estimator": name, "horizon": horizon, "bias": bias.item(), "bias_error": (error.sqrt() / norm).item(),
                "deviation": deviation.item(), "estimates": estimates, "instances": count,
                "error": math.hypot(bias, deviation),
            })  # fmt: skip
    result = {"seconds": SECONDS, "unroll": UNROLL, "perturbations": PERTURBATIONS, "sigma": SIGMA,
              "milliseconds_a_window": {name: 1e3 * value for name, value in cost.items()}, "rows": rows,
              "environment": environment("cpu")}  # fmt: skip
    (out / "results").mkdir(parents=True, exist_ok=True)
    (out / "images").mkdir(exist_ok=True)
    (out / "results" / "estimators.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, out / "images" / "estimators.png")
    for row in rows:
        print(f"{row['estimator']:<36}{row['horizon']:>6}  bias {row['bias']:.3f} +- {row['bias_error']:.3f}  "
              f"deviation {row['deviation']:.3f}  error {row['error']:.3f}")  # fmt: skip


def draw(rows: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), sharex=True, layout="constrained")
    titles = {"bias": "bias", "deviation": f"standard deviation, {SECONDS:g} s", "error": f"both, {SECONDS:g} s"}
    dashes = ["-", "--", "-", "-", ":"]  # some lie on each other
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, dash in zip(dict.fromkeys(row["estimator"] for row in rows), dashes, strict=True):
            own = [row for row in rows if row["estimator"] == name]
            bars = [row["bias_error"] for row in own] if key == "bias" else None
            horizons, values = [row["horizon"] for row in own], [row[key] for row in own]
            axis.errorbar(horizons, values, bars, fmt="o", linestyle=dash, label=name, ms=4, capsize=3)
        axis.set(title=title, xlabel="horizon (steps)", xscale="log", ylim=(0, 1.2))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative to the exact gradient's norm")
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
