"""A policy and one VM's harvests: the only place where the daemon talks to a policy.

It makes the policy that the options name, harvests as that plans, and lends it a probe
that looks at accessed bits between two harvests.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from kvmhost.bitmap import Words, YoungBitmap, pack
from kvmhost.control.client import Client
from kvmhost.control.schema import HarvestCost
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy import registry
from kvmhost.reclaim.policy.base import Gfns, Mask, Policy
from kvmhost.reclaim.policy.lru_gen import LruGen
from kvmhost.reclaim.settings.options import VmOptions
from kvmhost.reclaim.vm.pages import Arrivals

__all__ = ["Judge", "make_policy"]


def make_policy(n_pages: int, options: VmOptions) -> Policy:
    """Make the policy that options name.

    :raises LayoutError: for an unknown one, or options that it does not take
    """
    given: dict[str, Any] = dict(options.policy_options)
    takes = registry.options_of(options.policy)
    if "n_generations" in takes:
        given.setdefault("n_generations", options.generations)
    if "seed" in takes:
        given.setdefault("seed", None if options.seed < 0 else options.seed)
    return registry.create(options.policy, n_pages, given)


class Judge:
    """Harvests one VM and asks the policy about its pages."""

    def __init__(self, client: Client, n_pages: int, policy: Policy) -> None:
        self._client, self.n_pages, self.policy = client, n_pages, policy
        self._tracker = "auto"
        self.probed_pages = 0

    def harvest(
        self, tracker: str, sample: float, full: bool = False
    ) -> tuple[YoungBitmap, HarvestCost]:
        """Test and clear what the policy plans; re-arm what was cleared.

        :param sample: clear only this share of the pages, in turn; 0: all
        :param full: sweep also what the policy would skip, if it does skip
        """
        self._tracker = tracker
        plan = self.policy.plan()
        if full and isinstance(self.policy, LruGen):
            plan = self.policy.full_plan()
        young, cost = self._client.harvest_timed(
            0,
            self.n_pages,
            tracker=tracker,
            clear=True,
            rearm="sample" if sample else "young",
            fraction=sample or None,
            mask=plan.pages,
        )
        if plan.pages is not None:
            # What the plan left out was reported, and not cleared: it is asked again later.
            young = YoungBitmap(
                0, self.n_pages, young.words & plan.pages, young.coarse, young.provenance
            )
        return young, cost

    def age(self, young: YoungBitmap, arrivals: Arrivals) -> None:
        """Tell the policy of one window: what went, what came, what was young."""
        now_ns = time.monotonic_ns()
        if arrivals.went.size:
            self.policy.evicted(arrivals.went, now_ns)
        came = arrivals.came
        if came.size:
            self.policy.refaulted(came, now_ns)
        self.policy.age(young.words, now_ns)

    def victims(self, n: int, candidates: Mask, probe: bool = True) -> Gfns:
        """Return up to ``n`` pages to go, the best first.

        :param probe: lend a policy that probes a look at accessed bits; each costs a
            request, so policies do not probe unless their options say so
        """
        lent = self if probe and getattr(self.policy, "probes", False) else None
        return self.policy.victims(n, candidates, time.monotonic_ns(), lent)

    def evicted(self, gfns: Gfns) -> None:
        """Tell the policy that pages went."""
        self.policy.evicted(gfns, time.monotonic_ns())

    # -- the probe that a policy gets -----------------------------------------

    def clear_young(self, pages: Words) -> Words:
        """Test and clear pages between two harvests."""
        self.probed_pages += int(np.unpackbits(pages.view(np.uint8)).sum())
        found = self._client.harvest(
            0, self.n_pages, tracker=self._tracker, clear=True, rearm="young", mask=pages
        )
        return found.words & pages

    def clear_flush_young(self, gfn: int) -> bool:
        """Test and clear one page; over a control socket a batch of one is all there is."""
        if not 0 <= gfn < self.n_pages:
            raise LayoutError(f"gfn {gfn:#x} of {self.n_pages} pages")
        one = np.zeros(self.n_pages, dtype=bool)
        one[gfn] = True
        return bool(self.clear_young(pack(one)).any())
