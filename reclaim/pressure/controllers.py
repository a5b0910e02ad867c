"""Controllers: how many pages of one VM should go now, and for what reason.

Each is asked once a pass with the facts of that pass, and answers with a
:class:`Want`. The largest want is followed: an eviction serves all of them. A want has
a part that *must* go, also while the daemon holds back (see :mod:`.backoff`); what
goes ahead of need never must.

======================= ==============================================================
controller              wants
======================= ==============================================================
:class:`ByBudget`       above the high mark: down to the low mark; must: down to high
:class:`ByStall`        ``step * (1 - stall / target)`` of resident memory a minute, and
                        nothing at or above the target (after transparent memory
                        offloading, 2022)
:class:`ByPromotion`    a share of resident memory a minute that grows by a tenth each
                        pass while fewer of the working set's pages come back than the
                        target allows, and halves when more do (the objective of
                        software-defined far memory, 2019)
======================= ==============================================================
"""

from __future__ import annotations

import dataclasses

from kvmhost.reclaim.account.decisions import Why
from kvmhost.reclaim.pressure.budget import Budget

__all__ = ["ByBudget", "ByPromotion", "ByStall", "Facts", "Want", "largest"]

_PAGE_BYTES = 4096
#: Half-life of the rate of promotions, and where the step of ByPromotion begins and ends.
_RATE_HALF_LIFE_S = 30.0
_FIRST_STEP, _LEAST_STEP = 0.1, 0.001


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a pass found, in pages.

    :param elapsed_s: since the pass before
    :param working: touched in the protected windows
    :param refaulted: came back since the pass before, of what the daemon had evicted
    :param stall: share of time that somebody waited for memory, 0 to 1
    """

    elapsed_s: float
    resident: int
    working: int
    refaulted: int
    stall: float


@dataclasses.dataclass(frozen=True)
class Want:
    """Pages that should go; ``must`` of them in any case."""

    pages: int
    must: int
    why: Why
    text: str


def largest(wants: list[Want]) -> Want:
    """Return what follows from several: most pages, most of those that must."""
    if not wants:
        return Want(0, 0, Why.NONE, "")
    top = max(wants, key=lambda want: (want.pages, want.must))
    return dataclasses.replace(top, must=max(want.must for want in wants))


class ByBudget:
    """Keeps a VM between its marks."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def want(self, facts: Facts) -> Want:
        """Return what is above the low mark, once the high mark is exceeded."""
        budget, resident = self.budget, facts.resident
        pages = budget.excess_pages(resident)
        must = max(0, min(pages, resident - budget.high_bytes // _PAGE_BYTES))
        text = (
            f"resident {resident * _PAGE_BYTES >> 20} MiB is above the high mark of "
            f"{budget.high_bytes >> 20} MiB, down to {budget.low_bytes >> 20} MiB"
        )
        return Want(pages, must, Why.BUDGET, text)


class _Steps:
    """Turns a share of resident memory a minute into whole pages a pass."""

    def __init__(self) -> None:
        self._rest = 0.0

    def pages(self, share_per_min: float, facts: Facts) -> int:
        """Return the pages of this pass; fractions are kept for the next one."""
        # A pass that comes late, as after a suspended host, makes up for a minute at most.
        minutes = min(max(facts.elapsed_s, 0.0), 60.0) / 60
        self._rest += share_per_min * facts.resident * minutes
        pages = int(self._rest)
        self._rest -= pages
        return pages


class ByStall:
    """Works towards a target of stall time.

    :param step: share of resident memory that goes in a minute where nothing stalls
    """

    def __init__(self, target: float, step: float) -> None:
        self.target, self.step = target, step
        #: Of the last pass: what of the step was taken, 0 to 1.
        self.drive = 0.0
        self._steps = _Steps()

    def want(self, facts: Facts) -> Want:
        """Return the step, the smaller the nearer the stall is to the target."""
        self.drive = max(0.0, 1 - facts.stall / self.target)
        pages = self._steps.pages(self.step * self.drive, facts)
        text = (
            f"stall {facts.stall:.3%} of a target of {self.target:.3%}: {self.drive:.0%} of a step"
        )
        return Want(pages, 0, Why.PSI, text)


class ByPromotion:
    """Works towards a target of promotions: pages that come back, a minute, of the working set.

    :param step: the most that goes in a minute, as a share of resident memory
    """

    def __init__(self, target: float, step: float) -> None:
        self.target, self.step = target, step
        self.share = _FIRST_STEP
        #: Promotions a minute as a share of the working set.
        self.rate = 0.0
        self._steps = _Steps()

    def want(self, facts: Facts) -> Want:
        """Return the step, after it was made larger or smaller."""
        if facts.elapsed_s > 0:
            now = facts.refaulted / max(facts.working, 1) * 60 / facts.elapsed_s
            keep = 0.5 ** (facts.elapsed_s / _RATE_HALF_LIFE_S)
            self.rate = self.rate * keep + now * (1 - keep)
        if self.rate > self.target:
            self.share = max(_LEAST_STEP, self.share / 2)
            pages = 0
        else:
            self.share = min(1.0, self.share * 1.1)
            pages = self._steps.pages(self.step * self.share, facts)
        text = (
            f"{self.rate:.3%} of the working set came back a minute, target {self.target:.3%}: "
            f"step at {self.share:.1%}"
        )
        return Want(pages, 0, Why.PROMOTION, text)
