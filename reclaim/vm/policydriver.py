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

from kvmhost.bitmap import Words, YoungBitmap, pack
from kvmhost.control.client import Client
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy import registry
from kvmhost.reclaim.policy.base import Gfns, Mask, Policy
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.settings.options import VmOptions
from kvmhost.reclaim.vm.losscontrol import LossControl
from kvmhost.reclaim.vm.pages import ResidencyChanges
from kvmhost.vm import Harvest

__all__ = ["VIEW", "PolicyDriver", "make_policy"]

#: The daemon's view of a VM.
VIEW = "reclaimd"


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
    return registry.create(options.policy, n_pages, given)


class PolicyDriver:
    """Harvests one VM on behalf of a policy, and asks the policy for victims.

    :param loss: chooses what harvests clear
    """

    def __init__(self, client: Client, n_pages: int, policy: Policy, loss: LossControl) -> None:
        self._client, self.n_pages, self.policy = client, n_pages, policy
        self._loss = loss
        self._tracker = "auto"
        self.probed_pages = 0

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
        found = self._client.harvest(
            0,
            self.n_pages,
            tracker=tracker,
            clear=True,
            rearm="young",
            mask=mask,
            view=VIEW,
            max_age_s=max_age_s,
        )
        self._loss.note(found, mask)
        if plan.pages is not None:
            # Pages outside the plan were reported but not cleared: a later harvest reports them.
            young = dataclasses.replace(found.young, words=found.young.words & plan.pages)
            found = dataclasses.replace(found, young=young)
        return found

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
            0, self.n_pages, tracker=self._tracker, clear=True, rearm="young", mask=pages, view=VIEW
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
