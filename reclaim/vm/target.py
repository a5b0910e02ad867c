"""How many pages of one VM go in a pass: what the controllers want, held back and limited."""

from __future__ import annotations

import dataclasses

from kvmhost.control.schema import Counters
from kvmhost.reclaim.context import Common
from kvmhost.reclaim.pressure.backoff import Backoff, Turn
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.pressure.controllers import (
    ByBudget,
    ByPromotion,
    ByStall,
    Facts,
    Want,
    largest,
)

__all__ = ["Ruling", "Steering", "stalled_ns"]


@dataclasses.dataclass(frozen=True)
class Ruling:
    """What a pass is to do.

    :param want: what the controllers came to
    :param pages: how many go, after all
    :param kept: why the others do not; empty: all of them go
    """

    want: Want
    pages: int
    kept: str = ""


class Steering:
    """Decides over one VM, pass by pass."""

    def __init__(self, vm: str, common: Common) -> None:
        self._vm, self._common = vm, common
        interval_s = common.config.daemon.interval
        self.backoff = Backoff(common.config.pressure.backoff, max(2.0, 5 * interval_s))
        self.by_stall: ByStall | None = None
        self.by_promotion: ByPromotion | None = None
        self._follow_options()

    def note(self, evicted: int, regretted: int, now_s: float) -> Turn | None:
        """Take what the pass before did, and what of it came back since."""
        self.backoff.threshold = self._common.config.pressure.backoff
        return self.backoff.note(evicted, regretted, now_s)

    def decide(self, facts: Facts, budget: Budget | None) -> Ruling:
        """Rule over one pass."""
        want = largest([want for want in self._wants(facts, budget) if want.pages > 0])
        pages, kept = want.pages, ""
        if self.backoff.holding and want.must < pages:
            pages, kept = want.must, "holding back"
        granted = self._common.rate.take(pages)
        if granted < pages:
            kept = f"the limit of {self._common.rate.per_s:.0f} pages a second"
        return Ruling(want, granted, kept)

    def _wants(self, facts: Facts, budget: Budget | None) -> list[Want]:
        self._follow_options()
        wants = [ByBudget(budget).want(facts)] if budget is not None else []
        demand = self._common.host.demand(self._vm)
        if demand is not None:
            wants.append(demand)
        if self.by_stall is not None:
            wants.append(self.by_stall.want(facts))
        if self.by_promotion is not None:
            wants.append(self.by_promotion.want(facts))
        return wants

    def _follow_options(self) -> None:
        """Make, change or drop the controllers that work ahead of need."""
        pressure = self._common.config.pressure
        step = pressure.proactive_step
        if not pressure.psi_target:
            self.by_stall = None
        elif self.by_stall is None:
            self.by_stall = ByStall(pressure.psi_target, step)
        else:
            self.by_stall.target, self.by_stall.step = pressure.psi_target, step
        if not pressure.promotion_target:
            self.by_promotion = None
        elif self.by_promotion is None:
            self.by_promotion = ByPromotion(pressure.promotion_target, step)
        else:
            self.by_promotion.target = pressure.promotion_target
            self.by_promotion.step = step


def stalled_ns(counters: Counters | None) -> int:
    """Return how long faults took so far in the VM's handler, evictions at the limit included.

    What a fault waits for the handler to get to it is not in there: under a storm of
    several vCPUs it is too little.
    """
    pager = counters.pager if counters is not None else None
    return int((pager or {}).get("latency_sum_ns", 0))
