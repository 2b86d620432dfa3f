"""What a person sees of meta-training while it runs: a bar on stderr where rich is installed, in a notebook a picture
that grows, and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from l2l_fast.meta.live import in_notebook, live_picture


@contextmanager
def progress_bar(
    shown: bool, total: int, losses: list[float], validations: list[tuple[int, float]]
) -> Iterator[Callable[..., None]]:
    """Yields ``update(meta_step, loss, best, doing="")``.

    Args:
        shown: False shows nothing.
        total: meta-steps that are to be made.
        losses, validations: what a history keeps of them, lists that grow.
    """
    if shown and in_notebook():
        with live_picture(total, losses, validations) as update:
            yield update
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        shown = False
    if not shown:
        yield lambda meta_step, loss, best, doing="": None
        return
    columns = (
        TextColumn("meta-training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=total, text="")

        def update(meta_step: int, loss: float, best: float, doing: str = "") -> None:
            speed = progress.tasks[0].speed or 0.0
            text = doing or f"loss {loss:.4g}  best {best:.4g}  {speed:.1f}/s"
            progress.update(bar, completed=meta_step, text=text)

        yield update


@contextmanager
def tensorboard(folder: Path | None, done: int) -> Iterator[Callable[[int, float, float | None], None]]:
    """Yields ``log(meta_step, loss, score)``, whose score is None where there was no validation.

    Args:
        folder: where the logs are; None logs nothing.
        done: meta-steps done so far; what an earlier run logged of later ones is dropped.

    Raises:
        ImportError: without TensorBoard.
    """
    if folder is None:
        yield lambda meta_step, loss, score: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("log_dir needs TensorBoard: pip install 'l2l_fast[tensorboard]'") from None
    writer = SummaryWriter(folder, purge_step=done + 1)

    def log(meta_step: int, loss: float, score: float | None) -> None:
        writer.add_scalar("meta_loss", loss, meta_step)
        if score is not None:
            writer.add_scalar("validation", score, meta_step)

    try:
        yield log
    finally:
        writer.close()
