"""The interval of the live view, from the processor time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["LONGEST_S", "MOST_SHARE", "Pace"]

#: Share of one core, averaged over some ticks; above it the interval grows.
MOST_SHARE = 0.04
#: Longest time between two ticks.
LONGEST_S = 60.0


class Pace:
    """Computes the interval between ticks from the processor time of the view.

    :param clock: returns the processor time of this process in seconds
    """

    def __init__(
        self,
        interval_s: float,
        clock: Callable[[], float] = time.process_time,
        wall: Callable[[], float] = time.monotonic,
    ) -> None:
        self.asked_s = self.interval_s = interval_s
        self._clock, self._wall = clock, wall
        self.begin()

    def begin(self) -> None:
        """Start the measurement; processor time of the program's start is not counted."""
        self._last = self._wall(), self._clock()
        self.share = 0.0

    def next_s(self) -> float:
        """Account for a tick; return the seconds until the next one."""
        (wall_s, used_s), now = self._last, (self._wall(), self._clock())
        self._last = now
        took_s, used_s = now[0] - wall_s, now[1] - used_s
        if took_s > 0:
            self.share = used_s / took_s
        # The cost of a tick hardly depends on the interval.
        needed_s = used_s / MOST_SHARE
        if needed_s > self.interval_s:
            self.interval_s = min(needed_s, LONGEST_S)
        else:
            self.interval_s = max(self.asked_s, 0.8 * self.interval_s, needed_s)
        return self.interval_s
