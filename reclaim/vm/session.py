"""One VM, looked after: a pass harvests, ages, decides, evicts, and takes it all down.

1. look whether the VM runs: one that stands still ages nothing, since its guest had no
   chance to touch anything;
2. harvest as the policy plans, re-arming what was cleared;
3. take what came and went since the last pass, and have the policy age by the harvest;
4. ask the controllers how many pages should go, hold back where what goes comes back,
   and keep to the limits;
5. evict the policy's victims; where the VM is above its budget and all that is left is
   protected, have the VM enforce its limit;
6. name the pages to go next, for the VM's fault handler to hold the limit between passes.

In a dry run 5 and 6 only happen on paper, no limit is set and no lease is taken. The
harvest is real, with its re-arming: without it there is nothing to decide by.
"""

from __future__ import annotations

import functools
import threading
import time

import numpy as np

from kvmhost.control.client import Client
from kvmhost.control.schema import Counters, LeaseRequest
from kvmhost.reclaim.account.decisions import Kind, Why
from kvmhost.reclaim.account.events import PassReport
from kvmhost.reclaim.account.history import PageHistory
from kvmhost.reclaim.context import Common
from kvmhost.reclaim.policy.base import Policy
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.pressure.controllers import Facts
from kvmhost.reclaim.pressure.shares import Claim
from kvmhost.reclaim.vm.evictor import Hands
from kvmhost.reclaim.vm.pages import Arrivals, VmView
from kvmhost.reclaim.vm.policydriver import Judge, make_policy
from kvmhost.reclaim.vm.target import Ruling, Steering, stalled_ns
from kvmhost.reclaim.vm.totals import Totals

__all__ = ["Ended", "Session", "Standing"]

_PAGE_BYTES = 4096
#: Passes that protect everything, for want of knowledge.
_LEARNING_PASSES = 3
#: A shared limit is set anew when it moves by more than one part in so many.
_LIMIT_STEPS = 64


class Ended(Exception):
    """The guest has ended."""


class Standing(Exception):
    """The VM stands still: there is nothing to learn from a harvest."""


class Session:
    """Looks after one VM. One thread runs the passes; :attr:`lock` keeps others out.

    Every method that talks to the VM raises what
    :class:`~kvmhost.control.client.Client` raises.
    """

    def __init__(self, client: Client, common: Common, policy: Policy | None = None) -> None:
        self.client, self.common, self.vm = client, common, client.vm
        self.lock = threading.Lock()
        self.dry_run = common.config.daemon.dry_run
        #: What the VM was told to wait for a word.
        self.lease_s = common.lease_s
        self.options = common.options_of(self.vm)
        self.view = VmView(client.memory())
        n_pages = self.view.n_pages
        self.judge = Judge(client, n_pages, policy or make_policy(n_pages, self.options))
        if not self.dry_run:
            self.take_lease()
        self.history = PageHistory(n_pages) if common.config.account.page_history else None
        self.totals = Totals()
        self.steering = Steering(self.vm, common)
        self.hands = Hands(client, common, self.view, self.judge, self.history, self.totals)
        self.last: PassReport | None = None
        self.ruling: Ruling | None = None
        #: The VM's own counters, as of the last pass.
        self.counters: Counters | None = None
        self.budget: Budget | None = None
        self.stall = 0.0
        self.passes = 0
        self._n_vcpus = 1
        self._limit_bytes = 0
        self._evicted = 0
        self._last_s = time.monotonic()
        # At once: until the first harvests tell who is cold, the fault handler's own
        # guesses are better than a guest that outgrows its budget.
        self._set_budget()
        text = f"{n_pages} pages, policy {self.judge.policy.name}"
        common.decisions.add(Kind.ATTACH, text, vm=self.vm)

    def take_lease(self) -> None:
        """Become the one daemon of this VM, or renew that with the terms of now.

        :raises ControlError: with status 423 if another one is
        """
        common = self.common
        self.lease_s = common.lease_s
        self.client.take_lease(
            LeaseRequest(
                holder=common.holder,
                ttl_s=self.lease_s,
                socket=common.socket,
                take_over=common.config.daemon.take_over,
            )
        )

    def stay(self) -> None:
        """Renew the lease between two passes that are far apart."""
        if not self.dry_run:
            self.client.lease()

    def run_pass(self, stop: threading.Event | None = None) -> PassReport:
        """Make one pass.

        :param stop: once set, no further batch is evicted
        :raises Ended: if the guest has
        :raises Standing: if it is paused
        """
        state = self.client.state()
        if not state.running:
            raise Ended
        if not self.dry_run and self.common.lease_s != self.lease_s:
            self.take_lease()
        if state.paused:
            self.totals.skipped += 1
            self._last_s = time.monotonic()
            raise Standing
        self._n_vcpus = max(1, len(state.vcpus))
        with self.lock:
            self.last = self._run_pass(stop)
        return self.last

    def _run_pass(self, stop: threading.Event | None) -> PassReport:
        start, busy = time.perf_counter_ns(), time.thread_time_ns()
        self.options = self.common.options_of(self.vm)
        elapsed_s = self._measure()
        self.passes += 1
        young_pages, ns_per_page, arrivals = self._learn()
        notes = self._hold_or_go_on(arrivals)
        self._claim()
        self._set_budget()
        self.ruling = ruling = self.steering.decide(self._facts(elapsed_s, arrivals), self.budget)
        outcomes = self._follow(ruling, stop)
        forced = self._enforce()
        if not self.dry_run and self.budget is not None:
            self.hands.name_victims(self.options.max_victims)
        self._evicted = outcomes.get("done", 0)
        self.totals.passes += 1
        busy_ns = time.thread_time_ns() - busy
        self.totals.busy_ns += busy_ns
        return PassReport(
            vm=self.vm,
            number=self.passes,
            resident_bytes=self.view.n_resident * _PAGE_BYTES,
            young_pages=young_pages,
            generations=self.judge.policy.sizes(self.view.candidates),
            wanted_pages=ruling.want.pages,
            outcomes=outcomes,
            forced_pages=forced,
            refaulted_pages=int(arrivals.back.size),
            harvest_ns_per_page=ns_per_page,
            duration_ms=(time.perf_counter_ns() - start) / 1e6,
            busy_ms=busy_ns / 1e6,
            why=ruling.want.why.name.lower() if ruling.want.why else "",
            holding=self.steering.backoff.holding,
            dry_run=self.dry_run,
            notes=notes,
        )

    def age_once(self, full: bool) -> None:
        """Harvest and age outside of the passes. The caller holds :attr:`lock`.

        :param full: sweep also what the policy would skip
        """
        self.passes += 1
        self._learn(full)

    # -- learning -------------------------------------------------------------

    def _measure(self) -> float:
        """Note how long vCPUs waited for pages; return the seconds since the last pass."""
        now_s = time.monotonic()
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        before, self.counters = self.counters, self.client.counters()
        self.stall = 0.0
        if before is not None and elapsed_s > 0:
            waited_ns = max(0, stalled_ns(self.counters) - stalled_ns(before))
            self.stall = min(1.0, waited_ns / 1e9 / elapsed_s / self._n_vcpus)
        return elapsed_s

    def _learn(self, full: bool = False) -> tuple[int, float, Arrivals]:
        """Harvest, see what came and went, age; return young pages, cost, and changes."""
        young, cost = self.judge.harvest(self.options.tracker, self.options.sample, full)
        n_young = young.count()
        self.totals.note_harvest(self.view.n_pages, n_young, cost)
        resident = self.client.resident(0, self.view.n_pages)
        arrivals = self.view.look(resident, young.as_bool())
        if self.history is not None:
            self.history.window(young.words)
            self.history.went(arrivals.went, Why.LIMIT)
            self.history.came(arrivals.back, arrivals.first)
        self._take_down(arrivals)
        self.judge.age(young, arrivals)
        return n_young, (cost.harvest_ns + cost.rearm_ns) / max(self.view.n_pages, 1), arrivals

    def _take_down(self, arrivals: Arrivals) -> None:
        add = functools.partial(self.common.decisions.add, vm=self.vm, passes=self.passes)
        went, back = arrivals.went, arrivals.back
        if went.size:
            self.totals.evicted[Why.LIMIT] += int(went.size)
            add(Kind.FORCE, Why.LIMIT.text, why=Why.LIMIT, pages=int(went.size), gfns=went)
        if back.size:
            self.totals.refaulted += int(back.size)
            self.totals.regretted += arrivals.regretted
            text = f"came back; {arrivals.regretted} of them the daemon had sent away"
            add(Kind.REFAULT, text, pages=int(back.size), gfns=back)

    def _working(self) -> int:
        """Return the pages of the working set; all, where little is known."""
        return self.view.n_resident if self.passes < _LEARNING_PASSES else self.view.n_working

    def _claim(self) -> None:
        """Tell the host what this VM has and needs."""
        view = self.view
        size = int(np.count_nonzero(view.movable)) + view.n_pinned
        self.common.host.claim(
            self.vm,
            Claim(self.options.weight, self._working(), view.n_resident, size, view.n_pinned + 1),
        )

    # -- deciding -------------------------------------------------------------

    def _facts(self, elapsed_s: float, arrivals: Arrivals) -> Facts:
        stall: float | None = self.stall
        if self.common.config.pressure.psi != "vm":
            stall = self.common.host.stall
        return Facts(
            elapsed_s, self.view.n_resident, self._working(), arrivals.regretted, stall or 0.0
        )

    def _hold_or_go_on(self, arrivals: Arrivals) -> list[str]:
        turn = self.steering.note(self._evicted, arrivals.regretted, time.monotonic())
        if turn is None:
            return []
        kind = Kind.HOLD if turn.holding else Kind.GO_ON
        self.common.decisions.add(kind, turn.reason, vm=self.vm, passes=self.passes)
        return [turn.reason]

    def _set_budget(self) -> None:
        """Take the VM's own budget and its part of the shared one, whichever is smaller."""
        part = self.common.host.budget_pages(self.vm)
        sizes = [int(self.options.budget)] if self.options.budget else []
        if part is not None:
            sizes.append(part * _PAGE_BYTES)
        size = max(min(sizes), _PAGE_BYTES) if sizes else 0
        if not size:
            self.budget = None
            return
        high = min(self.options.high.of(size), size)
        self.budget = Budget.of(size, high, min(self.options.low.of(size), high))
        moved = abs(size - self._limit_bytes) * _LIMIT_STEPS > self._limit_bytes
        if self.dry_run or not (moved or (part is None and size != self._limit_bytes)):
            return
        self.client.set_limit(size)
        self._limit_bytes = size
        whose = "its own budget" if part is None else "its part of the shared budget"
        text = f"limit {size >> 20} MiB: {whose}"
        self.common.decisions.add(Kind.BUDGET, text, vm=self.vm, passes=self.passes)

    # -- acting ---------------------------------------------------------------

    def _follow(self, ruling: Ruling, stop: threading.Event | None) -> dict[str, int]:
        """Evict what was ruled, and take down what was spared and why."""
        victims = self.judge.victims(ruling.pages, self.view.candidates)
        want = ruling.want
        outcomes = self.hands.evict(victims, want.why, want.text, passes=self.passes, stop=stop)
        self.common.rate.give_back(ruling.pages - outcomes.get("done", 0))
        if ruling.kept:
            self._spare(want.pages - ruling.pages, ruling.kept)
        if victims.size < ruling.pages:
            self._spare(ruling.pages - int(victims.size), "protected by the policy")
        return outcomes

    def _spare(self, pages: int, cause: str) -> None:
        self.totals.spared[cause] += pages
        self.common.decisions.add(Kind.SPARE, cause, vm=self.vm, passes=self.passes, pages=pages)

    def _enforce(self) -> int:
        """Have the VM shrink to the budget where the policy's victims were not enough."""
        budget = self.budget
        if self.dry_run or budget is None or self.passes <= _LEARNING_PASSES:
            return 0
        if self.view.n_resident <= budget.max_bytes // _PAGE_BYTES:
            return 0
        return self.hands.force(budget, self.passes)
