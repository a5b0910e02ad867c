"""A machine of plain Python behind a real control server: no KVM, no userfaultfd."""

from __future__ import annotations

import threading
import time
import types

import numpy as np
import pytest

from kvmhost.bitmap import Provenance, YoungBitmap, unpack
from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.control.server import ControlServer
from kvmhost.errors import CapabilityError
from kvmhost.machine import BaseMachine
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.memory.layout import TinyLayout
from kvmhost.pager.results import (
    EvictOutcome,
    EvictResult,
    PageEvent,
    PageEvents,
    PageState,
    RestoreResult,
    ShrinkResult,
)
from kvmhost.trackers.harvesting import Harvester

GFN_HIGH = 0x4000


class FakeTracker:
    table_format = "npt"
    evidence = ""

    def __init__(self, name):
        self.name, self.young, self.rearmed = name, set(), []

    def harvest(self, gfn_start, n_pages, clear=True, mask=None):
        found = sorted(g for g in self.young if gfn_start <= g < gfn_start + n_pages)
        asked = np.ones(n_pages, bool) if mask is None else unpack(mask, n_pages)
        if clear:
            self.young -= {g for g in found if asked[g - gfn_start]}
        return YoungBitmap.from_gfns(
            gfn_start,
            n_pages,
            found,
            provenance=Provenance(self.name, "npt", 10, time.monotonic_ns(), self.evidence),
        )

    def rearm(self, gfn_start, n_pages, young=None):
        self.rearmed.append((gfn_start, n_pages, None if young is None else young.gfns().tolist()))


class FakePager:
    def __init__(self, memory):
        self._memory = memory
        self.out, self.pinned = set(), {1}
        self.victims, self.resident_max_bytes = [], 0
        self.error = None
        self.log = []

    def evict(self, pages, event=PageEvent.EVICTED_REQUEST):
        gfns = pages.gfns
        if self.error:
            raise self.error
        outcomes = np.zeros(gfns.size, dtype=np.uint8)
        for i, gfn in enumerate(gfns.tolist()):
            if gfn in self.pinned:
                outcomes[i] = EvictOutcome.PINNED
            elif gfn in self.out:
                outcomes[i] = EvictOutcome.ABSENT
            else:
                self.log.append((gfn, event))
            self.out |= {gfn} - self.pinned
        return EvictResult(gfns, outcomes)

    def restore(self, gfn, n_pages=1):
        back = {g for g in self.out if gfn <= g < gfn + n_pages}
        self.out -= back
        return RestoreResult(len(back), lost=0, left=0)

    def events(self, since=0, most=None):
        part = self.log[since:][:most]
        return PageEvents(
            np.array([gfn for gfn, _ in part], dtype=np.int64),
            np.array([event for _, event in part], dtype=np.uint8),
            since + len(part),
            0,
            len(self.log) - since - len(part),
        )

    def states(self):
        return np.array(
            [
                self.state(gfn)
                for region in self._memory.regions
                for gfn in range(region.gfn, region.gfn + region.n_pages)
            ],
            dtype=np.uint8,
        )

    def drain(self):
        self.resident_max_bytes, self.victims = 0, []
        return self.restore(0, 1 << 40)

    def page_out(self, gfns):
        raise CapabilityError("host swap", "free swap space", "none", "add swap, or evict")

    def shrink(self):
        return ShrinkResult(7, over_pages=2)

    def set_limit(self, resident_max_bytes):
        self.resident_max_bytes = resident_max_bytes & -4096

    def set_victims(self, pages):
        self.victims = pages.gfns.tolist()

    def state(self, gfn):
        return PageState.EVICTED if gfn in self.out else PageState.RESIDENT

    def stored_bytes(self, gfn):
        return 8 if gfn in self.out else 0

    def note_young(self, young):
        self.noted = young.gfns().tolist()

    def counters(self):
        return {"evictions": len(self.out)}


class FakeHarvester(Harvester):
    """The real order of a harvest, on the fake trackers of a machine."""

    def __init__(self, machine):
        super().__init__(types.SimpleNamespace(memory=machine.memory), machine.note_young)
        self._machine = machine

    @property
    def tracker_name(self):
        return self._machine.tracker_name

    def _source(self, asked, key):
        wanted = self.tracker_name if asked.tracker == "auto" else asked.tracker
        return self._machine.use_tracker(wanted or "auto")


class FakeMachine(BaseMachine):
    """What the control server uses of a machine. Two regions with a hole between them."""

    # In place of properties of a machine.
    running, status, error, has_pager = True, None, None, False
    uptime_s, exits, doorbells = 1.5, 3, 2

    def __init__(self, name="fake"):
        self.name, self._closed = name, False
        self._opening = threading.RLock()
        self.layout = TinyLayout(4 << 20)
        self.memory = GuestMemory([Region(0, 4 << 20), Region(GFN_HIGH << 12, 1 << 20)])
        self.engine = types.SimpleNamespace(name="fake")
        self.image = types.SimpleNamespace(path="fake.elf")
        self.params = {"seed": 1}
        self.vcpus = [types.SimpleNamespace(index=0, exits=3, doorbells=2, epoch=1)]
        self.serial = types.SimpleNamespace(n_bytes=27, lost_bytes=4)
        self.runner = types.SimpleNamespace(cpu_seconds=lambda: 0.5)
        self.pauses = 0
        self.tracker = None
        self.pager_problem = None
        self.hold = None
        self._harvester = FakeHarvester(self)
        self._pager = FakePager(self.memory)

    def describe_vcpus(self) -> dict[int, str]:
        return {0: "vCPU 0 stands"}

    @property
    def still(self):
        return self.pauses > 0

    @property
    def paused(self):
        return self.pauses > 0

    def open_pager(self):
        if self.pager_problem:
            raise self.pager_problem
        self.has_pager = True
        return self._pager

    def use_tracker(self, name="auto"):
        if self.hold:
            self.hold()
        wanted = "guestpt" if name == "auto" else name
        if wanted == "broken":
            raise CapabilityError("broken", "a tracker", "none", "take another")
        if self.tracker is None or self.tracker.name != wanted:
            self.tracker = FakeTracker(wanted)
        return self.tracker

    @property
    def tracker_name(self):
        return self.tracker and self.tracker.name

    def assemble(self):
        return self.vcpus

    def note_young(self, young):
        if self.has_pager:
            self._pager.note_young(young)

    def pause(self):
        self.pauses += 1
        return self.run_state()

    def resume(self):
        self.pauses = max(0, self.pauses - 1)
        return self.run_state()

    def stop(self):
        self.running = False
        return self.run_state()

    def close(self):
        self.memory.close()


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(path))
    return path


@pytest.fixture
def machine():
    fake = FakeMachine()
    yield fake
    fake.close()


@pytest.fixture
def serve(machine):
    """Start a control server with settings; closed at the end."""
    servers = []

    def start(**settings):
        server = ControlServer(machine, **settings).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()
