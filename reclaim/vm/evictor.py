"""What the daemon does to one VM, each time with its reason taken down.

Every page that goes, or that the VM refuses to let go, passes through here; so do the
pages that a dry run would have sent away.
"""

from __future__ import annotations

import collections
import threading

import numpy as np
import numpy.typing as npt

from kvmhost.control.client import Client
from kvmhost.reclaim.account.decisions import Kind, Why
from kvmhost.reclaim.account.history import PageHistory
from kvmhost.reclaim.context import Common
from kvmhost.reclaim.policy.base import Gfns
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.vm.pages import VmView
from kvmhost.reclaim.vm.policydriver import Judge
from kvmhost.reclaim.vm.totals import Totals

__all__ = ["BATCH_PAGES", "Hands"]

#: Evictions a request: short enough for a stop to be prompt, at some 20 us a page.
BATCH_PAGES = 2048
_PAGE_BYTES = 4096


class Hands:
    """Acts on one VM.

    :param history: None: none is kept
    """

    def __init__(
        self,
        client: Client,
        common: Common,
        view: VmView,
        judge: Judge,
        history: PageHistory | None,
        totals: Totals,
    ) -> None:
        self._client, self._common = client, common
        self._view, self._judge, self._history, self._totals = view, judge, history, totals
        self._dry_run = common.config.daemon.dry_run

    def evict(
        self,
        victims: Gfns,
        why: Why,
        text: str,
        *,
        passes: int,
        stop: threading.Event | None = None,
    ) -> dict[str, int]:
        """Evict in batches, best victims first; return pages by outcome.

        :param stop: once set, no further batch goes
        """
        total: collections.Counter[str] = collections.Counter()
        for first in range(0, victims.size, BATCH_PAGES):
            if stop is not None and stop.is_set():
                break
            batch = victims[first : first + BATCH_PAGES]
            outcomes = self._send_away(batch, why, text, passes)
            total.update(outcomes)
            if outcomes.get("full"):
                break
        return dict(total)

    def _send_away(self, batch: Gfns, why: Why, text: str, passes: int) -> dict[str, int]:
        """Do one batch, or in a dry run take it down as if it had been done."""
        if self._dry_run:
            outcomes, each = {"done": int(batch.size)}, np.zeros(batch.size, dtype=np.uint8)
        else:
            report = self._client.evict(batch, each=True)
            outcomes = report.outcomes
            each = np.frombuffer(report.each or b"", dtype=np.uint8)
        went = batch[each == 0]
        self._view.note_evicted(went, dry=self._dry_run)
        self._judge.evicted(went)
        self._remember(batch, each, why)
        self._totals.note_outcomes(why, outcomes)
        self._common.decisions.add(
            Kind.WOULD_EVICT if self._dry_run else Kind.EVICT,
            text,
            vm=self._client.vm,
            passes=passes,
            why=why,
            pages=int(went.size),
            gfns=went,
        )
        self._say_refused(batch, each, outcomes, passes)
        return outcomes

    def _remember(self, batch: Gfns, each: npt.NDArray[np.uint8], why: Why) -> None:
        if self._history is None:
            return
        if self._dry_run:
            self._history.would_evict(batch, why)
        else:
            self._history.evicted(batch, each, why)

    def _say_refused(
        self, batch: Gfns, each: npt.NDArray[np.uint8], outcomes: dict[str, int], passes: int
    ) -> None:
        refused = batch[each != 0]
        if refused.size:
            causes = ", ".join(
                f"{name} {n}" for name, n in outcomes.items() if n and name != "done"
            )
            self._common.decisions.add(
                Kind.SPARE,
                f"the VM kept them: {causes}",
                vm=self._client.vm,
                passes=passes,
                pages=int(refused.size),
                gfns=refused,
            )

    def force(self, budget: Budget, passes: int) -> int:
        """Have the VM go down to its budget by its own choice; return how many pages went."""
        pages = self._client.shrink(budget.max_bytes)
        self._common.rate.charge(pages)
        if pages:
            self._totals.evicted[Why.FORCED] += pages
            self._common.decisions.add(
                Kind.FORCE,
                f"down to {budget.max_bytes >> 20} MiB: {Why.FORCED.text}",
                vm=self._client.vm,
                passes=passes,
                why=Why.FORCED,
                pages=pages,
            )
        return pages

    def name_victims(self, n: int) -> int:
        """Tell the VM's fault handler which pages go first at the limit."""
        victims = self._judge.victims(n, self._view.candidates, probe=False)
        self._client.set_victims(victims)
        return int(victims.size)
