"""The meta-trainer's progress bar, on stderr, where rich is installed."""

from __future__ import annotations

from contextlib import contextmanager


@contextmanager
def meta_training(shown: bool, total: int):
    """Yields ``update(meta_step, loss, best)``."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        shown = False
    if not shown:
        yield lambda meta_step, loss, best: None
        return
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4g}  best {task.fields[best]:.4g}  {task.fields[speed]:.1f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=total, loss=float("nan"), best=float("inf"), speed=0.0)

        def update(meta_step: int, loss: float, best: float) -> None:
            speed = progress.tasks[0].speed or 0.0
            progress.update(bar, completed=meta_step, loss=loss, best=best, speed=speed)

        yield update
