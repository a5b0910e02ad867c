"""What the daemon may use: pages a second, and processor time. Safe for several threads.

Both are token buckets on a monotonic clock: a clock that is set does nothing, and a
host that slept comes back with one full bucket and not with hours of saved-up work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["CpuShare", "Rate"]


class Rate:
    """So many pages a second, and as many at once as fit into one.

    :param per_s: 0: any number
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self._clock = per_s, clock
        self._lock = threading.Lock()
        self._left, self._at_s = per_s, clock()

    def take(self, wanted: int) -> int:
        """Return how many of the wanted pages may go now, and count them."""
        if not self.per_s:
            return wanted
        with self._lock:
            self._refill()
            granted = max(0, min(wanted, int(self._left)))
            self._left -= granted
            return granted

    def give_back(self, unused: int) -> None:
        """Count pages that were granted and did not go."""
        self.charge(-unused)

    def charge(self, pages: int) -> None:
        """Count pages that went without having been asked for."""
        if self.per_s:
            with self._lock:
                self._refill()
                self._left = min(self._left - pages, self.per_s)

    def _refill(self) -> None:
        now_s = self._clock()
        self._left = min(self.per_s, self._left + max(0.0, now_s - self._at_s) * self.per_s)
        self._at_s = now_s


class CpuShare:
    """A share of one core, kept over ten seconds.

    :param share: 1 is a whole core; 0: any
    """

    WINDOW_S = 10.0

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.share, self._clock = share, clock
        self._lock = threading.Lock()
        self._left_s, self._at_s = share * self.WINDOW_S, clock()

    def used(self, busy_s: float) -> float:
        """Count processor time; return for how long the caller has to rest."""
        if not self.share:
            return 0.0
        with self._lock:
            now_s = self._clock()
            earned_s = max(0.0, now_s - self._at_s) * self.share
            self._left_s = min(self.share * self.WINDOW_S, self._left_s + earned_s) - busy_s
            self._at_s = now_s
            return max(0.0, -self._left_s / self.share)
