"""Keeps the guest of one VM within the bound on its lost time: measures, chooses, says so.

Before each harvest, the counters of the VM tell what re-arming cost since the last one, and
:class:`~kvmhost.reclaim.loss.bound.LossBound` chooses what this one clears. The cost of one fault
is measured by the VM itself, after the first harvest, once a minute, and when another tracker is
in use.
"""

from __future__ import annotations

import math
import time

from kvmhost.bitmap import Words
from kvmhost.control.client import Client
from kvmhost.control.schema import Counters, RearmCost
from kvmhost.errors import CapabilityError, ControlError, StateError
from kvmhost.reclaim.loss.bound import LossBound, Spent
from kvmhost.reclaim.loss.clearing import ALL, PageClasses
from kvmhost.reclaim.settings.options import VmOptions
from kvmhost.vm import Harvest

__all__ = ["LossControl"]

#: How often the VM is asked for the cost of a fault.
_COST_S = 60.0
#: A guest that runs for less than this share of the time is not bounded more tightly: what
#: it loses then is too little to be noticed.
_LEAST_BUSY = 1 / 20
#: A share or an interval that changed by less is not worth a message.
_TELLING = 1.9


class LossControl:
    """What harvests of one VM clear, and why.

    :ivar cost: of a fault, as measured; None until it is known
    :ivar problem: why the cost is not known; else empty
    """

    def __init__(self, client: Client, n_pages: int, max_loss: float) -> None:
        self._client = client
        self.bound, self.pages = LossBound(max_loss), PageClasses(n_pages)
        self.clearing = ALL
        self.cost: RearmCost | None = None
        self.problem = ""
        self._asked_s, self._has_view = -math.inf, False
        self._told = ALL

    @property
    def loss(self) -> float | None:
        """Share of the vCPUs' time that re-arming cost in the last passes; None: not known."""
        return self.bound.loss if self.cost is not None else None

    def begin_pass(
        self,
        before: Counters | None,
        now: Counters,
        elapsed_s: float,
        n_resident: int,
        options: VmOptions,
    ) -> None:
        """Measure the time since the last pass, and choose what this one's harvest clears.

        :param before: the counters of the last pass; None: there was none
        """
        self.bound.max_loss = options.max_loss
        chosen = ALL
        if before is not None and self.cost is not None:
            chosen = self.bound.choose(
                _spent(before, now, elapsed_s), self.cost.fault_ns, n_resident
            )
        self.clearing = chosen.at_most(options.fraction)

    def mask(self) -> Words | None:
        """Return the pages that the harvest may clear; None: all."""
        return self.pages.mask(self.clearing)

    def note(self, found: Harvest, mask: Words | None, scanned: Words | None = None) -> None:
        """Take what the harvest found.

        :param mask: the pages that it cleared where they were young; None: all
        :param scanned: the pages that it looked at; None: all
        """
        facts = self.pages.note(found.young.words, mask, scanned)
        if self._has_view:
            self.bound.note(facts)
        # The first harvest opens the view: it clears all pages and reports none.
        self._has_view = True
        self._update_cost(found.young.provenance.tracker)

    def news(self, interval_s: float) -> str:
        """Return what changed about the choice, as text; empty if nothing worth saying did."""
        old, new = self._told, self.clearing
        pairs = (
            (old.steady, new.steady),
            (old.changing, new.changing),
            (old.stretch, new.stretch),
        )
        if all(a < b * _TELLING and b < a * _TELLING for a, b in pairs):
            return ""
        self._told = new
        if new == ALL:
            return "clears all young pages at each harvest"
        return self.describe(interval_s)

    def describe(self, interval_s: float) -> str:
        """Return the choice, its reason, and what it costs in staleness, as text."""
        chosen = self.clearing
        text = (
            f"clears {_part(chosen.steady)} steady and {_part(chosen.changing)} other young pages"
        )
        if chosen.stretch > 1:
            text += f", every {chosen.stretch * interval_s:.3g} s"
        lost = "" if self.loss is None else f" of {100 * self.loss:.1f} %"
        text += f" (loss{lost}, at most {100 * self.bound.max_loss:.3g} %)"
        stale_s = self.stale_s(interval_s)
        return f"{text}: an unused page may look used for up to {stale_s:.3g} s"

    def stale_s(self, interval_s: float) -> float:
        """Return the time for which a page that is no longer touched may look young."""
        return self.clearing.stale_passes * interval_s

    def _update_cost(self, tracker: str) -> None:
        """Ask the VM for the cost of a fault, if what is known is old or of another tracker."""
        now_s = time.monotonic()
        known = self.cost.tracker if self.cost is not None else ""
        changed = known not in ("", "mixed", tracker) and tracker != "mixed"
        if not changed and now_s - self._asked_s < _COST_S:
            return
        self._asked_s = now_s
        if changed:
            self.bound.forget()
        try:
            self.cost, self.problem = self._client.rearm_cost(), ""
        except (CapabilityError, ControlError, StateError) as error:
            # An older VM cannot tell, and some hosts cannot run a second VM.
            self.cost, self.problem = None, str(error)


def _spent(before: Counters, now: Counters, elapsed_s: float) -> Spent:
    vcpu_s = max(now.machine.vcpu_s - before.machine.vcpu_s, _LEAST_BUSY * elapsed_s)
    return Spent(vcpu_s * 1e9, max(0, now.harvest.n_retouched - before.harvest.n_retouched))


def _part(share: float) -> str:
    return "all" if share >= 1 else f"1/{1 / share:.0f} of the"
