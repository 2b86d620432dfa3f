"""Work that is spread over processes, each with one thread: figures do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch


def spread(function: Callable[[Any], Any], items: Sequence, jobs: int) -> Iterator[tuple[Any, Any]]:
    """Yields each item with what the function makes of it, as they are done.

    An error or Ctrl-C ends it once the items under way are done with; those that wait are left.

    Args:
        function: of a module, so that a process can be told of it; with one job it is called here.
        items: what can be sent to a process.
        jobs: processes at most.
    """
    jobs = min(jobs, len(items))
    if jobs <= 1:
        for item in items:
            yield item, function(item)
        return
    # A fork would inherit torch's threads without their stacks.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), initializer=partial(torch.set_num_threads, 1))
    try:
        waiting = {pool.submit(function, item): item for item in items}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)
