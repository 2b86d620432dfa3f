"""Recipes: everything that makes a network again, as data, and the training of one.

A recipe is a dictionary, or a JSON file of it: ``tasks``, ``network`` (options of the network), ``training`` (options
of the :class:`~l2l_fast.meta.MetaTrainer`), ``meta_steps``, and ``then``, a list of what later stages change.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path

import torch

from l2l_fast.checkpoint import WEIGHTS, shipped
from l2l_fast.files import write_text
from l2l_fast.meta import ranks
from l2l_fast.meta.curricula import parse_horizon
from l2l_fast.meta.run import History
from l2l_fast.meta.trainer import MetaTrainer
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.tasks import MetaTraining, Quadratic, Task
from l2l_fast.tasks import get as get_task
from l2l_fast.writing import json_text

FINISHED = "finished"  # a file beside the network of a recipe that was trained to its end
MAY_DIFFER = ("tasks", "training", "meta_steps")  # between a recipe's stages
_KINDS = {  # of a recipe's values: (whether one is good, what it must do)
    "like": (lambda value: isinstance(value, str), "be another recipe's name, or a path that ends in .json"),
    "network": (lambda value: isinstance(value, dict), "hold options by name"),
    "training": (lambda value: isinstance(value, dict), "hold options by name"),
    "meta_steps": (lambda value: isinstance(value, int) and value >= 1, "be a whole number of at least 1"),
}

# ---------------------------------------------------------------- what is known to train well, by the kind of task

# The raw gradient serves functions that all have one scale; 128 of them in a batch cost little more than one.
QUADRATIC = {
    "network": {"features": "identity", "hidden_size": 20, "num_layers": 1},
    "training": {"instances": 128, "meta_lr": 1e-2, "schedule": "cosine"},
    "meta_steps": 1000,
}

# Networks have gradients of every scale: log_sign tells the LSTM which, the moments tell signal from noise. A linear
# head may take large first steps, and an unroll of half the horizon sees what they lead to. Four trajectories per
# meta-step: minibatch losses, and so meta-gradients, are noisy.
CLASSIFIER = {
    "network": {"features": "both", "hidden_size": 20, "num_layers": 1, "output_scale": 0.01},
    "training": {"unroll": 50, "parallel": 4, "meta_lr": 1e-2, "schedule": "cosine"},
    "meta_steps": 800,
}

# The optimizee is an optimizer's weights, whose gradients have any scale and the noise of a few inner instances.
META_TRAINING = {
    "network": {"features": "moments", "hidden_size": 16, "num_layers": 1},
    "training": {"instances": 16, "meta_lr": 1e-2, "schedule": "cosine", "average": 0.98},
    "meta_steps": 200,
}

# What the demo trains: sees raw gradients and their moments, so what it learns on quadratics carries over to networks.
DEMO = {
    "tasks": [{"name": "quadratic"}],
    "network": {"features": "both", "hidden_size": 20, "num_layers": 1},
    "training": {"instances": 128, "meta_lr": 1e-2, "schedule": "cosine"},
    "meta_steps": 2000,
}


def for_tasks(*tasks: Task) -> dict:
    """The recipe that is known to suit the kind of the first of these tasks.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.meta import recipes
        >>> recipes.for_tasks(l2l.tasks.Quadratic())["meta_steps"]
        1000
    """
    kinds = ((MetaTraining, META_TRAINING), (Quadratic, QUADRATIC), (object, CLASSIFIER))
    known = next(recipe for kind, recipe in kinds if isinstance(tasks[0], kind))
    return copy.deepcopy(known) | {"tasks": list(tasks)}


# ---------------------------------------------------------------- reading


def read(name: str | PathLike) -> dict:
    """A recipe file: tasks, network, training, meta_steps, and ``then``, a list of what later stages change.

    A file with ``"like"`` says only what differs from another; ``network`` and ``training`` are merged key by key, and
    a ``then`` of its own takes the place of the other's. A recipe's name in place of ``tasks`` stands for those of its
    last stage.

    Args:
        name: a path that ends in .json, the name of a network that is shipped, or one of a row's own (``ablations``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not JSON, leaves something out, or holds a value of another kind.
    """
    name = str(name)
    places = [Path(name)] if name.endswith(".json") else [
        WEIGHTS / name / "recipe.json", resources.files("l2l_fast") / "ablations" / f"{name}.json"
    ]  # fmt: skip
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise FileNotFoundError(f"no recipe {name!r}: give a path that ends in .json, or one of {', '.join(names())}")
    try:
        recipe = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:  # of bytes that are no text, too
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{place} must hold tasks, network, training and meta_steps by name, got {recipe!r}")
    return _whole(recipe, place)


def names() -> list[str]:
    """Recipes that come with the package: those of shipped networks first."""
    rows = [file.name for file in (resources.files("l2l_fast") / "ablations").iterdir()]
    trained = [name for name in shipped() if (WEIGHTS / name / "recipe.json").is_file()]
    return trained + sorted(name.removesuffix(".json") for name in rows)


def stages(recipe: dict, meta_steps: int | None = None) -> list[dict]:
    """What a recipe trains one after another, each stage whole; a stage starts from the network of the one before.

    Args:
        recipe: what :func:`read` gives.
        meta_steps: of the last stage, in place of the recipe's; no earlier one is longer.

    Raises:
        ValueError: a stage holds something else than what may differ; the network may not.
    """
    then = recipe.get("then", [])
    parts = [{key: value for key, value in recipe.items() if key != "then"}]
    if not isinstance(then, list):
        raise ValueError(f'"then" of a recipe must be a list of stages, got {then!r}')
    for changes in then:
        if not isinstance(changes, dict) or set(changes) - set(MAY_DIFFER):
            raise ValueError(
                f'a stage in "then" of a recipe must hold what differs from the stage before, of '
                f"{', '.join(MAY_DIFFER)}; got {', '.join(changes) if isinstance(changes, dict) else repr(changes)}"
            )
        _check(changes)
        parts.append(_merged(parts[-1], changes))
    for part in parts:
        if isinstance(part["tasks"], str):
            with _another(part["tasks"]):
                part["tasks"] = stages(read(part["tasks"]))[-1]["tasks"]
    if meta_steps is None:
        return parts
    *earlier, last = parts
    return [part | {"meta_steps": min(meta_steps, part["meta_steps"])} for part in earlier] + [
        last | {"meta_steps": meta_steps}
    ]


def prepare(stage: dict, dataset: str = "digits", seed: int = 0) -> tuple[CoordinatewiseLSTM, list[Task], dict]:
    """A stage's network at its start, its tasks, and the options of its :class:`MetaTrainer`.

    Args:
        stage: one of :func:`stages`; its tasks are names with options, or tasks themselves.
        dataset: "digits" or "mnist", for ``{dataset}`` in the name of a task.
        seed: of the network's start.

    Raises:
        ValueError: a value that makes no sense; the message names it.
    """
    if not isinstance(stage["tasks"], list) or not all(map(_is_task, stage["tasks"])):
        raise ValueError(
            '"tasks" of a recipe must be another recipe\'s name, or a list such as [{"name": "digits-mlp"}] '
            f"with the options of each; got {stage['tasks']!r}"
        )
    tasks = [task_of(task, dataset) for task in stage["tasks"]]
    training = dict(stage["training"])
    if "horizon" in training:
        training["horizon"] = parse_horizon(training["horizon"])
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        return CoordinatewiseLSTM(**stage["network"]), tasks, training


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Trained:
    """What a stage of a recipe has given.

    Attributes:
        network: with the best weights.
        trainer: as it stands; its tasks, options and history among others.
        folder: where it is kept; None where nothing is.
        number, stages: which stage it is, from 1, and how many there are.
        finished: whether it has made all its meta-steps.
    """

    network: CoordinatewiseLSTM
    trainer: MetaTrainer
    folder: Path | None
    number: int
    stages: int
    finished: bool

    @property
    def history(self) -> History:
        return self.trainer.history


def train(
    recipe: str | PathLike | Mapping,
    folder: str | PathLike | None = None,
    *,
    network: CoordinatewiseLSTM | str | PathLike | None = None,
    dataset: str = "mnist",
    meta_steps: int | None = None,
    max_seconds: float = math.inf,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tensorboard: bool = False,
    progress: bool = True,
    on_step: Callable[[int, int], None] | None = None,
    on_stage: Callable[[Trained], None] | None = None,
    **training,
) -> Trained:
    """Train a network by a recipe, stage after stage, each from the network of the one before.

    Of several ranks, as ``torchrun`` starts them, the first one writes into ``folder``, which all must share.

    Args:
        recipe: its name or path, as :func:`read` takes it, or the recipe itself, whose tasks may then be tasks of your
            own in place of names with options.
        folder: keeps the network, a checkpoint and ``history.json`` of the last stage, those of earlier ones in
            ``stage-1`` and so on below it: the same call goes on where one was stopped. None keeps nothing.
        network: where to start, a network, its name, folder or hub id; the recipe's own, freshly drawn, if None.
        dataset: "mnist" or "digits", for recipes whose tasks leave it open.
        meta_steps: of the last stage, in place of the recipe's; no earlier one is longer.
        max_seconds: stop earlier after this time.
        seed: of everything random.
        device: where to train.
        tensorboard: write logs for it below ``folder``.
        progress: show a progress bar (needs rich).
        on_step: called with the meta-steps done and those of all stages, after each; on every rank.
        on_stage: called with each stage that has ended, early or not.
        **training: options of :class:`~l2l_fast.MetaTrainer` in place of the recipe's, in every stage.

    Returns:
        the last stage that was trained.

    Raises:
        FileNotFoundError: no such recipe or network.
        ValueError: a recipe or an option that makes no sense, or a ``folder`` with another run; the message names it.
        KeyboardInterrupt: after Ctrl-C, once everything is saved.

    Example:
        >>> import l2l_fast as l2l
        >>> recipe = {"tasks": [l2l.tasks.Quadratic(4)], "network": {"hidden_size": 4, "num_layers": 1},
        ...           "training": {"horizon": "10:40", "unroll": 5}, "meta_steps": 3,
        ...           "then": [{"training": {"second_derivatives": True}, "meta_steps": 2}]}
        >>> done = l2l.train(recipe, progress=False)
        >>> done.number, done.finished, len(done.history.meta_losses)
        (2, True, 2)
    """
    if not isinstance(recipe, Mapping):
        recipe = read(recipe)
    parts = stages(_whole(dict(recipe), "the recipe"), meta_steps)
    prepared = [prepare(part, dataset, seed) for part in parts]
    if network is None:
        network = prepared[0][0]
    elif not isinstance(network, CoordinatewiseLSTM):
        network = CoordinatewiseLSTM.from_pretrained(network)
    folders, total, before = _stage_folders(folder, len(parts)), sum(part["meta_steps"] for part in parts), 0
    deadline, leads = time.monotonic() + max_seconds, ranks.rank() == 0
    for number, (part, (_, tasks, options), place) in enumerate(zip(parts, prepared, folders, strict=True), 1):
        kept = {} if place is None else {"checkpoint": place / "checkpoint"}
        if tensorboard and place is not None:
            kept["log_dir"] = place / "tensorboard"
        options = {"device": device, "seed": seed, "progress": progress} | kept | options | training
        trainer, steps = MetaTrainer(network, tasks, **options), part["meta_steps"]
        # A stage of no meta-steps would have nothing to show.
        left = max(1.0, deadline - time.monotonic())
        counted = on_step and (lambda done, before=before: on_step(before + done, total))
        try:
            trainer.fit(steps, max_seconds=left, on_step=counted)
        finally:
            # A checkpoint that was refused has a network of its own there; an exception leaves the best so far.
            if trainer.meta_step and place is not None and leads:
                network.save_pretrained(place / "network")
        if place is not None and leads:
            write_text(place / "history.json", json_text(dataclasses.asdict(trainer.history)) + "\n")
        done = Trained(network, trainer, place, number, len(parts), trainer.meta_step >= steps)
        if on_stage:
            on_stage(done)
        if not done.finished:
            break
        before += steps
    return done


def train_once(
    name: str,
    dataset: str,
    folder: Path,
    *,
    meta_steps: int | None,
    seed: int,
    device: torch.device | str,
    on_step: Callable[[int, int], None] | None,
) -> Path:
    """The folder of a recipe's network, trained below ``folder`` unless it is there; a killed training goes on."""
    recipe, folder = read(name), _folder_of(name, dataset, folder, meta_steps, seed)
    if not (folder / FINISHED).exists():
        shared = {"meta_steps": meta_steps, "seed": seed, "device": device, "on_step": on_step}
        train(recipe, folder, dataset=dataset, progress=False, **shared)
        write_text(folder / FINISHED, "")
    return folder / "network"


def is_trained(name: str, dataset: str, folder: Path, *, meta_steps: int | None, seed: int) -> bool:
    """Whether :func:`train_once` has nothing left to do."""
    return (_folder_of(name, dataset, folder, meta_steps, seed) / FINISHED).exists()


def _folder_of(name: str, dataset: str, folder: Path, meta_steps: int | None, seed: int) -> Path:
    decides = json.dumps([stages(read(name), meta_steps), dataset, seed], sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"


# ---------------------------------------------------------------- parts


def _stage_folders(out: str | PathLike | None, count: int) -> list[Path | None]:
    """Where each stage is kept: the last in ``out``, those before it in folders of their own below."""
    if out is None:
        return [None] * count
    return [*(Path(out) / f"stage-{number}" for number in range(1, count)), Path(out)]


def _is_task(task: object) -> bool:
    return isinstance(task, Task) or (isinstance(task, dict) and isinstance(task.get("name"), str))


def task_of(task: Task | dict, dataset: str) -> Task:
    """A task of a recipe: itself, or by its name and options."""
    if isinstance(task, Task):
        return task
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in task.items()}
    return get_task(values.pop("name").replace("{dataset}", dataset), **values)


def _whole(recipe: dict, what: object) -> dict:
    """A recipe that leaves nothing out, or is like one that does not."""
    _check(recipe)
    if "like" in recipe:
        with _another(recipe["like"]):
            base = read(recipe["like"])
        return _merged(base, {key: value for key, value in recipe.items() if key != "like"})
    if missing := [key for key in ("tasks", "network", "training", "meta_steps") if key not in recipe]:
        raise ValueError(f"{what} must have {', '.join(missing)}: add them, or name a recipe to be like")
    return recipe


@contextmanager
def _another(name: str) -> Iterator[None]:
    """Around what follows a recipe's reference to another one."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"the recipe {name} leads back to itself: refer to another one") from None


def _check(recipe: dict) -> None:
    """Of a recipe, or of what a stage changes: that each value given is of its kind."""
    for key, (good, must) in _KINDS.items():
        if key in recipe and not good(recipe[key]):
            raise ValueError(f'"{key}" of a recipe must {must}, got {recipe[key]!r}')


def _merged(base: dict, changes: dict) -> dict:
    """``base`` with what changes; of the network's and the trainer's options, those alone that are given."""
    deep = [key for key in ("network", "training") if key in changes]
    return base | changes | {key: base[key] | changes[key] for key in deep}
