"""Drive the policy of one VM: harvest as it plans, and pass it what was found.

No other module of the daemon calls a policy, except to display its state. The driver
also implements the :class:`~kvmhost.reclaim.policy.base.Probe` with which a policy tests
accessed bits between two harvests.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from kvmhost.bitmap import (
    Provenance,
    Words,
    YoungBitmap,
    n_words,
    pack,
    place_words,
    sub_words,
)
from kvmhost.control.client import Client
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy import registry
from kvmhost.reclaim.policy.base import Gfns, Mask, Policy
from kvmhost.reclaim.policy.lru_gen import DAEMON_CAPS, LruGen
from kvmhost.reclaim.policy.lru_gen_filter import TABLE_PAGES, young_a_table
from kvmhost.reclaim.settings.options import VmOptions
from kvmhost.reclaim.vm.losscontrol import LossControl
from kvmhost.reclaim.vm.pages import ResidencyChanges
from kvmhost.vm import Harvest

__all__ = ["PolicyDriver", "make_policy", "planned_parts"]

#: Requests of one harvest.
_MAX_PARTS = 16


def make_policy(n_pages: int, options: VmOptions) -> Policy:
    """Create the policy named by the options.

    :raises LayoutError: if the policy is unknown or does not take these options
    """
    given: dict[str, Any] = dict(options.policy_options)
    takes = registry.options_of(options.policy)
    if "n_generations" in takes:
        given.setdefault("n_generations", options.generations)
    if "seed" in takes:
        given.setdefault("seed", None if options.seed < 0 else options.seed)
    if options.policy == "lru_gen":
        given.setdefault("caps", int(DAEMON_CAPS))
    return registry.create(options.policy, n_pages, given)


def planned_parts(pages: Words, n_pages: int) -> list[tuple[int, int]]:
    """Return ranges ``(gfn_start, n_pages)`` of whole tables that contain all of some pages.

    Each range is one request, so there are at most :data:`_MAX_PARTS`; the smallest gaps
    between ranges are scanned in order to have so few.
    """
    tables = np.flatnonzero(young_a_table(pages, n_pages))
    if not tables.size:
        return []
    gaps = np.diff(tables)
    cuts = np.flatnonzero(gaps > 1)
    if cuts.size >= _MAX_PARTS:
        widest = np.argsort(-gaps[cuts], kind="stable")[: _MAX_PARTS - 1]
        cuts = np.sort(cuts[widest])
    starts = np.concatenate((tables[:1], tables[cuts + 1])) * TABLE_PAGES
    ends = np.minimum((np.concatenate((tables[cuts], tables[-1:])) + 1) * TABLE_PAGES, n_pages)
    return [(int(start), int(end - start)) for start, end in zip(starts, ends, strict=True)]


def _words_of(parts: list[tuple[int, int]], n_pages: int) -> Words:
    """Return the bitmap of some ranges."""
    bits = np.zeros(n_pages, dtype=bool)
    for first, count in parts:
        bits[first : first + count] = True
    return pack(bits)


class PolicyDriver:
    """Harvests one VM on behalf of a policy, and asks the policy for victims.

    :param loss: chooses what harvests clear
    :param view: the daemon's view of the VM
    """

    def __init__(
        self, client: Client, n_pages: int, policy: Policy, loss: LossControl, view: str
    ) -> None:
        self._client, self.n_pages, self.policy = client, n_pages, policy
        self._loss = loss
        self._tracker, self._view = "auto", view
        self.probed_pages = 0
        #: Pages in the ranges of all harvests, probes not included.
        self.scanned_pages = 0

    def harvest(self, tracker: str, full: bool = False, max_age_s: float = 0.0) -> Harvest:
        """Test and clear the pages that the policy plans; re-arm the cleared ones.

        A page that is not cleared because the guest would lose too much is reported as young
        until it is cleared.

        :param max_age_s: the window may end with a sweep of another reader that is not older
        :param full: test and clear all pages, whatever the policy plans and the guest loses
        """
        self._tracker = tracker
        plan = self.policy.plan()
        if full and isinstance(self.policy, LruGen):
            plan = self.policy.full_plan()
        mask = _both(plan.pages, None if full else self._loss.mask())
        if plan.pages is None:
            found = self._harvest_range(0, self.n_pages, mask, max_age_s)
            self._loss.note(found, mask)
            return found
        parts = planned_parts(plan.pages, self.n_pages)
        found = self._harvest_parts(parts, mask, max_age_s)
        if parts:
            self._loss.note(found, mask, _words_of(parts, self.n_pages))
        # Pages outside the plan were reported but not cleared: a later harvest reports them.
        young = dataclasses.replace(found.young, words=found.young.words & plan.pages)
        return dataclasses.replace(found, young=young)

    def _harvest_range(
        self, gfn_start: int, n_pages: int, mask: Words | None, max_age_s: float
    ) -> Harvest:
        """Harvest one range, and clear the pages of a mask in it; None: all."""
        self.scanned_pages += n_pages
        return self._client.harvest(
            gfn_start,
            n_pages,
            tracker=self._tracker,
            clear=True,
            rearm="young",
            mask=mask,
            view=self._view,
            max_age_s=max_age_s,
        )

    def _harvest_parts(
        self, parts: list[tuple[int, int]], mask: Words | None, max_age_s: float
    ) -> Harvest:
        """Harvest some ranges, and no other."""
        words, harvest_ns, rearm_ns = np.zeros(n_words(self.n_pages), np.uint64), 0, 0
        provenance = Provenance()
        for first, n_pages in parts:
            own = None if mask is None else sub_words(mask, self.n_pages, first, n_pages)
            found = self._harvest_range(first, n_pages, own, max_age_s)
            place_words(words, first, found.young.words)
            harvest_ns, rearm_ns = harvest_ns + found.harvest_ns, rearm_ns + found.rearm_ns
            provenance = found.young.provenance
        young = YoungBitmap(0, self.n_pages, words, None, provenance)
        return Harvest(young, harvest_ns, rearm_ns)

    def age(self, young: YoungBitmap, changes: ResidencyChanges) -> None:
        """Pass one window to the policy: evictions, refaults, then young pages."""
        now_ns = time.monotonic_ns()
        if changes.evicted_by_vm.size:
            self.policy.evicted(changes.evicted_by_vm, now_ns)
        became_resident = changes.became_resident
        if became_resident.size:
            self.policy.refaulted(became_resident, now_ns)
        self.policy.age(young.words, now_ns)

    def victims(self, n: int, candidates: Mask, probe: bool = True) -> Gfns:
        """Return up to ``n`` pages to evict, the best first.

        :param probe: let the policy test accessed bits; each test costs a request, so
            policies do this only if their options ask for it
        """
        tester = self if probe and getattr(self.policy, "probes", False) else None
        return self.policy.victims(n, candidates, time.monotonic_ns(), tester)

    def evicted(self, gfns: Gfns) -> None:
        """Tell the policy that pages were evicted."""
        self.policy.evicted(gfns, time.monotonic_ns())

    # -- the Probe protocol ---------------------------------------------------

    def clear_young(self, pages: Words) -> Words:
        """Test and clear pages between two harvests."""
        self.probed_pages += int(np.unpackbits(pages.view(np.uint8)).sum())
        self._loss.pages.note_cleared(pages)
        found = self._client.harvest(
            0,
            self.n_pages,
            tracker=self._tracker,
            clear=True,
            rearm="young",
            mask=pages,
            view=self._view,
        )
        return found.young.words & pages

    def clear_flush_young(self, gfn: int) -> bool:
        """Test and clear one page. Over a control socket this is a batch of one page."""
        if not 0 <= gfn < self.n_pages:
            raise LayoutError(f"gfn {gfn:#x}: memory ends at gfn {self.n_pages:#x}")
        one = np.zeros(self.n_pages, dtype=bool)
        one[gfn] = True
        return bool(self.clear_young(pack(one)).any())


def _both(first: Words | None, second: Words | None) -> Words | None:
    """Return the pages in both masks; None: all pages."""
    if first is None or second is None:
        return second if first is None else first
    return first & second
