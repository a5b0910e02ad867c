"""Evict pages that were cold for N harvests, where N follows from a promotion rate.

As in software-defined far memory (Lagar-Cavilla and others, ASPLOS 2019). The policy
keeps two histograms over age, in harvests: the number of pages of that age, and the
number of touches in the current minute that hit a page of that age. Such a touch would
have been a promotion (a fault) under any N up to that age. At the end of each minute the
policy determines the lowest N under which promotions would have stayed within the
target, a share of the working set per minute. It then uses a high percentile of the
values of the last hour, so that one quiet minute has little effect, but never less than
the value of the last minute, so that a burst takes effect immediately.

The age of an evicted page continues to increase, so the histogram also shows promotions
of evicted pages when N was too low.
"""

from __future__ import annotations

import collections
import math

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, unpack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import (
    Everything,
    Gfns,
    HarvestPlan,
    Mask,
    Probe,
    check_mask,
    check_words,
)

__all__ = ["MAX_AGE", "AgePolicy"]

#: The largest age that is counted separately; older pages have this age.
MAX_AGE = 255
_MINUTE_NS = 60_000_000_000
_MINUTES_KEPT = 60

Histogram = npt.NDArray[np.int64]


class AgePolicy:
    """Tracks the age of the pages ``[0, n_pages)`` in harvests.

    :param target_percent: promotions per minute, as a share of the working set
    :param percentile: percentile of the last hour's thresholds to use
    :param first_harvests: the threshold during the first minute
    :param min_harvests: minimum of the threshold
    :raises LayoutError: for values outside their ranges, or no pages
    """

    name = "age"

    def __init__(
        self,
        n_pages: int,
        *,
        target_percent: float = 0.2,
        percentile: float = 98.0,
        first_harvests: int = 120,
        min_harvests: int = 2,
    ) -> None:
        if n_pages <= 0:
            raise LayoutError(f"{n_pages} pages: need one or more")
        if not 0 < target_percent <= 100 or not 0 <= percentile <= 100:
            raise LayoutError(
                f"target of {target_percent} % and percentile {percentile}: need at most 100, "
                "and a target above 0"
            )
        if not 1 <= min_harvests <= first_harvests <= MAX_AGE:
            raise LayoutError(
                f"min_harvests {min_harvests}, first_harvests {first_harvests}: need 1 or more, "
                f"in this order, and at most {MAX_AGE}"
            )
        self.target_percent, self.percentile = target_percent, percentile
        self.min_harvests, self.threshold = min_harvests, first_harvests
        #: Harvests since a page was last young, including while it is evicted.
        self.idle = np.zeros(n_pages, dtype=np.uint8)
        self.promotions: Histogram = np.zeros(MAX_AGE + 1, dtype=np.int64)
        self._minute_start_ns: int | None = None
        self._touched_this_minute: Mask = np.zeros(n_pages, dtype=bool)
        self._best: collections.deque[int] = collections.deque(maxlen=_MINUTES_KEPT)
        self._counts = dict.fromkeys(("refaulted", "evicted", "promotions", "working_set"), 0)

    @property
    def n_pages(self) -> int:
        """Number of pages that the policy covers."""
        return self.idle.size

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Request all pages."""
        return Everything

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Count the pages; the next harvest finds them young and counts promotions."""
        self._counts["refaulted"] += int(gfns.size)

    def age(self, young: Words, now_ns: int) -> None:
        """Count the touched pages by their age, and increment the age of the others.

        :raises LayoutError: if the bitmap has another size
        """
        check_words(young, self.n_pages)
        if self._minute_start_ns is None:
            self._minute_start_ns = now_ns
        touched = unpack(young, self.n_pages)
        self.promotions += np.bincount(self.idle[touched], minlength=MAX_AGE + 1)
        self._touched_this_minute |= touched
        np.add(self.idle, 1, out=self.idle, where=self.idle < MAX_AGE)
        self.idle[touched] = 0
        if now_ns - self._minute_start_ns >= _MINUTE_NS:
            self._end_minute(now_ns - self._minute_start_ns)
            self._minute_start_ns = now_ns

    def cold_ages(self, pages: Mask) -> Histogram:
        """Return the number of pages of each age: shape ``(MAX_AGE + 1,)``."""
        return np.bincount(self.idle[pages], minlength=MAX_AGE + 1)

    def _end_minute(self, took_ns: int) -> None:
        working_set = int(self._touched_this_minute.sum())
        allowed = working_set * self.target_percent / 100 * (took_ns / _MINUTE_NS)
        self._best.append(self._lowest_threshold(allowed))
        # The rank of the percentile is rounded up so that a burst in the hour still counts.
        rank = math.ceil(self.percentile / 100 * len(self._best))
        guarded = sorted(self._best)[max(rank, 1) - 1]
        self.threshold = max(guarded, self._best[-1])
        self._counts["promotions"] = int(self.promotions[self.threshold :].sum())
        self._counts["working_set"] = working_set
        self.promotions[:] = 0
        self._touched_this_minute[:] = False

    def _lowest_threshold(self, allowed: float) -> int:
        """Return the lowest N under which at most ``allowed`` touches were promotions."""
        met = self.promotions[::-1].cumsum()[::-1]
        within = np.flatnonzero(met[self.min_harvests :] <= allowed)
        return self.min_harvests + int(within[0]) if within.size else MAX_AGE

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return up to ``n`` candidates that are cold enough, the coldest first.

        :raises LayoutError: if the mask has another size
        """
        check_mask(candidates, self.n_pages)
        pages = np.flatnonzero(candidates & (self.idle >= self.threshold))
        coldest_first = np.argsort(MAX_AGE - self.idle[pages], kind="stable")
        return pages[coldest_first[: max(n, 0)]]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Count the pages; their age continues to increase."""
        self._counts["evicted"] += int(gfns.size)

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return the pages of each age as a generation, the oldest first; its number is -age."""
        check_mask(pages, self.n_pages)
        ages = self.cold_ages(pages)
        return [(-int(age), int(ages[age])) for age in np.flatnonzero(ages)[::-1]]

    def counters(self) -> dict[str, float]:
        """Return threshold and counts; promotions and working set are of the last minute."""
        return {"threshold_harvests": self.threshold, **self._counts}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return a page's age and the threshold.

        :raises LayoutError: if the gfn is out of range
        """
        if not 0 <= gfn < self.n_pages:
            raise LayoutError(f"gfn {gfn:#x} outside [0, {self.n_pages:#x})")
        return {"idle_harvests": int(self.idle[gfn]), "threshold_harvests": self.threshold}
