"""Turns: vCPUs that may not run at the same time, in the order in which they ask."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["Turns"]


class Turns:
    """Lets one thread at a time run, first come, first served.

    Who waits longer than a slice interrupts the one that runs, again and again
    until it gives its turn back: an interruption that comes a moment too early
    or too late is only a slice lost.

    :param slice_s: what a turn lasts while somebody else waits
    """

    def __init__(self, slice_s: float = 0.002) -> None:
        self._slice_s = slice_s
        self._changed = threading.Condition()
        self._next_ticket = self._served = 0
        self._interrupt: Callable[[], None] | None = None

    @contextlib.contextmanager
    def turn(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """Wait for a turn and hold it.

        :param interrupt: makes the holder leave soon; called by any thread, also
            when the turn is just over
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
