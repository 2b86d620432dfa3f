"""Networks that rows of ``l2l-fast reproduce``, and ``sweep``, train themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch

from l2l_fast import tasks as library
from l2l_fast.checkpoint import WEIGHTS, shipped
from l2l_fast.cli.options import parse_horizon
from l2l_fast.meta import History, MetaTrainer, recipes
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.tasks import Task

MAY_DIFFER = ("tasks", "training", "meta_steps")  # between a recipe's stages
_KINDS = {  # of a recipe's values: (whether one is good, what it must do)
    "like": (lambda value: isinstance(value, str), "be another recipe's name, or a path that ends in .json"),
    "network": (lambda value: isinstance(value, dict), "hold options by name"),
    "training": (lambda value: isinstance(value, dict), "hold options by name"),
    "meta_steps": (lambda value: isinstance(value, int) and value >= 1, "be a whole number of at least 1"),
}


def train_at_rate(
    problem: Task, rate: float, meta_steps: int, horizon: int, seed: int, device: str, on_step: Callable[[int], None]
) -> tuple[CoordinatewiseLSTM, History, MetaTrainer]:
    """A network of the task's recipe, trained at a meta learning rate that stays.

    At every rate the same seed starts from the same network and sees the same trajectories.
    """
    torch.manual_seed(seed)
    recipe = recipes.for_task(problem)
    network = CoordinatewiseLSTM(**recipe.network)
    # Validated often: at a large rate the weights are good for moments only.
    settings = {"meta_lr": rate, "horizon": horizon, "schedule": "constant", "validate_every": 10}
    trainer = MetaTrainer(network, problem, seed=seed, device=device, progress=False, **recipe.training | settings)
    return network, trainer.fit(meta_steps, on_step=on_step), trainer


def read_recipe(name: str) -> dict:
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
    places = [Path(name)] if name.endswith(".json") else [
        WEIGHTS / name / "recipe.json", resources.files("l2l_fast") / "ablations" / f"{name}.json"
    ]  # fmt: skip
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise FileNotFoundError(
            f"no recipe {name!r}: give a path that ends in .json, or one of {', '.join(recipe_names())}"
        )
    try:
        recipe = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:  # of bytes that are no text, too
        raise ValueError(f"{place} is not JSON: {error}") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{place} must hold tasks, network, training and meta_steps by name, got {recipe!r}")
    _check(recipe)
    if "like" in recipe:
        with _another(recipe["like"]):
            base = read_recipe(recipe.pop("like"))
        return _merged(base, recipe)
    if missing := [key for key in ("tasks", "network", "training", "meta_steps") if key not in recipe]:
        raise ValueError(f"{place} must have {', '.join(missing)}: add them, or name a recipe to be like")
    return recipe


def recipe_names() -> list[str]:
    """Recipes that come with the package: those of shipped networks first."""
    rows = [file.name for file in (resources.files("l2l_fast") / "ablations").iterdir()]
    trained = [name for name in shipped() if (WEIGHTS / name / "recipe.json").is_file()]
    return trained + sorted(name.removesuffix(".json") for name in rows)


def stages(recipe: dict, meta_steps: int | None = None) -> list[dict]:
    """What a recipe trains one after another, each stage whole; a stage starts from the network of the one before.

    Args:
        recipe: what :func:`read_recipe` gives.
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
                part["tasks"] = stages(read_recipe(part["tasks"]))[-1]["tasks"]
    if meta_steps is None:
        return parts
    *earlier, last = parts
    return [part | {"meta_steps": min(meta_steps, part["meta_steps"])} for part in earlier] + [
        last | {"meta_steps": meta_steps}
    ]


def prepare(recipe: dict, dataset: str, seed: int) -> tuple[CoordinatewiseLSTM, list[Task], dict]:
    """A recipe's network at its start, its tasks, and the arguments of its :class:`MetaTrainer`."""
    named = lambda task: isinstance(task, dict) and isinstance(task.get("name"), str)  # noqa: E731
    if not isinstance(recipe["tasks"], list) or not all(map(named, recipe["tasks"])):
        raise ValueError(
            '"tasks" of a recipe must be another recipe\'s name, or a list such as [{"name": "digits-mlp"}] '
            f"with the options of each; got {recipe['tasks']!r}"
        )
    tasks = [
        library.get(task.pop("name").replace("{dataset}", dataset), **_tuples(task))
        for task in map(dict, recipe["tasks"])
    ]
    training = dict(recipe["training"])
    if "horizon" in training:
        training["horizon"] = parse_horizon(str(training["horizon"]))
    torch.manual_seed(seed)
    return CoordinatewiseLSTM(**recipe["network"]), tasks, training


def train_recipe(
    name: str,
    dataset: str,
    folder: Path,
    *,
    meta_steps: int | None,
    seed: int,
    device: str,
    on_step: Callable[[int, int], None],
) -> Path:
    """The network of a recipe file, trained below ``folder`` unless it is there; a killed training goes on."""
    parts = stages(read_recipe(name), meta_steps)
    decides = json.dumps([parts, dataset, seed], sort_keys=True)
    folder = folder / f"{name}-{hashlib.sha256(decides.encode()).hexdigest()[:12]}"
    if (folder / "network" / "config.json").exists():
        return folder / "network"
    prepared = [prepare(part, dataset, seed) for part in parts]
    network, total, before = prepared[0][0], sum(part["meta_steps"] for part in parts), 0
    for part, (_, tasks, training), place in zip(parts, prepared, stage_folders(folder, parts), strict=True):
        trainer = MetaTrainer(
            network, tasks, seed=seed, device=device, progress=False, checkpoint=place / "checkpoint", **training
        )
        trainer.fit(part["meta_steps"], on_step=lambda done, before=before: on_step(before + done, total))
        before += part["meta_steps"]
    network.save_pretrained(folder / "network")
    return folder / "network"


def stage_folders(out: Path, parts: list[dict]) -> list[Path]:
    """Where each stage keeps its checkpoint: the last in ``out``, those before it in folders of their own below."""
    return [*(out / f"stage-{number}" for number in range(1, len(parts))), out]


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


def _tuples(options: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
