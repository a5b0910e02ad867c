"""Evict pages of one VM, and record the reason of each eviction.

All evictions of the daemon go through this module, including evictions that the VM
refuses and those that a dry run only simulates.
"""

from __future__ import annotations

import collections
import logging
import threading

import numpy as np
import numpy.typing as npt

from kvmhost.control.client import Client
from kvmhost.reclaim.account.decisions import DecisionKind, EvictReason
from kvmhost.reclaim.account.history import PageHistory
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.policy.base import Gfns
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.vm.pages import VmPages
from kvmhost.reclaim.vm.policydriver import PolicyDriver
from kvmhost.reclaim.vm.totals import Totals

__all__ = ["BATCH_PAGES", "Evictor"]

log = logging.getLogger("reclaim")

#: Evictions per request. At about 20 us per page, a stop takes effect within 50 ms.
BATCH_PAGES = 2048


class Evictor:
    """Evicts pages of one VM.

    :param history: None if no page history is kept
    """

    def __init__(
        self,
        client: Client,
        context: DaemonContext,
        pages: VmPages,
        driver: PolicyDriver,
        history: PageHistory | None,
        totals: Totals,
    ) -> None:
        self._client, self._context = client, context
        self._pages, self._driver, self._history, self._totals = pages, driver, history, totals
        self._dry_run = context.config.daemon.dry_run
        #: Pages above the budget that the VM could not evict, at the last shrink.
        self.over_pages = 0

    def evict(
        self,
        victims: Gfns,
        why: EvictReason,
        text: str,
        *,
        passes: int,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Evict in batches, in the order of ``victims``; return pages by outcome.

        :param stop: once set, no further batch is evicted
        """
        total: collections.Counter[str] = collections.Counter()
        for first in range(0, victims.size, BATCH_PAGES):
            if stop is not None and stop.is_set():
                break
            batch = victims[first : first + BATCH_PAGES]
            outcomes = self._evict_batch(batch, why, text, passes)
            total.update(outcomes)
            if outcomes.get("full"):
                break
        return dict(total)

    def _evict_batch(self, batch: Gfns, why: EvictReason, text: str, passes: int) -> dict[str, int]:
        """Evict one batch; a dry run only records it."""
        if self._dry_run:
            outcomes, each = {"done": int(batch.size)}, np.zeros(batch.size, dtype=np.uint8)
        else:
            report = self._client.evict(batch, each=True)
            outcomes = report.outcomes
            each = np.frombuffer(report.each or b"", dtype=np.uint8)
        evicted = batch[each == 0]
        self._pages.note_evicted(evicted, dry=self._dry_run)
        self._driver.evicted(evicted)
        self._update_history(batch, each, why)
        self._totals.note_outcomes(why, outcomes)
        self._context.decisions.add(
            DecisionKind.WOULD_EVICT if self._dry_run else DecisionKind.EVICT,
            text,
            vm=self._client.vm,
            passes=passes,
            why=why,
            pages=int(evicted.size),
            gfns=evicted,
        )
        self._record_refused(batch, each, outcomes, passes)
        return outcomes

    def _update_history(self, batch: Gfns, each: npt.NDArray[np.uint8], why: EvictReason) -> None:
        if self._history is None:
            return
        if self._dry_run:
            self._history.would_evict(batch, why)
        else:
            self._history.evicted(batch, each, why)

    def _record_refused(
        self, batch: Gfns, each: npt.NDArray[np.uint8], outcomes: dict[str, int], passes: int
    ) -> None:
        refused = batch[each != 0]
        if refused.size:
            causes = ", ".join(
                f"{name} {n}" for name, n in outcomes.items() if n and name != "done"
            )
            self._context.decisions.add(
                DecisionKind.SPARE,
                f"refused by the VM: {causes}",
                vm=self._client.vm,
                passes=passes,
                pages=int(refused.size),
                gfns=refused,
            )

    def shrink(self, budget: Budget, passes: int) -> int:
        """Make the VM shrink to its budget, choosing pages itself; return pages evicted."""
        state = self._client.shrink(budget.max_bytes)
        pages = state.evicted_pages
        self._note_over(state.over_pages, budget)
        self._context.rate.charge(pages)
        if pages:
            self._totals.evicted[EvictReason.FORCED] += pages
            self._context.decisions.add(
                DecisionKind.FORCE,
                f"shrunk to {budget.max_bytes >> 20} MiB: {EvictReason.FORCED.text}",
                vm=self._client.vm,
                passes=passes,
                why=EvictReason.FORCED,
                pages=pages,
            )
        return pages

    def _note_over(self, pages: int, budget: Budget) -> None:
        """Log that the VM cannot get under its budget, once until it can."""
        if pages and not self.over_pages:
            log.warning(
                "%s: %d pages above the budget of %d MiB: nothing else can be evicted",
                self._client.vm,
                pages,
                budget.max_bytes >> 20,
            )
        self.over_pages = pages

    def set_victims(self, n: int) -> int:
        """Send the VM's fault handler the pages to evict first at the limit."""
        victims = self._driver.victims(n, self._pages.candidates, probe=False)
        self._client.set_victims(victims)
        return int(victims.size)
