"""What a run is of: a checkpoint goes on with the options and the tasks that it was begun with, or not at all.

Tasks, optimizers and curricula are told apart by what can be saved in a line: their options, and hashes where data are
meant. What has no name (a lambda, what a closure holds, the modules within a module) shows in what it does: the loss at
a start, the first steps, the first lengths.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from l2l_fast.meta.curricula import Horizon
from l2l_fast.tasks import Instances, Task

LONGEST = 120  # characters of one fact
STEPS = 3  # of an optimizer, by which it is known
_TOLERANCE = 1e-3  # of a loss: kernels and devices sum in an order of their own
_MEASURED = ("first_loss", "first_steps")
_HOW = ("params", "foreach", "fused", "capturable", "differentiable")  # of a param group: not what is computed


def describe(task: Task, device: torch.device | str = "cpu") -> dict:
    """Facts that tell a task from others, by name: its class, its options, its parameters, its loss at one start.

    Tensors count by a hash of their bytes (MNIST's 188 MB take 0.2 seconds), functions by their qualified names. Not
    where data are found: a run may go on on another machine.

    Args:
        task: the task.
        device: where its loss is computed.

    Returns:
        strings and numbers, fit to be saved.

    Example:
        >>> import l2l_fast as l2l
        >>> from l2l_fast.meta.identity import describe
        >>> facts = describe(l2l.tasks.Quadratic(3))
        >>> facts["name"], facts["dimension"], facts["parameters"]
        ('quadratic', 3, '{x: [3]}')
    """
    facts = {"name": task.name, "class": type(task).__qualname__} | _attributes(task, ("name", "folder"))
    instances = Instances(task, [0], device)
    loss = instances.losses(instances.unflatten(instances.start()), instances.draw()).item()
    facts["parameters"] = _fact({name: list(shape) for name, shape in instances.shapes.items()})
    facts["first_loss"] = float(f"{loss:.6g}") if math.isfinite(loss) else None
    return facts


def describe_optimizer(make: Callable[[list], torch.optim.Optimizer], parameters: Sequence[Tensor]) -> dict:
    """Facts that tell what ``make`` makes from other optimizers: class, options, and where its first steps lead.

    Args:
        make: makes one from a list of parameters; called with some of fixed values, which take three steps along fixed
            gradients.
        parameters: of the shapes, dtypes and devices that it will get.

    Returns:
        strings and numbers, fit to be saved.

    Example:
        >>> import torch
        >>> from l2l_fast.meta.identity import describe_optimizer
        >>> facts = describe_optimizer(lambda params: torch.optim.SGD(params, lr=0.1), [torch.zeros(3)])
        >>> facts["class"], facts["lr"], facts["momentum"]
        ('SGD', 0.1, 0)
    """
    generator = torch.Generator().manual_seed(0)

    def fixed(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like)

    places = [fixed(parameter).requires_grad_() for parameter in parameters]
    starts = [place.detach().clone() for place in places]
    with torch.random.fork_rng(devices=[]):
        optimizer = make(places)
        facts = {"class": type(optimizer).__qualname__}
        facts |= _attributes(optimizer, ("state", "defaults", "param_groups"))
        groups = getattr(optimizer, "param_groups", [])
        for number, group in enumerate(groups):
            place = f"group {number}." if number else ""
            facts |= {f"{place}{key}": _fact(_number(value)) for key, value in group.items() if key not in _HOW}
        for _ in range(STEPS):
            for place in places:
                place.grad = fixed(place)
            optimizer.step()
    moves = zip(places, starts, strict=True)
    along = sum(((place.detach() - start) * place.grad).sum().item() for place, start in moves)
    return facts | {"first_steps": float(f"{along:.6g}") if math.isfinite(along) else None}


def describe_horizon(horizon: Horizon) -> dict:
    """Facts that tell a curriculum from others: its class, its options, and the first lengths that it draws."""
    horizon = copy.deepcopy(horizon)
    facts = {"name": repr(horizon), "class": type(horizon).__qualname__}
    facts |= _attributes(horizon, horizon.state_dict())
    if horizon.state_dict():
        return facts  # lengths are those of where it stands
    rng = np.random.default_rng(0)
    return facts | {"first_lengths": _fact([horizon.draw(rng, fraction) for fraction in (0.0, 0.3, 0.9)])}


def differences(saved: dict, now: dict) -> list[str]:
    """What of two runs' settings is not the same, each as a piece of a sentence; of a task, the facts that differ."""
    found = []
    for name in saved | now:
        then, today = saved.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(today, dict):
            found += [f"{name}.{difference}" for difference in differences(then, today)]
        elif not (then == today or (name in _MEASURED and _close(then, today))):
            then, today = (
                value.get("name", value["class"]) if isinstance(value, dict) else value for value in (then, today)
            )
            found.append(f"{name}={then!r} (now {today!r})")
    return found


def _close(one: float | None, other: float | None) -> bool:
    return None not in (one, other) and math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-6)


def _attributes(thing, others: Sequence[str] | Mapping) -> dict:
    """What an object was made with, as far as it is kept under names of its own, but for ``others``."""
    return {
        name: _fact(value)
        for name, value in getattr(thing, "__dict__", {}).items()
        if name[0] != "_" and name not in others
    }


def _number(value):
    """A rate that is a tensor here and a number there, as the device asks, is the same."""
    return float(f"{value.item():.6g}") if isinstance(value, Tensor) and value.numel() == 1 else value


def _fact(value) -> str | int | float | bool | None:
    """Plain values as they are, all else in a line."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    text = _text(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}... #{_hash(text.encode())}"


def _text(value) -> str:
    if isinstance(value, Tensor):
        data = value.detach().cpu().to_dense().contiguous().view(-1).view(torch.uint8).numpy()
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} #{_hash(data)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # a Dataset
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_text(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_text, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, str | int | float | None):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)  # a function, a class; else what it is one of


def _hash(data) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
