"""How the loss of a rule changes around its weights: along meta-gradients, and with other shares of the learned part.

    python bench/landscape.py l2l-base --recipe bench/general.json --horizon 800 --rate 0.012

Mean over tasks and seeds of the logarithm of the loss, over all steps / the last twentieth, against the network's own,
in percent. All candidates see the same starts and minibatches. Directions have length 1 and are the mean over tasks of
what an estimator gives: truncated backpropagation without and with second derivatives, of the first window and of the
last one of a trajectory with warm-up and a cosine. Half an hour on one core; a minute with --quick.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import l2l_fast as l2l
from l2l_fast import normalize
from l2l_fast.meta.estimators import SecondDerivatives, TruncatedBackpropagation
from l2l_fast.meta.recipes import task_of
from l2l_fast.meta.unroll import Rule, Trajectory, advance_
from l2l_fast.schedule import warm_cosine
from l2l_fast.tasks import Instances, Task

LENGTHS = (0.02, 0.06, 0.2)  # of a step against a direction
SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)
FALLING = (0.5, 0.7, 1.0, 1.5)  # those that fall with the rate
ESTIMATORS = {
    "first-order, windows of 20": (TruncatedBackpropagation, 20, 100),
    "first-order, windows of 200": (TruncatedBackpropagation, 200, 600),
    "exact, windows of 50": (SecondDerivatives, 50, 300),
    "exact, 150 steps whole": (SecondDerivatives, 150, 150),
    "exact, 300 steps whole": (SecondDerivatives, 300, 300),
}
WINDOW = 100  # steps whose batches are drawn at once


def start(task: Task, network: l2l.CoordinatewiseLSTM, seeds, rate: float, horizon: int, window: int, copies: int = 1):
    schedule = partial(warm_cosine, rate, horizon)
    return Trajectory(Instances(task, seeds), network.config, window=window, schedule=schedule, copies=copies)


def direction(task: Task, network: l2l.CoordinatewiseLSTM, name: str, rate: float, seeds) -> tuple[Tensor, Tensor]:
    """Meta-gradients of the first and the last window, each of length 1."""
    make, window, horizon = ESTIMATORS[name]
    trajectory = start(task, network, seeds, rate, horizon, window)
    estimator = make(Rule.of(network), "log")
    found = [estimator.prepare(trajectory, window)().gradient for _ in range(horizon // window)]
    return found[0] / found[0].norm(), found[-1] / found[-1].norm()


@torch.no_grad()
def losses(
    task: Task, network, candidates: Tensor, seeds, rate: float, horizon: int, share: float | None = None, falls=False
) -> Tensor:
    """Mean and last log loss [2, C] of candidates [C, W]; of a falling share, each window has that of its middle."""
    usual = normalize.LEARNED_SHARE
    count = len(candidates)
    trajectory = start(task, network, seeds, rate, horizon, WINDOW, copies=count + 1 - count % 2)
    rows = len(trajectory.theta) // len(seeds)
    candidates = torch.cat([candidates, candidates[:1].expand(rows - count, -1)])  # an odd number of copies
    rule, found = Rule.of(network, candidates.repeat_interleave(len(seeds), 0)), []
    for first in range(0, horizon, WINDOW):
        length = min(WINDOW, horizon - first)
        peak = warm_cosine(1.0, horizon, max(first + length // 2, horizon // 20)) if falls else 1.0
        normalize.LEARNED_SHARE = usual if share is None else share * peak
        place = torch.empty_like(trajectory.theta).expand(length, -1, -1)
        found.append(advance_(trajectory, rule, trajectory.next(length), place))
    normalize.LEARNED_SHARE = usual
    logs = torch.cat(found).log().view(horizon, rows, len(seeds))[:, :count].mean(-1)
    return torch.stack([logs.mean(0), logs[-max(1, horizon // 20) :].mean(0)])


def percent(found: Tensor) -> str:
    return f"{100 * found[0]:+.2f} / {100 * found[1]:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", nargs="?", default="l2l-base", help="name or folder, with orthogonalize")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("general.json"), help="for its tasks")
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 2, 4, 6], help="numbers in the recipe")
    parser.add_argument("--horizon", type=int, default=800)
    parser.add_argument("--rate", type=float, default=0.012)
    parser.add_argument("--shares", action="store_true", help="shares alone")
    parser.add_argument("--quick", action="store_true", help="two tasks, one estimator, few steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = l2l.CoordinatewiseLSTM.from_pretrained(arguments.network)
    weights = network.flat_weights().detach()
    told = json.loads(arguments.recipe.read_text())["tasks"]
    if not set(arguments.tasks) <= set(range(len(told))):
        parser.error(f"argument --tasks: numbers from 0 to {len(told) - 1}, which {arguments.recipe} has")
    tasks = [task_of(told[number], "mnist") for number in arguments.tasks[: 2 if arguments.quick else None]]
    horizon = 60 if arguments.quick else arguments.horizon
    judge = partial(losses, network=network, seeds=range(900, 904), rate=arguments.rate, horizon=horizon)

    for name in [] if arguments.shares else list(ESTIMATORS)[: 1 if arguments.quick else None]:
        each = [direction(task, network, name, arguments.rate, range(700, 704)) for task in tasks]
        for label, window in (("first", 0), ("last", 1)):
            mean = sum(found[window] for found in each)
            candidates = torch.stack([weights, *(weights - length * mean / mean.norm() for length in LENGTHS)])
            found = sum(judge(task, candidates=candidates) for task in tasks) / len(tasks)
            cells = [f"{step}: {percent(found[:, i + 1] - found[:, 0])}" for i, step in enumerate(LENGTHS)]
            print(f"{name}, {label} window  {'  '.join(cells)}", flush=True)
    own = sum(judge(task, candidates=weights[None]) for task in tasks)[:, 0] / len(tasks)
    for share, falls in [(share, False) for share in SHARES] + [(share, True) for share in FALLING]:
        each = [judge(task, candidates=weights[None], share=share, falls=falls) for task in tasks]
        found = sum(each)[:, 0] / len(tasks)
        print(f"share {share}{', falling with the rate' * falls}  {percent(found - own)}", flush=True)


if __name__ == "__main__":
    main()
