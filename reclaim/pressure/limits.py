"""Limits of the daemon: pages per second, and processor time. Thread-safe.

Both are token buckets on a monotonic clock: setting the wall clock has no effect, and
after a suspend of the host the bucket is full, but contains no more than that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["CpuShare", "Rate"]


class Rate:
    """A rate in pages per second, with a burst of one second's pages.

    :param per_s: pages per second; 0: no limit
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self._clock = per_s, clock
        self._lock = threading.Lock()
        self._left, self._at_s = per_s, clock()

    def take(self, wanted: int) -> int:
        """Return how many of the wanted pages may be evicted now, and count them."""
        if not self.per_s:
            return wanted
        with self._lock:
            self._refill()
            granted = max(0, min(wanted, int(self._left)))
            self._left -= granted
            return granted

    def give_back(self, unused: int) -> None:
        """Return granted pages that were not evicted."""
        self.charge(-unused)

    def charge(self, pages: int) -> None:
        """Count pages that were evicted without a grant."""
        if self.per_s:
            with self._lock:
                self._refill()
                self._left = min(self._left - pages, self.per_s)

    def _refill(self) -> None:
        now_s = self._clock()
        self._left = min(self.per_s, self._left + max(0.0, now_s - self._at_s) * self.per_s)
        self._at_s = now_s


class CpuShare:
    """A limit on processor time as a share of one core, averaged over ten seconds.

    :param share: 1 is a whole core; 0: no limit
    """

    WINDOW_S = 10.0

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.share, self._clock = share, clock
        self._lock = threading.Lock()
        self._left_s, self._at_s = share * self.WINDOW_S, clock()

    def used(self, busy_s: float) -> float:
        """Count processor time; return the time that the caller must sleep, in seconds."""
        if not self.share:
            return 0.0
        with self._lock:
            now_s = self._clock()
            earned_s = max(0.0, now_s - self._at_s) * self.share
            self._left_s = min(self.share * self.WINDOW_S, self._left_s + earned_s) - busy_s
            self._at_s = now_s
            return max(0.0, -self._left_s / self.share)
