"""How many pages of one VM a pass evicts: demands, back-off and rate limit combined."""

from __future__ import annotations

import dataclasses

from kvmhost.control.schema import Counters
from kvmhost.reclaim.account.decisions import SpareCause
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.pressure.backoff import Backoff, BackoffChange
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.pressure.controllers import (
    BudgetController,
    Demand,
    PassFacts,
    PromotionController,
    StallController,
    largest,
)

__all__ = ["PassTarget", "ReclaimTarget", "stalled_ns"]


@dataclasses.dataclass(frozen=True)
class PassTarget:
    """How many pages a pass evicts.

    :param demand: the largest demand of the controllers
    :param pages: how much of it the pass evicts
    :param cause: why the pass evicts less than the demand; None if it does not
    :param limited_by: the same in words, with figures
    """

    demand: Demand
    pages: int
    cause: SpareCause | None = None
    limited_by: str = ""


class ReclaimTarget:
    """Computes the target of each pass over one VM."""

    def __init__(self, vm: str, context: DaemonContext) -> None:
        self._vm, self._context = vm, context
        interval_s = context.config.daemon.interval
        self.backoff = Backoff(context.config.pressure.backoff, max(2.0, 5 * interval_s))
        self.stall_controller: StallController | None = None
        self.promotion_controller: PromotionController | None = None
        self._follow_options()

    def note(self, evicted: int, refaulted_own: int, now_s: float) -> BackoffChange | None:
        """Update the back-off with the last pass's evictions and the refaults since."""
        self.backoff.threshold = self._context.config.pressure.backoff
        return self.backoff.note(evicted, refaulted_own, now_s)

    def decide(self, facts: PassFacts, budget: Budget | None) -> PassTarget:
        """Return the target of one pass."""
        demand = largest([each for each in self._demands(facts, budget) if each.pages > 0])
        pages, limited_by = demand.pages, ""
        cause = None
        if self.backoff.holding and demand.required < pages:
            pages, limited_by = demand.required, "holding back"
            cause = SpareCause.HOLDING
            if pages:
                why = demand.why.name.lower() if demand.why else "demand"
                limited_by += f", but evicting {pages} pages that the {why} makes mandatory"
        granted = self._context.rate.take(pages)
        if granted < pages:
            limited_by = f"the limit of {self._context.rate.per_s:.0f} pages per second"
            cause = SpareCause.RATE_LIMIT
        return PassTarget(demand, granted, cause, limited_by)

    def _demands(self, facts: PassFacts, budget: Budget | None) -> list[Demand]:
        self._follow_options()
        demands = [BudgetController(budget).demand(facts)] if budget is not None else []
        from_host = self._context.host.demand(self._vm)
        if from_host is not None:
            demands.append(from_host)
        if self.stall_controller is not None:
            demands.append(self.stall_controller.demand(facts))
        if self.promotion_controller is not None:
            demands.append(self.promotion_controller.demand(facts))
        return demands

    def _follow_options(self) -> None:
        """Create, update or remove the proactive controllers."""
        pressure = self._context.config.pressure
        step = pressure.proactive_step
        if not pressure.psi_target:
            self.stall_controller = None
        elif self.stall_controller is None:
            self.stall_controller = StallController(pressure.psi_target, step)
        else:
            self.stall_controller.target, self.stall_controller.step = pressure.psi_target, step
        if not pressure.promotion_target:
            self.promotion_controller = None
        elif self.promotion_controller is None:
            self.promotion_controller = PromotionController(pressure.promotion_target, step)
        else:
            self.promotion_controller.target = pressure.promotion_target
            self.promotion_controller.step = step


def stalled_ns(counters: Counters | None) -> int:
    """Return the total time of faults in the VM's handler, with evictions at the limit.

    The time that a fault waits in the queue of the handler is not included, so the value
    is too small while several vCPUs fault at once.
    """
    pager = counters.pager if counters is not None else None
    return int((pager or {}).get("latency_sum_ns", 0))
