"""The reclaim daemon: harvests, ages, and asks VMs to evict what is cold.

One thread a VM, and one pass an interval:

1. harvest with clear, re-arming what was young (or a sample of it);
2. take what is resident now and was not after the last pass as in use, and age by the
   harvest;
3. above the budget's high mark, evict the oldest down to the low mark; if the
   protected generations alone are larger than the budget, have the VM enforce its limit;
4. tell the VM which pages to take next, for its fault handler to hold the hard
   limit between two passes.

The daemon holds only opinions. All data and all faults are the VM's, which keeps
limit and victims of the last pass when the daemon goes, in whatever way; the next
daemon begins with every page in one generation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from kvmhost.control.client import Client
from kvmhost.errors import ControlError, KvmHostError, VmGoneError
from reclaim.policy.base import Gfns, Mask, Policy
from reclaim.policy.lru_gen import LruGen
from reclaim.pressure.budget import Budget

__all__ = ["Daemon", "Dropped", "PassReport", "Settings", "VmReclaimer"]

_PAGE_BYTES = 4096
#: Evictions a request: short enough for a stop to be prompt, at some 20 us a page.
_BATCH_PAGES = 2048
#: Refusals in a row after which a VM is given up.
_MAX_REFUSALS = 5
#: A pass that takes longer than the interval is followed by this share of it at least.
_MIN_IDLE_SHARE = 0.1
#: Not Implemented: the VM has no pager, and will not get one.
_NOT_THERE = 501
#: How often a VM that is not there yet is looked for.
_LOOK_S = 0.1
#: How long requests in work may take after a stop.
_STOP_S = 5.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for every VM of a daemon.

    :param sample: clear and re-arm only this fraction of the pages at each harvest, in
        turn: the guest pays less, and a page takes ``1 / sample`` passes to look old;
        None: re-arm all that were young
    :param max_victims: length of the list of pages to go next, in pages
    :param seed: order within a generation; None: by gfn
    """

    budget: Budget
    interval_s: float = 1.0
    tracker: str = "auto"
    sample: float | None = None
    n_generations: int = 4
    max_victims: int = 16384
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass saw and did.

    :param resident_bytes: after the pass
    :param generations: resident pages by sequence number, the oldest first
    :param wanted_pages: what had to go; evicted are ``outcomes["done"]``
    :param forced_pages: went by the VM's own choice, since all that was left was protected
    :param refaulted_pages: came back since the last pass after having been evicted
    :param harvest_ns_per_page: scan and re-arming, inside the VM
    :param busy_ms: the daemon's own processor time in this pass
    """

    vm: str
    number: int
    resident_bytes: int
    young_pages: int
    generations: list[tuple[int, int]]
    wanted_pages: int
    outcomes: dict[str, int]
    forced_pages: int
    refaulted_pages: int
    harvest_ns_per_page: float
    duration_ms: float
    busy_ms: float

    @property
    def evicted_pages(self) -> int:
        """Pages that went."""
        return self.outcomes.get("done", 0)

    def line(self) -> str:
        """Return it in one line, for a log."""
        generations = " ".join(f"{seq}:{n}" for seq, n in self.generations)
        others = "".join(
            f" {name} {n}" for name, n in self.outcomes.items() if n and name != "done"
        )
        forced = f", forced {self.forced_pages}" if self.forced_pages else ""
        return (
            f"{self.vm} pass {self.number}: resident {self.resident_bytes / 2**20:.1f} MiB, "
            f"young {self.young_pages}, generations {generations}, "
            f"evicted {self.evicted_pages} of {self.wanted_pages}{others}{forced}, "
            f"refaulted {self.refaulted_pages}, harvest {self.harvest_ns_per_page:.1f} ns/page, "
            f"{self.duration_ms:.1f} ms"
        )


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A VM that the daemon no longer looks after.

    :param failed: it refused, or never came; otherwise its time was over
    """

    vm: str
    reason: str
    failed: bool

    def line(self) -> str:
        """Return it in one line, for a log."""
        return f"{self.vm} dropped: {self.reason}"


Event = PassReport | Dropped


class VmReclaimer:
    """Looks after one VM; one thread calls it.

    Every method raises what :class:`~kvmhost.control.client.Client` raises.
    """

    def __init__(self, client: Client, settings: Settings, policy: Policy | None = None) -> None:
        self._client, self._settings = client, settings
        memory = client.memory()
        self._n_pages = memory.gfn_end
        self._policy = policy or LruGen(memory.gfn_end, settings.n_generations, settings.seed)
        self._movable = np.zeros(memory.gfn_end, dtype=bool)
        for region in memory.regions:
            self._movable[region.gfn : region.gfn + region.n_pages] = True
        for pinned in memory.pinned:
            self._movable[pinned.gfn : pinned.gfn + pinned.n_pages] = False
        #: Resident after the last pass; None before the first.
        self._resident: Mask | None = None
        self._gone: Mask = np.zeros(memory.gfn_end, dtype=bool)
        self._passes = 0
        # At once: until the first harvests tell who is cold, the fault handler's own
        # guesses are better than a guest that outgrows its budget.
        client.set_limit(settings.budget.max_bytes)

    def run_pass(self, stop: threading.Event | None = None) -> PassReport:
        """Harvest, age, evict, and name the next victims.

        :param stop: once set, no further batch is evicted
        """
        start, busy = time.perf_counter_ns(), time.thread_time_ns()
        client, policy = self._client, self._policy
        bitmap, cost = client.harvest_timed(
            0,
            self._n_pages,
            tracker=self._settings.tracker,
            clear=True,
            rearm="young" if self._settings.sample is None else "sample",
            fraction=self._settings.sample,
        )
        resident = client.resident(0, self._n_pages)
        now_ns = time.monotonic_ns()
        refaulted = self._note_arrivals(resident, now_ns)
        policy.age(bitmap.words, now_ns)
        wanted = self._settings.budget.excess_pages(int(resident.sum()))
        victims = policy.victims(wanted, resident & self._movable, now_ns)
        outcomes = self._evict(victims, resident, now_ns, stop)
        forced = self._enforce(resident)
        next_best = policy.victims(self._settings.max_victims, resident & self._movable, now_ns)
        client.set_victims(next_best)
        self._resident = resident
        self._passes += 1
        return PassReport(
            vm=client.vm,
            number=self._passes,
            resident_bytes=int(resident.sum()) * _PAGE_BYTES,
            young_pages=bitmap.count(),
            generations=policy.sizes(resident & self._movable),
            wanted_pages=wanted,
            outcomes=outcomes,
            forced_pages=forced,
            refaulted_pages=refaulted,
            harvest_ns_per_page=(cost.harvest_ns + cost.rearm_ns) / max(self._n_pages, 1),
            duration_ms=(time.perf_counter_ns() - start) / 1e6,
            busy_ms=(time.thread_time_ns() - busy) / 1e6,
        )

    def _enforce(self, resident: Mask) -> int:
        """Have the VM shrink to the budget where the policy's victims were not enough.

        Not in the first passes: they protect everything, for want of knowledge.
        """
        budget = self._settings.budget
        excess = int(resident.sum()) > budget.max_bytes // _PAGE_BYTES
        return self._client.shrink(budget.max_bytes) if excess and self._passes >= 3 else 0

    def _note_arrivals(self, resident: Mask, now_ns: int) -> int:
        """Tell the policy what came since the last pass; return how much of it came back."""
        if self._resident is None:
            return 0
        # What the fault handler evicted on its own since the last pass.
        went = self._resident & ~resident
        self._gone |= went
        self._policy.evicted(np.flatnonzero(went), now_ns)
        self._policy.refaulted(np.flatnonzero(resident & ~self._resident), now_ns)
        back = self._gone & resident
        self._gone &= ~resident
        return int(back.sum())

    def _evict(
        self, victims: Gfns, resident: Mask, now_ns: int, stop: threading.Event | None
    ) -> dict[str, int]:
        """Evict in batches, and take what went out of the resident mask."""
        outcomes: dict[str, int] = {}
        for first in range(0, victims.size, _BATCH_PAGES):
            if stop is not None and stop.is_set():
                break
            batch = victims[first : first + _BATCH_PAGES]
            report = self._client.evict(batch, each=True)
            for name, count in report.outcomes.items():
                outcomes[name] = outcomes.get(name, 0) + count
            went = batch[np.frombuffer(report.each or b"", dtype=np.uint8) == 0]
            resident[went] = False
            self._gone[went] = True
            self._policy.evicted(went, now_ns)
            if report.outcomes.get("full"):
                break
        return outcomes


class Daemon:
    """Looks after several VMs until it is stopped or they are gone.

    :param vms: names or socket paths
    :param report: called with every pass and every VM dropped, one call at a time
    :param passes: end after so many passes a VM; None: never
    :param wait: wait for VMs that are not there yet
    """

    def __init__(
        self,
        vms: Iterable[str],
        settings: Settings,
        report: Callable[[Event], None],
        *,
        passes: int | None = None,
        wait: bool = False,
    ) -> None:
        self._settings, self._report = settings, report
        self._passes, self._wait = passes, wait
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._failed = False
        self._vms = list(dict.fromkeys(vms))
        self._n_running = len(self._vms)
        self._woken, self._wake = os.pipe()
        # A reader that is gone, or a full pipe, must hold nobody up.
        os.set_blocking(self._wake, False)

    def run(self) -> bool:
        """Run to the end, once; False if a VM was dropped because something failed."""
        threads = [
            threading.Thread(target=self._look_after, args=(vm,), name=f"reclaim-{vm}", daemon=True)
            for vm in self._vms
        ]
        try:
            for thread in threads:
                thread.start()
            if threads:
                # An event would do, but setting one in a signal handler may deadlock.
                select.select([self._woken], [], [])
            self._stop.set()
            deadline = time.monotonic() + _STOP_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            self._stop.set()
            with self._lock:
                os.close(self._woken)
                os.close(self._wake)
                self._wake = -1
        return not self._failed

    def stop(self) -> None:
        """Ask it to end; does not wait. Safe in a signal handler."""
        if self._wake >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake, b"x")

    def _look_after(self, vm: str) -> None:
        """Run the passes over one VM: the body of its thread."""
        try:
            with Client(vm) as client:
                reclaimer = self._attach(client)
                if reclaimer is not None:
                    self._run_passes(client, reclaimer)
        except Exception as error:
            self._drop(vm, f"{type(error).__name__}: {error}", failed=True)
            raise
        finally:
            with self._lock:
                self._n_running -= 1
                if not self._n_running:
                    self.stop()

    def _attach(self, client: Client) -> VmReclaimer | None:
        """Meet a VM; None if that fails, or the daemon is stopped before it is there."""
        while not self._stop.is_set():
            try:
                return VmReclaimer(client, self._settings)
            except VmGoneError as error:
                if not self._wait:
                    self._drop(client.vm, error.problem, failed=True)
                    return None
            except KvmHostError as error:
                self._drop(client.vm, str(error), failed=True)
                return None
            self._stop.wait(_LOOK_S)
        return None

    def _run_passes(self, client: Client, reclaimer: VmReclaimer) -> None:
        refusals = 0
        while not self._stop.is_set():
            start = time.monotonic()
            try:
                report = reclaimer.run_pass(self._stop)
                ended = not client.state().running
            except VmGoneError as error:
                return self._drop(client.vm, error.problem, failed=False)
            except ControlError as error:
                refusals += 1
                if error.status == _NOT_THERE or refusals == _MAX_REFUSALS:
                    return self._drop(client.vm, str(error), failed=True)
            else:
                refusals = 0
                self._tell(report)
                if self._passes is not None and report.number >= self._passes:
                    return None
                if ended:
                    return self._drop(client.vm, "the guest has ended", failed=False)
            took = time.monotonic() - start
            interval = self._settings.interval_s
            self._stop.wait(max(interval - took, interval * _MIN_IDLE_SHARE))
        return None

    def _drop(self, vm: str, reason: str, failed: bool) -> None:
        self._failed = self._failed or failed
        self._tell(Dropped(vm, reason, failed))

    def _tell(self, event: Event) -> None:
        with self._lock:
            self._report(event)
