"""``l2l-fast tasks``: what can be trained on and compared on."""

from __future__ import annotations

from l2l_fast.cli.options import Json, report
from l2l_fast.tasks import SMALL, WORKLOADS, MetaTraining, Quadratic, Task, get, names


def tasks(as_json: Json = False) -> None:
    """List the tasks that have a name.

    \b
    Examples:
        l2l-fast tasks
        l2l-fast tasks --json
    """
    rows = {name: _purpose(name) or _describe(get(name)) for name in names()}
    width = max(map(len, rows))
    report(rows, "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()), as_json)


def _purpose(name: str) -> str | None:
    """Of a task that reads its data when it is made, what its maker says."""
    if name in WORKLOADS:
        kind, make = "workload", WORKLOADS[name]
    elif name in SMALL:
        kind, make = "small", SMALL[name][0]
    else:
        return None
    first = (make.__doc__ or "").splitlines()[0].rstrip(".").split(" (:")[0]
    return f"{kind}: {first[0].lower()}{first[1:]}"


def _describe(task: Task) -> str:
    if isinstance(task, Quadratic):
        return f"||W x - y||^2 in {task.dimension} dimensions"
    if isinstance(task, MetaTraining):
        return f"weights of an MLP of {task.hidden} units that optimizes {task.task.name}, {task.unroll} steps"
    units = "-".join(map(str, task.hidden))
    kind = "convolutions with channels" if task.kind == "conv" else "hidden layers of units"
    return f"classifier, {kind} {units}, {task.activation}, minibatch {task.batch_size}"
