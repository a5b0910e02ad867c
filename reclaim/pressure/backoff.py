"""Back-off: where what was evicted comes back, evicting more only hurts.

Counted over the last half minute or so (decayed sums): pages that this daemon evicted
of its own will, and how many of those came back. Above the threshold the daemon holds
back: nothing goes ahead of need, and a budget's excess goes down to the high mark only,
not to the low one. Each time the threshold is still exceeded after that, the next hold
is twice as long; once the share is below half of the threshold, all is forgotten.
"""

from __future__ import annotations

import dataclasses

__all__ = ["Backoff", "Turn"]

#: Half-life of the sums, and the bounds of a hold.
_HALF_LIFE_S = 10.0
_MAX_HOLD_S = 120.0
#: Fewer evictions than this are no evidence.
_MIN_PAGES = 256


@dataclasses.dataclass(frozen=True)
class Turn:
    """That holding back began or ended, and why."""

    holding: bool
    reason: str


class Backoff:
    """The back-off of one VM.

    :param threshold: share of what was evicted; 0: never hold back
    :param hold_s: how long the first hold takes
    """

    def __init__(self, threshold: float, hold_s: float) -> None:
        self.threshold, self.first_hold_s = threshold, hold_s
        self.holding = False
        self._hold_s = hold_s
        self._until_s = self._at_s = 0.0
        self._evicted = self._refaulted = 0.0

    @property
    def share(self) -> float:
        """The share of what was evicted that came back."""
        return self._refaulted / self._evicted if self._evicted >= 1 else 0.0

    def note(self, evicted: int, refaulted: int, now_s: float) -> Turn | None:
        """Count what happened since the call before; return a change, if there is one.

        :param now_s: of a monotonic clock
        """
        decay = 0.5 ** (max(0.0, now_s - self._at_s) / _HALF_LIFE_S)
        self._at_s = now_s
        self._evicted = self._evicted * decay + evicted
        self._refaulted = self._refaulted * decay + refaulted
        if not self.threshold:
            return self._end("it was switched off") if self.holding else None
        hurts = self.share > self.threshold and self._evicted >= _MIN_PAGES
        if self.holding:
            return None if now_s < self._until_s else self._review(hurts, now_s)
        if hurts:
            return self._begin(now_s)
        if self.share < self.threshold / 2:
            self._hold_s = self.first_hold_s
        return None

    def _begin(self, now_s: float) -> Turn:
        self.holding, self._until_s = True, now_s + self._hold_s
        turn = Turn(
            True,
            f"{self.share:.0%} of the evicted pages came back, more than {self.threshold:.0%}: "
            f"holding back for {self._hold_s:.3g} s",
        )
        self._hold_s = min(self._hold_s * 2, _MAX_HOLD_S)
        return turn

    def _review(self, hurts: bool, now_s: float) -> Turn:
        if hurts:
            return self._begin(now_s)
        return self._end(f"{self.share:.0%} of the evicted pages came back")

    def _end(self, why: str) -> Turn:
        self.holding = False
        return Turn(False, f"{why}: going on")
