"""What a run is of: a checkpoint goes on with the options and the tasks that it was begun with, or not at all.

Tasks are told apart by what can be saved in a line: their options, and hashes where data are meant. What has no name
(a lambda, what a closure holds, the modules within a module) shows in the loss at a start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from l2l_fast.tasks import Instances, Task

LONGEST = 120  # characters of one fact
_TOLERANCE = 1e-3  # of a loss: kernels and devices sum in an order of their own


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
    facts = {"name": task.name, "class": type(task).__qualname__}
    options = getattr(task, "__dict__", {})
    facts |= {key: _fact(value) for key, value in options.items() if key[0] != "_" and key not in ("name", "folder")}
    instances = Instances(task, [0], device)
    loss = instances.losses(instances.unflatten(instances.start()), instances.draw()).item()
    facts["parameters"] = _fact({name: list(shape) for name, shape in instances.shapes.items()})
    facts["first_loss"] = float(f"{loss:.6g}") if math.isfinite(loss) else None
    return facts


def differences(saved: dict, now: dict) -> list[str]:
    """What of two runs' settings is not the same, each as a piece of a sentence; of a task, the facts that differ."""
    found = []
    for name in saved | now:
        then, today = saved.get(name), now.get(name)
        if isinstance(then, dict) and isinstance(today, dict):
            found += [f"{name}.{difference}" for difference in differences(then, today)]
        elif not (then == today or (name == "first_loss" and _close(then, today))):
            then, today = (value["name"] if isinstance(value, dict) else value for value in (then, today))
            found.append(f"{name}={then!r} (now {today!r})")
    return found


def _close(one: float | None, other: float | None) -> bool:
    return None not in (one, other) and math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-6)


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
