"""Modes of torch that surround a call, and that what is trained and measured must not depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch


@contextmanager
def plain(device: torch.device | str = "cpu") -> Iterator[Callable[[], AbstractContextManager]]:
    """Without autocast, with gradients, and with the CPU as the device of what names none.

    The last is for the code of others (tasks, torch's optimizers): our own names its device and dtype. The default
    dtype stays, as it is every thread's; a task that gives another dtype than float32 is refused.

    Args:
        device: where the work runs.

    Yields:
        ``with as_before():`` is for a caller's own function within, such as ``on_step``.

    Example:
        >>> import torch
        >>> from l2l_fast.modes import plain
        >>> with torch.device("meta"), plain() as as_before:
        ...     print(torch.zeros(2).device)
        ...     with as_before():
        ...         print(torch.zeros(2).device)
        cpu
        meta
    """
    changes: list[tuple[partial, partial]] = []  # what to enter, and what undoes it
    if torch.is_inference_mode_enabled():
        changes.append((partial(torch.inference_mode, False), partial(torch.inference_mode, True)))
    if not torch.is_grad_enabled():
        changes.append((partial(torch.set_grad_enabled, True), partial(torch.set_grad_enabled, False)))
    for kind in {"cpu", torch.device(device).type}:
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            changes.append((partial(torch.autocast, kind, enabled=False), partial(torch.autocast, kind, dtype)))
    default = torch.empty(0).device  # torch.get_default_device() fails within torch.func's transforms
    if default.type != "cpu":
        changes.append((partial(torch.device, "cpu"), partial(torch.device, default)))

    @contextmanager
    def as_before() -> Iterator[None]:
        with ExitStack() as stack:
            for _, undo in changes:
                stack.enter_context(undo())
            yield

    with ExitStack() as stack:
        for change, _ in changes:
            stack.enter_context(change())
        yield as_before
