"""Turns: runs vCPUs that must not run concurrently one at a time, in FIFO order."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["Turns"]


class Turns:
    """Lets one thread at a time run, first come, first served.

    A thread that waits longer than a slice interrupts the running one, repeatedly
    until that ends its turn: an interruption that arrives too early or too late
    costs only one slice.

    :param slice_s: length of a turn while another thread waits
    """

    def __init__(self, slice_s: float = 0.002) -> None:
        self._slice_s = slice_s
        self._changed = threading.Condition()
        self._next_ticket = self._served = 0
        self._interrupt: Callable[[], None] | None = None

    @contextlib.contextmanager
    def turn(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Wait for a turn and hold it.

        :param interrupt: makes the holder end its turn; called by any thread,
            possibly just after the turn has ended
        """
        with self._changed:
            ticket = self._next_ticket
            self._next_ticket += 1
            while not self._changed.wait_for(lambda: self._served == ticket, self._slice_s):
                if self._interrupt is not None:
                    self._interrupt()
            self._interrupt = interrupt
        try:
            yield
        finally:
            with self._changed:
                self._served += 1
                self._interrupt = None
                self._changed.notify_all()
