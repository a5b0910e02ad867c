"""Controllers: how many pages of one VM to evict now, and for what reason.

Each controller is asked once per pass with the facts of that pass and returns a
:class:`Demand`. The largest demand is followed, since an eviction serves all of them.
The ``required`` part of a demand is evicted even while the daemon holds back (see
:mod:`.backoff`); the demand of a proactive controller requires nothing.

============================ =========================================================
controller                   demand
============================ =========================================================
:class:`BudgetController`    above the high mark: down to the low mark; of this the
                             pages above the high mark are required
:class:`StallController`     ``step * (1 - stall / target)`` of resident memory per
                             minute, nothing at or above the target (after transparent
                             memory offloading, 2022)
:class:`PromotionController` a share of resident memory per minute that grows by a tenth
                             each pass while the refaults of the working set are below
                             the target, and halves when they are above it (the
                             objective of software-defined far memory, 2019)
============================ =========================================================
"""

from __future__ import annotations

import dataclasses

from kvmhost.reclaim.account.decisions import EvictReason
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.units import PAGE_BYTES

__all__ = [
    "BudgetController",
    "Demand",
    "PassFacts",
    "PromotionController",
    "StallController",
    "largest",
]

#: Half-life of the promotion rate; initial and smallest step of PromotionController.
_RATE_HALF_LIFE_S = 30.0
_FIRST_STEP, _LEAST_STEP = 0.1, 0.001


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """Measurements of one pass, in pages.

    :param elapsed_s: since the previous pass
    :param working: touched in the protected windows
    :param refaulted: refaults since the previous pass of pages that the daemon had evicted
    :param stall: share of time that tasks or vCPUs waited for memory, 0 to 1
    """

    elapsed_s: float
    resident: int
    working: int
    refaulted: int
    stall: float


@dataclasses.dataclass(frozen=True)
class Demand:
    """Pages to evict; ``required`` of them even while holding back."""

    pages: int
    required: int
    why: EvictReason
    text: str


def largest(demands: list[Demand]) -> Demand:
    """Return the largest demand, with the largest required part of all."""
    if not demands:
        return Demand(0, 0, EvictReason.NONE, "")
    top = max(demands, key=lambda demand: (demand.pages, demand.required))
    return dataclasses.replace(top, required=max(demand.required for demand in demands))


class BudgetController:
    """Keeps a VM between the marks of its budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def demand(self, facts: PassFacts) -> Demand:
        """Demand the pages above the low mark once the high mark is exceeded."""
        budget, resident = self.budget, facts.resident
        pages = budget.excess_pages(resident)
        required = max(0, min(pages, resident - budget.high_bytes // PAGE_BYTES))
        text = (
            f"resident {resident * PAGE_BYTES >> 20} MiB is above the high mark of "
            f"{budget.high_bytes >> 20} MiB, down to {budget.low_bytes >> 20} MiB"
        )
        return Demand(pages, required, EvictReason.BUDGET, text)


class _Steps:
    """Converts a share of resident memory per minute to whole pages per pass."""

    def __init__(self) -> None:
        self._rest = 0.0

    def pages(self, share_per_min: float, facts: PassFacts) -> int:
        """Return the pages of this pass; fractions carry over to the next pass."""
        # After a late pass (if the host was suspended, for example), count at most a minute.
        minutes = min(max(facts.elapsed_s, 0.0), 60.0) / 60
        self._rest += share_per_min * facts.resident * minutes
        pages = int(self._rest)
        self._rest -= pages
        return pages


class StallController:
    """Evicts proactively up to a target of stall time.

    :param step: share of resident memory evicted per minute while nothing stalls
    """

    def __init__(self, target: float, step: float) -> None:
        self.target, self.step = target, step
        #: Part of the step taken in the last pass, 0 to 1.
        self.drive = 0.0
        self._steps = _Steps()

    def demand(self, facts: PassFacts) -> Demand:
        """Demand a step that shrinks as the stall approaches the target."""
        self.drive = max(0.0, 1 - facts.stall / self.target)
        pages = self._steps.pages(self.step * self.drive, facts)
        text = (
            f"stall {facts.stall:.3%} of a target of {self.target:.3%}: {self.drive:.0%} of a step"
        )
        return Demand(pages, 0, EvictReason.PSI, text)


class PromotionController:
    """Evicts proactively up to a target promotion rate.

    The promotion rate is the share of the working set that refaults per minute.

    :param step: largest share of resident memory evicted per minute
    """

    def __init__(self, target: float, step: float) -> None:
        self.target, self.step = target, step
        self.share = _FIRST_STEP
        #: Promotions per minute as a share of the working set.
        self.rate = 0.0
        self._steps = _Steps()

    def demand(self, facts: PassFacts) -> Demand:
        """Adapt the step to the promotion rate, and demand it."""
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
            f"{self.rate:.3%} of the working set refaulted per minute, target {self.target:.3%}: "
            f"step at {self.share:.1%}"
        )
        return Demand(pages, 0, EvictReason.PROMOTION, text)
