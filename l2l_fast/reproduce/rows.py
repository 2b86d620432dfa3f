"""What each row of ``l2l-fast reproduce`` is: its tasks, horizons and bars, as data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

BASELINES = ("sgd", "nesterov", "rmsprop", "adam")

# Headings of figures. The first four are Comparison's ratios to the best tuned baseline; the others say what they are.
METRICS = {
    "ratio_mean": "mean loss",
    "ratio_steps": "steps",
    "ratio_final": "final loss",
    "ratio_seconds": "seconds",
    "diverged": "seeds diverged",
    "late": "last 500 / steps 500-1000",
    "bytes": "state, in Adam's",
    "state": "bytes",
    "multiply_adds": "multiply-adds",
    "nanoseconds": "ns",
    "meta_loss": "meta-loss at the end",
    "mean_loss": "mean loss",
    "final_loss": "final loss",
    "ratio_frozen": "mean loss, in the frozen MLP's",
    "ratio_frozen_final": "final loss, in the frozen MLP's",
    "wins": "seeds below the frozen MLP",
    "behind": "networks",
}


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        seeds: held-out seeds, paired over optimizers.
        tuning_seeds: other seeds, which baselines are tuned on.
        meta_seeds: networks that ``meta-lr`` trains at each rate.
        meta_steps: of the networks that rows train themselves; None leaves it to the row or the recipe.
        long_horizon: steps of the row ``horizon``.
    """

    seeds: int = 10
    tuning_seeds: int = 10
    meta_seeds: int = 3
    meta_steps: int | None = None
    long_horizon: int = 10_000


FULL = Settings()
QUICK = Settings(seeds=3, tuning_seeds=3, meta_seeds=2, meta_steps=60, long_horizon=2_000)


@dataclass(frozen=True)
class Case:
    """One task at some horizons.

    Attributes:
        task: a task's name, in which ``{dataset}`` is filled in.
        horizons: numbers of updates.
        bars: by horizon, the largest figure that a network may have, by metric.
        options: of the task, in place of its name's.
    """

    task: str
    horizons: tuple[int, ...] = ()
    bars: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)

    def label(self, dataset: str) -> str:
        options = [f"start std {value:g}" for name, value in self.options.items() if name == "init_scale"]
        return ", ".join([self.task.format(dataset=dataset), *options])


@dataclass(frozen=True)
class Row:
    """One picture of the deck, or one question beyond it.

    Attributes:
        title: above its tables.
        question: what it answers.
        kind: "compare" with tuned baselines, "long" runs of the networks alone, "meta-lr" or "proposal".
        cases: what is run.
        network: the shipped network that is judged unless others are given; None for networks the row trains.
        recipes: recipe files of the networks that the row trains, each compared with the others.
        baselines: what is tuned and compared with, by name.
        state_dtype: of the networks' state.
        costs: whether to measure and draw what each network costs a coordinate as well.
    """

    title: str
    question: str
    kind: str
    cases: tuple[Case, ...]
    network: str | None = "l2l-base-v1"
    recipes: tuple[str, ...] = ()
    baselines: tuple[str, ...] = BASELINES
    state_dtype: str = "float32"
    costs: bool = False


def _bars(mean: float, steps: float, final: float) -> dict[str, float]:
    return {"ratio_mean": mean, "ratio_steps": steps, "ratio_final": final}


HORIZONS = (100, 200, 1000)
_LONG = _bars(0.88, 0.75, 0.97)
_SEEN = {100: _bars(0.80, 0.65, 0.95), 200: _bars(0.80, 0.65, 0.95), 1000: _LONG}
_UNSEEN = {100: _bars(0.90, 0.70, 0.97), 200: _bars(0.90, 0.70, 0.97), 1000: _LONG}
_QUADRATIC = _bars(0.70, 0.70, 0.65)
_SECONDS = {200: {"ratio_seconds": 0.75, "bytes": 5.0}}
_START = {200: _bars(0.85, 0.75, 1.0)}
_WITH_BAR = (0.003, 0.01, 0.03, 0.3)
_NO_DIVERGENCE = {"diverged": 0.0, "late": 1.0}
_OFFLINE = {100: {"ratio_steps": 0.8}}
_FOUR = ("{dataset}-mlp", "{dataset}-mlp-2layer", "{dataset}-mlp-40", "{dataset}-mlp-relu")

ROWS: dict[str, Row] = {
    "meta-lr": Row(
        "The meta-optimizer's learning rate",
        "How fast does an optimizer learn to optimize at each of the deck's five meta learning rates?",
        "meta-lr",
        (Case("quadratic", (100,)),),
        network=None,
    ),
    "quadratic": Row(
        "Quadratics",
        "Does it beat hand-designed rules on random quadratics?",
        "compare",
        (Case("quadratic", (100, 400), {100: _QUADRATIC, 400: _QUADRATIC}),),
        network="l2l-quadratic",
    ),
    "mnist": Row(
        "The deck's network: 20 sigmoid units",
        "Does it beat them on the network that the deck trains?",
        "compare",
        (Case("{dataset}-mlp", HORIZONS, _SEEN),),
    ),
    "2layer": Row(
        "Two hidden layers",
        "And with a second hidden layer of 20 units?",
        "compare",
        (Case("{dataset}-mlp-2layer", HORIZONS, _SEEN),),
    ),
    "40units": Row(
        "Forty hidden units",
        "And with 40 units?",
        "compare",
        (Case("{dataset}-mlp-40", HORIZONS, _SEEN),),
    ),
    "relu": Row(
        "ReLU, the deck's one defeat",
        "And with ReLU, which the deck loses?",
        "compare",
        (Case("{dataset}-mlp-relu", HORIZONS, _UNSEEN),),
    ),
    "horizon": Row(
        "Long runs",
        "Does it stay good far beyond the horizons it was trained for?",
        "long",
        tuple(Case(task, bars={10_000: _NO_DIVERGENCE}) for task in _FOUR),
    ),
    "init": Row(
        "Start scales",
        "Does it work from weights of any scale at the start?",
        "compare",
        tuple(
            Case("{dataset}-mlp", (200,), _START if scale in _WITH_BAR else {}, {"init_scale": scale})
            for scale in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
        ),
    ),
    "seconds": Row(
        "Seconds and bytes",
        "Does a small network save time, and not steps alone, where Adam runs at its fastest?",
        "compare",
        tuple(Case(task, (200,), _SECONDS) for task in (_FOUR[0], _FOUR[3])),
        network="l2l-small",
        baselines=("adam-fused",),
        state_dtype="bfloat16",
    ),
    "front": Row(
        "Quality against cost",
        "How much does a larger network buy? All trained for the same number of meta-steps.",
        "compare",
        (Case(_FOUR[0], (100, 200)), Case(_FOUR[3], (100, 200))),
        network=None,
        recipes=("front-4", "front-8", "front-16", "front-20", "front-2x20"),
        costs=True,
    ),
    "transfer": Row(
        "Transfer",
        "What does an optimizer do on a family of tasks that it never met in meta-training?",
        "compare",
        (Case("quadratic", (100,)), *(Case(task, (100, 200)) for task in (_FOUR[0], _FOUR[3], "{dataset}-conv"))),
        network=None,
        recipes=("quadratics", "sigmoid-20", "base"),
    ),
    "ablation": Row(
        "What each ingredient is worth",
        "What do the features, the random scaling and the objective of meta-training contribute?",
        "compare",
        (Case(_FOUR[0], (100, 200)), Case(_FOUR[3], (100, 200))),
        network=None,
        recipes=("base", "moments", "log-sign", "no-scaling", "sum", "log"),
    ),
    "proposal": Row(
        "The deck's proposal: three networks",
        "What does an LSTM gain that updates an MLP, which updates the optimizee: in meta-training, and online?",
        "proposal",
        (
            Case("meta-quadratic", (100,), _OFFLINE),
            *(Case(task, (200,)) for task in (*_FOUR, "{dataset}-conv", "quadratic")),
        ),
        network=None,
    ),
}


def find(name: str) -> list[str]:
    """Names of the rows meant: one, or every one for "all".

    Raises:
        ValueError: there is no such row; the message names the nearest and lists all.

    Example:
        >>> from l2l_fast.reproduce import rows
        >>> rows.find("relu"), len(rows.find("all"))
        (['relu'], 13)
    """
    if name == "all":
        return list(ROWS)
    if name not in ROWS:
        known = [*ROWS, "all"]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"there is no row {name!r}.{hint} Known: {', '.join(known)}")
    return [name]
