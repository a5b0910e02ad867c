"""A pass of the daemon over a machine in the same process: tracker, policy, pager.

It does the work of :mod:`kvmhost.reclaim.daemon` without the control socket, and it offers a
probe, so that policies that test single pages can be measured.
"""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np

from kvmhost.bitmap import Words, YoungBitmap, n_words, pack
from kvmhost.errors import KvmHostError
from kvmhost.machine import Machine
from kvmhost.pager.results import EvictOutcome, PageState
from kvmhost.reclaim.policy.base import Gfns, Mask, Policy
from kvmhost.reclaim.policy.replay import WRONG_WITHIN
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["Pass", "Reclaimer", "check"]

_NAMED_AHEAD = 4096


@dataclasses.dataclass(frozen=True)
class Pass:
    """Cost and result of one pass.

    :param harvest_ns: processor time of harvests, probes and re-arming
    :param policy_ns: processor time of the policy
    :param busy_ns: processor time of the whole pass
    """

    young: Words
    harvest_ns: int
    policy_ns: int
    busy_ns: int


class Reclaimer:
    """Run passes over one machine. Not safe for concurrent calls.

    :param policy: policy for ``memory.gfn_end`` pages; None: harvest without evicting
    :param budget_pages: resident pages allowed, including those of the VM itself
    :param slack_pages: pages by which the guest may exceed the budget until the next pass
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy | None,
        budget_pages: int,
        slack_pages: int = 0,
    ) -> None:
        self.machine, self._policy = machine, policy
        self._tracker = machine.use_tracker("guestpt")
        self.n_pages = machine.memory.gfn_end
        self.budget_pages = budget_pages
        self._movable: Mask = np.zeros(self.n_pages, dtype=bool)
        for region in machine.memory.regions:
            self._movable[region.gfn : region.gfn + region.n_pages] = True
        for gpa, n_bytes in machine.layout.pinned_ranges:
            first = gpa >> PAGE_SHIFT
            self._movable[first : first + -(-n_bytes // PAGE_BYTES)] = False
        self._resident = self.resident()
        self._first = pack(self._resident)
        self._went = np.full(self.n_pages, -1, dtype=np.int32)
        self._harvest_ns = 0
        #: Wall time of tests of accessed bits, and of re-arming (KVM's lock and its flushes).
        self.walk_ns = self.rearm_ns = 0
        self.passes: list[Pass] = []
        self.refaulted_pages = self.wrong_evictions = 0
        if policy is not None:
            policy.refaulted(np.flatnonzero(self._resident), time.monotonic_ns())
            machine.set_limit(budget_pages * PAGE_BYTES)
            machine.open_pager().shrink()
            machine.set_limit((budget_pages + slack_pages) * PAGE_BYTES)

    def resident(self) -> Mask:
        """Return the mask of gfns that are resident now."""
        states = self.machine.open_pager().states()
        here = np.zeros(self.n_pages, dtype=bool)
        first = 0
        for region in self.machine.memory.regions:
            part = states[first : first + region.n_pages]
            here[region.gfn : region.gfn + region.n_pages] = part == PageState.RESIDENT
            first += region.n_pages
        return here

    def run_pass(self) -> Pass:
        """Harvest, age and evict once."""
        start, self._harvest_ns = time.thread_time_ns(), 0
        policy = self._policy
        wanted = None if policy is None else policy.plan()
        young = self._harvest(None if wanted is None else wanted.pages)
        policy_ns = 0
        if policy is not None:
            before = self._harvest_ns
            took = time.thread_time_ns()
            self._reclaim(policy, young)
            policy_ns = time.thread_time_ns() - took - (self._harvest_ns - before)
        done = Pass(young, self._harvest_ns, policy_ns, time.thread_time_ns() - start)
        self.passes.append(done)
        return done

    def _reclaim(self, policy: Policy, young: Words) -> None:
        now_ns = time.monotonic_ns()
        resident = self._note_changes(policy, now_ns)
        policy.age(young, now_ns)
        self.machine.open_pager().note_young(YoungBitmap(0, self.n_pages, young))
        # Stay slightly below the limit, so that faults before the next pass need no eviction.
        excess = int(resident.sum()) - int(self.budget_pages * 0.98)
        if excess > 0:
            victims = policy.victims(excess, resident & self._movable, now_ns, self)
            result = self.machine.open_pager().evict(victims)
            went = result.gfns[result.outcomes == EvictOutcome.DONE]
            resident[went] = False
            self._note_evicted(policy, went, now_ns)
        if policy.name != "classic":
            # Choosing victims in advance would make the two lists test every page.
            ahead = policy.victims(_NAMED_AHEAD, resident & self._movable, now_ns)
            self.machine.open_pager().set_victims(ahead)
        self._resident = resident

    def _note_changes(self, policy: Policy, now_ns: int) -> Mask:
        resident = self.resident()
        # Pages that the fault handler evicted at the limit.
        self._note_evicted(policy, np.flatnonzero(self._resident & ~resident), now_ns)
        came = np.flatnonzero(resident & ~self._resident)
        number = len(self.passes)
        back = came[self._went[came] >= 0]
        self.refaulted_pages += int(back.size)
        self.wrong_evictions += int((number - self._went[back] <= WRONG_WITHIN).sum())
        policy.refaulted(came, now_ns)
        return resident

    def _note_evicted(self, policy: Policy, gfns: Gfns, now_ns: int) -> None:
        self._went[gfns] = len(self.passes)
        policy.evicted(gfns, now_ns)

    # -- accessed bits, also as a probe ------------------------------------------

    def _harvest(self, mask: Words | None) -> Words:
        if mask is not None and not mask.any():
            return np.zeros(n_words(self.n_pages), dtype=np.uint64)
        start = time.thread_time_ns()
        walk = time.perf_counter_ns()
        found = self._tracker.harvest(0, self.n_pages, mask=mask)
        words = found.words if mask is None else found.words & mask
        rearm = time.perf_counter_ns()
        self._tracker.rearm(0, self.n_pages, dataclasses.replace(found, words=words))
        self.walk_ns += rearm - walk
        self.rearm_ns += time.perf_counter_ns() - rearm
        self._harvest_ns += time.thread_time_ns() - start
        return words

    def clear_young(self, pages: Words) -> Words:
        """Test and clear the accessed bits in one batch, without a lock."""
        return self._harvest(pages)

    def clear_flush_young(self, gfn: int) -> bool:
        """Test and clear the accessed bit of one page, and flush this page."""
        start = time.thread_time_ns()
        found = self._tracker.harvest(gfn, 1)
        young = bool(found.words[0])
        if young:
            self._tracker.rearm(gfn, 1, found)
        self._harvest_ns += time.thread_time_ns() - start
        return young

    # -- in a separate thread ------------------------------------------------------

    def run_until(self, stop: threading.Event, interval_s: float) -> None:
        """Run a pass at the start of each interval until ``stop`` is set."""
        while not stop.is_set() and self.machine.error is None:
            start = time.monotonic()
            self.run_pass()
            stop.wait(max(interval_s - (time.monotonic() - start), 0.0))

    def windows(self) -> list[tuple[int, Words]]:
        """Return the initial pages and the windows recorded so far, with their numbers."""
        return list(enumerate([self._first, *(one.young for one in self.passes)]))


def check(machine: Machine) -> None:
    """Raise the error that ended a guest, if any.

    :raises KvmHostError: if the guest failed
    """
    if machine.error is not None:
        raise KvmHostError(f"the guest failed: {machine.error}") from machine.error
