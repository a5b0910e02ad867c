"""The session of one VM: each pass harvests, ages, decides, evicts, and records all of it.

1. Check that the VM runs. The pages of a paused VM do not age, since its guest had no
   chance to touch them.
2. Harvest as the policy plans, and re-arm the cleared pages: as many of them as the
   guest can bear (:mod:`kvmhost.reclaim.vm.losscontrol`).
3. Determine the pages that were evicted or became resident since the last pass, and
   let the policy age by the harvest.
4. Ask the controllers how many pages to evict; apply back-off and rate limit.
5. Evict the policy's victims. If the VM is above its budget and the policy protects all
   remaining pages, make the VM enforce its limit.
6. Send the VM the pages to evict next, with which its fault handler holds the limit
   between two passes.

A dry run simulates steps 5 and 6, sets no limit and takes no lease. It does harvest and
re-arm: otherwise it would have nothing to base decisions on.
"""

from __future__ import annotations

import functools
import threading
import time

from kvmhost.control.client import Client
from kvmhost.control.schema import Counters, LeaseRequest
from kvmhost.reclaim.account.decisions import DecisionKind, EvictReason, SpareCause
from kvmhost.reclaim.account.events import PassReport
from kvmhost.reclaim.account.history import PageHistory
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.errors import ReclaimError
from kvmhost.reclaim.policy.base import Policy
from kvmhost.reclaim.pressure.budget import Budget
from kvmhost.reclaim.pressure.controllers import PassFacts
from kvmhost.reclaim.pressure.shares import Claim
from kvmhost.reclaim.vm.evictor import Evictor
from kvmhost.reclaim.vm.losscontrol import LossControl
from kvmhost.reclaim.vm.pages import ResidencyChanges, VmPages
from kvmhost.reclaim.vm.policydriver import PolicyDriver, make_policy
from kvmhost.reclaim.vm.target import PassTarget, ReclaimTarget, stalled_ns
from kvmhost.reclaim.vm.totals import Totals
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import SHARED_SWEEP

__all__ = ["GuestEnded", "Session", "VmPaused"]

#: The first passes protect everything: too little is known about the pages.
_LEARNING_PASSES = 3
#: A shared limit is set again if it changed by more than 1/64.
_LIMIT_STEPS = 64


class GuestEnded(ReclaimError):
    """The guest has ended."""


class VmPaused(ReclaimError):
    """The VM is paused: a harvest would find nothing."""


class Session:
    """Reclaims from one VM. One thread runs the passes; other threads take :attr:`lock`.

    Every method that talks to the VM raises what
    :class:`~kvmhost.control.client.Client` raises.
    """

    def __init__(
        self, client: Client, context: DaemonContext, policy: Policy | None = None
    ) -> None:
        self.client, self.context, self.vm = client, context, client.vm
        self.lock = threading.Lock()
        self.dry_run = context.config.daemon.dry_run
        #: Duration of the lease, as last sent to the VM.
        self.lease_s = context.lease_s
        self.options = context.options_of(self.vm)
        self.pages = VmPages(client.memory_map())
        n_pages = self.pages.n_pages
        self.loss = LossControl(client, n_pages, self.options.max_loss)
        chosen = policy or make_policy(n_pages, self.options)
        self.driver = PolicyDriver(client, n_pages, chosen, self.loss, self.options.view)
        if not self.dry_run:
            self.take_lease()
        self.history = PageHistory(n_pages) if context.config.account.page_history else None
        self.totals = Totals()
        self.reclaim_target = ReclaimTarget(self.vm, context)
        self.evictor = Evictor(client, context, self.pages, self.driver, self.history, self.totals)
        self.last: PassReport | None = None
        self.pass_target: PassTarget | None = None
        #: The VM's own counters, as of the last pass.
        self.counters: Counters | None = None
        self.budget: Budget | None = None
        self.stall = 0.0
        self.passes = 0
        self._n_vcpus = 1
        self._limit_bytes = 0
        self._evicted = 0
        self._last_s = time.monotonic()
        # Set before the first pass: until harvests show which pages are cold, the fault
        # handler's own choice keeps the guest within its budget.
        self._set_budget()
        text = f"{n_pages} pages, policy {self.driver.policy.name}"
        context.decisions.add(DecisionKind.ATTACH, text, vm=self.vm)

    def take_lease(self) -> None:
        """Take the lease of the VM, or renew it with the current options.

        :raises ControlError: with status 423 if another daemon holds it
        """
        context = self.context
        self.lease_s = context.lease_s
        self.client.take_lease(
            LeaseRequest(
                holder=context.holder,
                ttl_s=self.lease_s,
                socket=context.socket,
                take_over=context.config.daemon.take_over,
            )
        )

    def renew_lease(self) -> None:
        """Renew the lease during a long pause between two passes."""
        if not self.dry_run:
            self.client.lease()

    def run_pass(self, stop: threading.Event | None = None) -> PassReport:
        """Run one pass.

        :param stop: once set, no further batch is evicted
        :raises GuestEnded: if the guest has ended
        :raises VmPaused: if the VM is paused
        """
        state = self.client.state()
        if not state.running:
            raise GuestEnded
        if not self.dry_run and self.context.lease_s != self.lease_s:
            self.take_lease()
        if state.paused:
            self.totals.skipped += 1
            self._last_s = time.monotonic()
            raise VmPaused
        self._n_vcpus = max(1, len(state.vcpus))
        with self.lock:
            self.last = self._run_pass(stop)
        return self.last

    def _run_pass(self, stop: threading.Event | None) -> PassReport:
        start, busy = time.perf_counter_ns(), time.thread_time_ns()
        self.options = self.context.options_of(self.vm)
        elapsed_s = self._measure()
        self.passes += 1
        young_pages, ns_per_page, changes = self._harvest_and_age()
        notes = self._loss_notes() + self._update_backoff(changes)
        self._claim()
        self._set_budget()
        self.pass_target = target = self.reclaim_target.decide(
            self._facts(elapsed_s, changes), self.budget
        )
        outcomes = self._evict_victims(target, stop)
        forced = self._enforce()
        if not self.dry_run and self.budget is not None:
            self.evictor.set_victims(self.options.max_victims)
        self._evicted = outcomes.get("done", 0)
        self.totals.passes += 1
        busy_ns = time.thread_time_ns() - busy
        self.totals.busy_ns += busy_ns
        return PassReport(
            vm=self.vm,
            number=self.passes,
            resident_bytes=self.pages.n_resident * PAGE_BYTES,
            young_pages=young_pages,
            generations=self.driver.policy.sizes(self.pages.candidates),
            wanted_pages=target.demand.pages,
            outcomes=outcomes,
            forced_pages=forced,
            refaulted_pages=int(changes.refaulted.size),
            harvest_ns_per_page=ns_per_page,
            duration_ms=(time.perf_counter_ns() - start) / 1e6,
            busy_ms=busy_ns / 1e6,
            why=target.demand.why.name.lower() if target.demand.why else "",
            holding=self.reclaim_target.backoff.holding,
            dry_run=self.dry_run,
            notes=notes,
            loss=self.loss.loss,
            cleared_steady=self.loss.clearing.steady,
            cleared_changing=self.loss.clearing.changing,
            interval_s=self.interval_s,
            stale_s=self.loss.stale_s(self.context.config.daemon.interval),
        )

    @property
    def interval_s(self) -> float:
        """Time between two passes: the given one, or more if the guest loses too much."""
        return float(self.context.config.daemon.interval * self.loss.clearing.stretch)

    def _loss_notes(self) -> list[str]:
        text = self.loss.news(self.context.config.daemon.interval)
        if not text:
            return []
        self.context.decisions.add(DecisionKind.CLEAR, text, vm=self.vm, passes=self.passes)
        return [text]

    def age_once(self, full: bool) -> None:
        """Harvest and age outside of the passes. The caller holds :attr:`lock`.

        :param full: also scan the tables that the policy would skip
        """
        self.passes += 1
        self._harvest_and_age(full)

    # -- harvest and age ------------------------------------------------------

    def _measure(self) -> float:
        """Update stall and loss of the vCPUs; return the seconds since the last pass."""
        now_s = time.monotonic()
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        before, self.counters = self.counters, self.client.counters()
        self.stall = 0.0
        if before is not None and elapsed_s > 0:
            waited_ns = max(0, stalled_ns(self.counters) - stalled_ns(before))
            self.stall = min(1.0, waited_ns / 1e9 / elapsed_s / self._n_vcpus)
        resident = self.pages.n_resident or self.pages.n_memory
        self.loss.begin_pass(before, self.counters, elapsed_s, resident, self.options)
        return elapsed_s

    def _harvest_and_age(self, full: bool = False) -> tuple[int, float, ResidencyChanges]:
        """Harvest and age; return young pages, cost in ns per page, and residency changes."""
        max_age_s = SHARED_SWEEP * self.context.config.daemon.interval
        found = self.driver.harvest(self.options.tracker, full, max_age_s)
        young, cost_ns = found.young, found.harvest_ns + found.rearm_ns
        self.totals.note_harvest(found)
        resident = self.client.resident(0, self.pages.n_pages)
        changes = self.pages.update(resident, young.as_bool())
        if self.history is not None:
            self.history.window(young.words)
            self.history.evicted_by_vm(changes.evicted_by_vm, EvictReason.LIMIT)
            self.history.became_resident(changes.refaulted, changes.first_resident)
        self._record_changes(changes)
        self.driver.age(young, changes)
        return found.n_young, cost_ns / max(self.pages.n_pages, 1), changes

    def _record_changes(self, changes: ResidencyChanges) -> None:
        add = functools.partial(self.context.decisions.add, vm=self.vm, passes=self.passes)
        evicted, refaulted = changes.evicted_by_vm, changes.refaulted
        if evicted.size:
            self.totals.evicted[EvictReason.LIMIT] += int(evicted.size)
            add(
                DecisionKind.FORCE,
                EvictReason.LIMIT.text,
                why=EvictReason.LIMIT,
                pages=int(evicted.size),
                gfns=evicted,
            )
        if refaulted.size:
            self.totals.refaulted += int(refaulted.size)
            self.totals.refaulted_own += changes.refaulted_own
            text = f"refaulted; {changes.refaulted_own} of them had been evicted by the daemon"
            add(DecisionKind.REFAULT, text, pages=int(refaulted.size), gfns=refaulted)

    def _working(self) -> int:
        """Return the pages of the working set; during the first passes, all resident pages."""
        return self.pages.n_resident if self.passes < _LEARNING_PASSES else self.pages.n_working

    def _claim(self) -> None:
        """Report to the host what this VM has and needs."""
        pages = self.pages
        self.context.host.claim(
            self.vm,
            Claim(
                self.options.weight,
                self._working(),
                pages.n_resident,
                pages.n_memory,
                pages.n_pinned + 1,
            ),
        )

    # -- decide ---------------------------------------------------------------

    def _facts(self, elapsed_s: float, changes: ResidencyChanges) -> PassFacts:
        stall: float | None = self.stall
        if self.context.config.pressure.psi != "vm":
            stall = self.context.host.stall
        return PassFacts(
            elapsed_s, self.pages.n_resident, self._working(), changes.refaulted_own, stall or 0.0
        )

    def _update_backoff(self, changes: ResidencyChanges) -> list[str]:
        change = self.reclaim_target.note(self._evicted, changes.refaulted_own, time.monotonic())
        if change is None:
            return []
        kind = DecisionKind.HOLD if change.holding else DecisionKind.GO_ON
        self.context.decisions.add(kind, change.reason, vm=self.vm, passes=self.passes)
        return [change.reason]

    def _set_budget(self) -> None:
        """Apply the smaller of the VM's own budget and its part of the shared budget."""
        part = self.context.host.budget_pages(self.vm)
        own = self.options.budget.of(self.pages.n_memory * PAGE_BYTES)
        sizes = [own] if own else []
        if part is not None:
            sizes.append(part * PAGE_BYTES)
        size = max(min(sizes), PAGE_BYTES) if sizes else 0
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
        self.context.decisions.add(DecisionKind.BUDGET, text, vm=self.vm, passes=self.passes)

    # -- evict ----------------------------------------------------------------

    def _evict_victims(self, target: PassTarget, stop: threading.Event | None) -> dict[str, int]:
        """Evict the policy's victims; record the pages spared, and the cause."""
        victims = self.driver.victims(target.pages, self.pages.candidates)
        demand = target.demand
        outcomes = self.evictor.evict(
            victims, demand.why, demand.text, passes=self.passes, stop=stop
        )
        self.context.rate.give_back(target.pages - outcomes.get("done", 0))
        if target.cause is not None:
            self._spare(demand.pages - target.pages, target.cause, target.limited_by)
        if victims.size < target.pages:
            spared = target.pages - int(victims.size)
            self._spare(spared, SpareCause.PROTECTED, "protected by the policy")
        return outcomes

    def _spare(self, pages: int, cause: SpareCause, text: str) -> None:
        self.totals.spared[cause] += pages
        self.context.decisions.add(
            DecisionKind.SPARE, text, vm=self.vm, passes=self.passes, pages=pages
        )

    def _enforce(self) -> int:
        """Make the VM shrink to its budget if the policy's victims were not enough."""
        budget = self.budget
        if self.dry_run or budget is None or self.passes <= _LEARNING_PASSES:
            return 0
        if self.pages.n_resident <= budget.max_bytes // PAGE_BYTES:
            return 0
        return self.evictor.shrink(budget, self.passes)
