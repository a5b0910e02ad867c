"""Back-off: stop evicting proactively while evicted pages refault.

Decayed sums over about half a minute count the pages that this daemon evicted and how
many of them refaulted. While the refaulted share is above the threshold, the daemon
holds back: it evicts nothing proactively, and reduces a VM above its budget to the high
mark only, not to the low mark. If the threshold is still exceeded at the end of a hold,
the next hold is twice as long. Once the share is below half of the threshold, the hold
time is reset.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Backoff", "BackoffChange"]

#: Half-life of the sums, and the longest hold.
_HALF_LIFE_S = 10.0
_MAX_HOLD_S = 120.0
#: Fewer evictions than this are not significant.
_MIN_PAGES = 256


@dataclasses.dataclass(frozen=True)
class BackoffChange:
    """A hold that began or ended, and the reason."""

    holding: bool
    reason: str


class Backoff:
    """The back-off of one VM.

    :param threshold: share of the evicted pages; 0 disables the back-off
    :param hold_s: duration of the first hold
    """

    def __init__(self, threshold: float, hold_s: float) -> None:
        self.threshold, self.first_hold_s = threshold, hold_s
        self.holding = False
        self._hold_s = hold_s
        self._until_s = self._at_s = 0.0
        self._evicted = self._refaulted = 0.0

    @property
    def share(self) -> float:
        """The share of the evicted pages that refaulted."""
        return self._refaulted / self._evicted if self._evicted >= 1 else 0.0

    def note(self, evicted: int, refaulted: int, now_s: float) -> BackoffChange | None:
        """Count evictions and refaults since the previous call; return a change, if any.

        :param now_s: of a monotonic clock
        """
        decay = 0.5 ** (max(0.0, now_s - self._at_s) / _HALF_LIFE_S)
        self._at_s = now_s
        self._evicted = self._evicted * decay + evicted
        self._refaulted = self._refaulted * decay + refaulted
        if not self.threshold:
            return self._end("back-off was disabled") if self.holding else None
        exceeded = self.share > self.threshold and self._evicted >= _MIN_PAGES
        if self.holding:
            return None if now_s < self._until_s else self._review(exceeded, now_s)
        if exceeded:
            return self._begin(now_s)
        if self.share < self.threshold / 2:
            self._hold_s = self.first_hold_s
        return None

    def _begin(self, now_s: float) -> BackoffChange:
        self.holding, self._until_s = True, now_s + self._hold_s
        change = BackoffChange(
            True,
            f"{self.share:.0%} of the evicted pages refaulted, more than {self.threshold:.0%}: "
            f"holding back for {self._hold_s:.3g} s",
        )
        self._hold_s = min(self._hold_s * 2, _MAX_HOLD_S)
        return change

    def _review(self, exceeded: bool, now_s: float) -> BackoffChange:
        if exceeded:
            return self._begin(now_s)
        return self._end(f"{self.share:.0%} of the evicted pages refaulted")

    def _end(self, why: str) -> BackoffChange:
        self.holding = False
        return BackoffChange(False, f"{why}: resuming")
