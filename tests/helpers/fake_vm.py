"""A VM of plain Python behind the methods of a control client, and daemons over it.

tests/reclaim/test_control_contract.py runs the same tests over this fake and over the
client of a real VM.
"""

from __future__ import annotations

import types

import numpy as np

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.control import schema
from kvmhost.reclaim.context import DaemonContext
from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.settings.config import load
from kvmhost.reclaim.settings.options import Config
from kvmhost.reclaim.vm.session import Session
from kvmhost.units import Bytes, Mark, Seconds
from kvmhost.vm import Harvest

N, N_PINNED = 1000, 10


BUDGET = {
    "budget": Mark(size=Bytes(500 * 4096)),
    "high": Mark(size=Bytes(450 * 4096)),
    "low": Mark(size=Bytes(400 * 4096)),
}


def config(vm=None, **sections) -> Config:
    """Options by section; a budget of 500 pages with marks at 450 and 400."""
    return load(None, {"defaults": BUDGET | (vm or {})} | sections)


class FakeVm:
    """A guest of N pages, the first ten pinned; touches what ``touches`` says each window."""

    def __init__(self, name="fake"):
        self.vm = name
        self.here = np.ones(N, bool)
        self.touches = lambda window: range(100)
        self.window = 0
        self.asked, self.masks, self.victims, self.limit = [], [], None, None
        self.full_after, self.shrunk, self.over_pages = N, 0, 0
        self.trouble = {}
        self.paused = self.given_back = False
        self.vcpu_s, self.n_retouched, self.fault_ns = 1.0, 0, 0.0
        self.lease_asked, self.latency_ns, self.renewed = None, 0, 0

    def _meet(self, what):
        problem = self.trouble.get(what)
        if problem:
            raise problem

    def memory_map(self):
        self._meet("memory")
        regions = [schema.MemslotInfo(0, 0, N * 4096, 0, N, 0)]
        return schema.MemoryMap(4096, N, regions, [schema.PageRange(0, N_PINNED)])

    def take_lease(self, asked):
        self._meet("lease")
        self.lease_asked = asked

    def lease(self):
        self.renewed += 1
        asked = self.lease_asked
        if asked is None or self.given_back:
            return None
        return schema.LeaseInfo(asked.holder, 1, asked.socket, asked.ttl_s, 0.0, 0.0)

    def give_back_lease(self):
        self.given_back = True

    def counters(self):
        pager = {"latency_sum_ns": self.latency_ns, "latency_ns": [0, 1]}
        machine = schema.MachineCounters(0, 0, 1.0, N * 4096, vcpu_s=self.vcpu_s)
        totals = schema.HarvestTotals(0, 0, 0, 0, 0, n_retouched=self.n_retouched)
        return schema.Counters(machine, totals, pager)

    def rearm_cost(self):
        self._meet("cost")
        return schema.RearmCost("pagemap", self.fault_ns, False, 256, 7, 0.0)

    def set_limit(self, n_bytes):
        self._meet("limit")
        self.limit = n_bytes
        return n_bytes

    def shrink(self, n_bytes):
        self.shrunk += 1
        evicted = np.flatnonzero(self.here)[n_bytes // 4096 :]
        self.here[evicted] = False
        return schema.LimitState(n_bytes, len(evicted), self.over_pages)

    def harvest(
        self,
        gfn_start,
        n_pages,
        *,
        tracker,
        view="default",
        clear=True,
        rearm="young",
        fraction=None,
        mask=None,
        max_age_s=None,
    ):
        """Return what was touched since the last pass.

        A probe between two passes names pages and no age: nothing was touched since the last pass.
        """
        if mask is not None and max_age_s is None:
            return Harvest(_found(gfn_start, n_pages, []), 3000, 2000)
        self._meet("harvest")
        self.asked.append((gfn_start, n_pages, tracker, clear, rearm))
        self.masks.append(mask)
        young = list(self.touches(self.window))
        self.window += 1
        self.here[young] = True
        inside = [g for g in young if gfn_start <= g < gfn_start + n_pages]
        return Harvest(_found(gfn_start, n_pages, inside), 3000, 2000)

    def resident(self, gfn_start, n_pages):
        return self.here.copy()

    def evict(self, gfns, each=False):
        self._meet("evict")
        outcomes = np.where(self.here[gfns], 0, 2).astype(np.uint8)
        outcomes[gfns < N_PINNED] = 1
        outcomes[self.full_after :] = 3
        self.here[gfns[outcomes == 0]] = False
        names = ("done", "pinned", "absent", "full")
        codes = outcomes.tolist()
        counts = {names[code]: codes.count(code) for code in {0, *codes}}
        return schema.EvictReport(len(gfns), counts, outcomes.tobytes() if each else None)

    def set_victims(self, gfns):
        self.victims = gfns
        return len(gfns)

    def state(self):
        self._meet("state")
        return types.SimpleNamespace(running=True, paused=self.paused, vcpus=[0])

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


def make_session(vm, *, policy=None, **options):
    return Session(vm, DaemonContext.of(config(options)), policy)


class Events(list):
    """Collects reports; calls a function after each."""

    def __init__(self, then=lambda event: None):
        super().__init__()
        self._then = then

    def __call__(self, event):
        self.append(event)
        self._then(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


def make_daemon(vms, report, **daemon):
    """A daemon of some VMs, with passes a millisecond apart."""
    options = {"vms": vms, "interval": Seconds(0.001)} | daemon
    return Daemon(DaemonContext.of(config(daemon=options)), report)


def _found(gfn_start, n_pages, gfns):
    return YoungBitmap.from_gfns(
        gfn_start, n_pages, gfns, provenance=Provenance("pagemap", "npt", 1, 2)
    )
