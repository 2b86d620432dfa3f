"""Modes of torch that surround a call, and that what is trained and measured must not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain(device: torch.device | str = "cpu") -> Iterator[None]:
    """Without autocast, with gradients, and with the CPU as the device of what names none.

    The last is for the code of others (tasks, torch's optimizers): our own names its device and dtype. The default
    dtype stays, as it is every thread's; a task that gives another dtype than float32 is refused.

    Args:
        device: where the work runs.

    Example:
        >>> import torch
        >>> from l2l_fast.modes import plain
        >>> with torch.device("meta"), plain():
        ...     print(torch.zeros(2).device)
        cpu
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in {"cpu", torch.device(device).type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":  # torch.get_default_device() fails within torch.func's transforms
            stack.enter_context(torch.device("cpu"))
        yield
