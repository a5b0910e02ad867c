"""The three rows of 2023: the second pass over memory, with three methods of aging.

A guest writes all its memory, gets a limit of half of it, and accesses it again in steps
of a 32nd. After each step, reclaim must bring the guest back under the limit before it
continues, as in direct reclaim: harvest, aging, tests of the victims, eviction. Without
the capability ``spte walk``, ``lru_gen`` tests pages one by one; with it, ``lru_gen`` tests
pages in batches. ``classic`` has two lists and tests pages one by one.

A test of one page is what ``clear_flush_young`` is in the kernel: it holds the lock of the
walked table, and an invalidation of the page follows, for which KVM takes its own mmu_lock for
write and flushes the TLBs of all vCPUs that may have the page; it is a call from Python. A
batch takes no lock to test, and one invalidation covers neighbouring young pages. KVM's own
counter ``remote_tlb_flush_requests`` says how often it flushed.

Departures: one vCPU, which waits while reclaim runs, so nobody waits for the lock, and no
flush interrupts another core; a page of the proposal's "before" was
tested only when eviction came to it, here by the sweeps as well.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvmhost.bitmap import Words, n_words, pack, unpack
from kvmhost.engine.kvm import KvmEngine
from kvmhost.machine import Machine
from kvmhost.memory.guest import pieces
from kvmhost.reclaim.policy.base import Policy
from kvmhost.reclaim.policy.classic import Classic
from kvmhost.reclaim.policy.lru_gen import Caps, LruGen
from kvmhost.tools.bench.reclaim.guests import booted
from kvmhost.tools.bench.reclaim.inprocess import Reclaimer
from kvmhost.tools.bench.reclaim.workloads import guest_params
from kvmhost.tools.outputs.benchparts import SecondPassRow
from kvmhost.trackers.guestpt import GuestptTracker

__all__ = ["run"]

_REPEATS = 3
_STEPS = 32


class PageByPage(Reclaimer):
    """Harvests a batch one page at a time, each under the lock and with an invalidation."""

    #: Pages tested so far.
    tested = 0

    def clear_flush_young(self, gfn: int) -> bool:
        """Test and clear one page with the MMU lock held, then invalidate it through KVM."""
        if not isinstance(self._tracker, GuestptTracker):
            raise TypeError(f"{self._tracker.name}: only guestpt has a table with a lock")
        start, walk = time.thread_time_ns(), time.perf_counter_ns()
        young = bool(self._tracker.table.harvest(gfn, 1, locked=True).words[0])
        rearm = time.perf_counter_ns()
        for region, first, n_pages in pieces(self.machine.memory.regions, gfn, 1):
            region.zap(first, n_pages)
        self.walk_ns += rearm - walk
        self.rearm_ns += time.perf_counter_ns() - rearm
        self._harvest_ns += time.thread_time_ns() - start
        self.tested += 1
        return young

    def clear_young(self, pages: Words) -> Words:
        asked = np.flatnonzero(unpack(pages, self.n_pages))
        bits = np.zeros(self.n_pages, dtype=bool)
        for gfn in asked:
            bits[gfn] = self.clear_flush_young(int(gfn))
        return pack(bits)

    def _harvest(self, mask: Words | None) -> Words:
        if mask is not None and not mask.any():
            return np.zeros(n_words(self.n_pages), dtype=np.uint64)
        resident = pack(self.resident())
        return self.clear_young(resident if mask is None else resident & mask)


def run(pages: int, tell: Callable[[str], None]) -> list[SecondPassRow]:
    """Return one row per method of aging, with the ratio to the batched method.

    :raises CapabilityError: without /dev/kvm
    """
    before = Caps.ALL & ~Caps.SPTE_WALK
    ways: dict[str, tuple[Callable[[int], Policy], type[Reclaimer]]] = {
        "batched, no lock": (lambda n: LruGen(n, probes=True), Reclaimer),
        "page by page, locked": (lambda n: LruGen(n, probes=True, caps=before), PageByPage),
        "classic": (lambda n: Classic(n, probes=True), PageByPage),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(_REPEATS):
        for name, (make, kind) in ways.items():
            tell(f"second pass, {name}")
            found[name].append(_second_pass(pages, make, kind))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }
    batched = medians["batched, no lock"]["second_pass_s"]
    return [
        SecondPassRow(
            aging=name,
            second_pass_s=values["second_pass_s"],
            of_batched_ratio=values["second_pass_s"] / batched,
            test_s=values["test_s"],
            rearm_s=values["rearm_s"],
            n_single_tests=round(values["single_tests"]),
            n_flush_requests=round(values["flush_requests"]),
            fault_ins=round(values["fault_ins"]),
        )
        for name, values in medians.items()
    ]


def _second_pass(
    pages: int, make: Callable[[int], Policy], kind: type[Reclaimer]
) -> dict[str, float]:
    """Return the time of the second pass, what took it, and what happened meanwhile."""
    params = guest_params(lambda p: {"scan_every": _STEPS, "scan_epochs": _STEPS}, pages)
    with booted(params | {"epochs": 0}) as machine:
        touched = int(Reclaimer(machine, None, 0).resident().sum())
        reclaimer = kind(machine, make(machine.memory.gfn_end), touched // 2, pages // _STEPS)
        before = machine.open_pager().counters()["fault_ins"]
        flushes = _remote_flushes(machine)
        walk_ns, rearm_ns = reclaimer.walk_ns, reclaimer.rearm_ns
        start = time.perf_counter()
        for _ in range(_STEPS):
            machine.run_epoch()
            reclaimer.run_pass()
        took = time.perf_counter() - start
        return {
            "second_pass_s": took,
            "test_s": (reclaimer.walk_ns - walk_ns) / 1e9,
            "rearm_s": (reclaimer.rearm_ns - rearm_ns) / 1e9,
            "flush_requests": _remote_flushes(machine) - flushes,
            "single_tests": reclaimer.tested if isinstance(reclaimer, PageByPage) else 0,
            "fault_ins": machine.open_pager().counters()["fault_ins"] - before,
        }


def _remote_flushes(machine: Machine) -> int:
    """Return KVM's own count of requests to flush the TLBs of all vCPUs."""
    if not isinstance(machine.engine, KvmEngine):
        raise TypeError(f"engine {machine.engine.name}: only kvm counts its flushes")
    with machine.engine.vm.stats() as stats:
        value = stats.read()["remote_tlb_flush_requests"].value
    return int(value) if isinstance(value, int) else 0
