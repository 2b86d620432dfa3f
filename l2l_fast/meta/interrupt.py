"""Ctrl-C in a loop that wants to end between two of its steps."""

from __future__ import annotations

import signal
import threading


class DeferredInterrupt:
    """Turns Ctrl-C into a request that the loop reads between meta-steps; a second one interrupts at once.

    Only where Ctrl-C would raise KeyboardInterrupt. Whoever ignores it (a shell does for a job in the background), or
    has a handler of another kind, means that.
    """

    def __enter__(self) -> DeferredInterrupt:
        self.requested, main = False, threading.current_thread() is threading.main_thread()
        self._installed = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
