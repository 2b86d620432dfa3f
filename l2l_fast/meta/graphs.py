"""Device work that is captured once and then replayed: on a GPU, small problems wait for launches, not for arithmetic.

The same function is the eager one and the captured one. A replay repeats its kernels on the very memory that they were
captured on and runs none of its Python. So what is captured must

- read and write tensors that keep their places, and take no number from the host but constants;
- leave its results in tensors made outside it: the graphs share one pool of memory, and what one of them holds there
  is overwritten when the next is replayed;
- never wait for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

Work = Callable[[], None]

WARM_UP = 2  # eager calls first: libraries load, the task's data are copied to the device, Adam makes its state
LIMIT = 128  # graphs; random horizons end in windows of every length, and those that come too late run eagerly


class Capture(Protocol):
    """How work is captured; :class:`CudaCapture`, but for tests without a GPU."""

    def warm_up(self, work: Work) -> None:
        """Do the work eagerly, where it will be captured."""
        ...

    def record(self, work: Work) -> Work:
        """Capture the work without doing it; what is returned does it."""
        ...


class CudaCapture:
    """CUDA graphs of one device, captured on one stream into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            work()
        here.wait_stream(self.stream)

    def record(self, work: Work) -> Work:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # Only this thread's mistakes are errors: the watchdog thread of a process group may query its events.
            with torch.cuda.device(self.device), torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):  # fmt: skip
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # a capture that fails leaves its own stream behind
            raise RuntimeError(
                f"a task or the meta-optimizer cannot be captured in a CUDA graph ({error}); it may neither wait for "
                "the device nor copy from the CPU. MetaTrainer(graphs=False) runs it eagerly"
            ) from error
        return graph.replay


class Graphs:
    """Runs work that recurs: eagerly ``WARM_UP`` times, captured after that, eagerly again once there are too many.

    Args:
        capture: how; None runs everything eagerly, where it is called.
        limit: how many graphs at most.
    """

    def __init__(self, capture: Capture | None = None, limit: int = LIMIT) -> None:
        self.capture, self.limit = capture, limit
        self._calls: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Work] = {}

    @property
    def captured(self) -> int:
        """How many pieces of work are captured by now."""
        return len(self._replays)

    def __call__(self, key: Hashable, work: Work) -> None:
        """Do ``work``, or the work that was captured under ``key``: the same work on the same memory."""
        if self.capture is None:
            return work()
        replay = self._replays.get(key)
        if replay is None:
            self._calls[key] += 1
            if self._calls[key] <= WARM_UP or len(self._replays) >= self.limit:
                return self.capture.warm_up(work)
            replay = self._replays[key] = self.capture.record(work)
        replay()
