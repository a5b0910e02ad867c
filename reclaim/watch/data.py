"""The data of the live view, sampled once per tick; nothing here draws.

Each tick ends a window of the live view's own view of the VM, whatever daemons and records
read beside it. A window may end with the sweep of another reader. Another process has no pager
that can be asked: where its pages are is unknown.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost import trackers
from kvmhost.bitmap import unpack
from kvmhost.control.client import Client
from kvmhost.control.schema import MemoryMap, Residency, VmState
from kvmhost.errors import ControlError, InUseError, LayoutError, VmGoneError
from kvmhost.process.attach import Attached
from kvmhost.reclaim.control.client import DaemonClient
from kvmhost.reclaim.draw.parts import PageParts, joined_runs
from kvmhost.reclaim.errors import KernelFileError
from kvmhost.reclaim.pressure.psi import PsiMeter
from kvmhost.reclaim.record.meta import EVICTIONS
from kvmhost.timescale import scaled
from kvmhost.units import PAGE_BYTES
from kvmhost.vm import Harvest
from kvmhost.vm.names import METHODS, NOT_SEEN, SHARED_SWEEP

__all__ = [
    "RECENT",
    "SHOWN_EVENTS",
    "Generation",
    "Sample",
    "Subject",
    "WatchSampler",
    "parse_generations",
]

#: Number of ticks over which the working set is computed.
RECENT = 10
#: Length of the history of the working set: more than the columns of a wide terminal.
_HISTORY = 400
#: Upper bounds in ticks of the age ranges that are shown without a daemon.
_AGES = (1, 2, 4, 8, 16, 32, 64)
_NEVER = -(1 << 30)
#: A number that no event has: a request for residency and the number of the next event.
_NO_EVENTS = 1 << 51
#: Replies about events per tick: more come faster than they can be shown.
_MOST_REPLIES = 16
#: Events that are shown: evictions by whose decision they were, and refaults.
SHOWN_EVENTS = (*EVICTIONS, "refaulted")
#: Memory is in use or not in bins of so many pages.
_USED_BIN_PAGES = 512
#: Timeout of requests to the daemon, so that it cannot block the view.
_DAEMON_TIMEOUT_S = scaled(1.0)

Mask = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The pages of one generation, or of one range of ages."""

    label: str
    pages: int


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is watched: a VM, or another process.

    :param engine: empty for a process
    :param resident_bytes: None: unknown
    """

    name: str
    pid: int
    image: str
    engine: str
    paused: bool
    mem_bytes: int
    resident_bytes: int | None
    limit_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Sample:
    """One tick.

    :param young: mask of all pages from gfn 0
    :param resident: mask of the pages that are in memory; None: unknown
    :param evicted: mask of the pages in the pager's store, or in swap; None: unknown
    :param moved: by name of :data:`SHOWN_EVENTS`: mask of the pages that had it in this tick
    :param counts: by name of an event: how often it happened in this tick
    :param not_seen: what the tracker does not see; empty: nothing
    :param evictions: per second; None: the pager is not in use
    :param pressure: share of time that tasks waited for memory; None: not measured
    :param by_daemon: whether the generations come from a daemon
    """

    tick: int
    state: Subject
    young: Mask
    resident: Mask | None
    evicted: Mask | None
    moved: dict[str, Mask]
    counts: dict[str, int]
    not_seen: str
    wss_pages: int
    generations: list[Generation]
    by_daemon: bool
    pressure: float | None
    evictions: float | None
    faults: float | None
    evicted_pages: int
    tracker: str
    table_format: str
    harvest_ms: float
    rearm_ms: float
    window_s: float


class WatchSampler:
    """Samples a VM and the daemon that manages it, or a process, once per tick.

    :param view: the view of the VM that is read
    :param interval_s: between two ticks
    :param force: change the tracker also while others read by another one
    :raises VmGoneError: if the VM does not exist
    """

    def __init__(
        self,
        client: Client | Attached,
        tracker: str = "auto",
        *,
        view: str = "watch",
        interval_s: float = 1.0,
        force: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._view, self._clock = client, view, clock
        self._max_age_s, self._force = SHARED_SWEEP * interval_s, force
        self.tracker = tracker
        self._used = "auto"
        self._trackers: tuple[str, ...] = trackers.NAMES
        if isinstance(client, Attached):
            self._trackers = tuple(name for name in METHODS if name != "auto")
        self.memory: MemoryMap
        self._psi: PsiMeter | None = None
        with contextlib.suppress(KernelFileError):
            self._psi = PsiMeter()
        self.begin()

    @property
    def n_pages(self) -> int:
        """Number of pages from gfn 0, including holes."""
        return self.memory.gfn_end

    @property
    def is_process(self) -> bool:
        """Whether another process is watched: one that ended does not come back."""
        return isinstance(self._client, Attached)

    def begin(self) -> None:
        """Discard all ticks, for a new VM or a changed memory layout."""
        self.memory = self._client.memory_map()
        self.tick = 0
        self.last_young = np.full(self.n_pages, _NEVER, dtype=np.int32)
        self.history: collections.deque[int] = collections.deque(maxlen=_HISTORY)
        self.mapped = np.zeros(self.n_pages, dtype=bool)
        for memslot in self.memory.memslots:
            self.mapped[memslot.gfn_start : memslot.gfn_start + memslot.n_pages] = True
        self._before: tuple[float, dict[str, Any] | None] | None = None
        self._since: int | None = None
        self._ever_evicted = np.zeros(self.n_pages, dtype=bool)
        self._pid = 0

    def sample(self) -> Sample:
        """Take a sample.

        :raises VmGoneError: if the VM has exited
        :raises ControlError: if it rejects harvests
        :raises InUseError: if others read by another tracker; the next sample is by that one
        """
        state, subject = self._look_at()
        if self._pid not in (0, subject.pid) or self._client.memory_map() != self.memory:
            self.begin()
        self._pid = subject.pid
        found = self._harvest()
        young = found.young.as_bool()[: self.n_pages]
        self.tick += 1
        self.last_young[: young.size][young] = self.tick
        wss = int(np.count_nonzero(self.last_young > self.tick - RECENT))
        self.history.append(wss)
        generations, by_daemon = self._generations(state)
        evictions, faults, evicted, window_s = self._rates()
        source = found.young.provenance
        resident, evicted_mask, replies = self._residency()
        return Sample(
            tick=self.tick,
            state=subject,
            young=young,
            resident=resident,
            evicted=evicted_mask,
            moved=self._moved(replies),
            counts={
                name: sum(reply.counts.get(name, 0) for reply in replies) for name in SHOWN_EVENTS
            },
            not_seen=NOT_SEEN.get(source.tracker, ""),
            wss_pages=wss,
            generations=generations,
            by_daemon=by_daemon,
            pressure=self._pressure(),
            evictions=evictions,
            faults=faults,
            evicted_pages=evicted,
            tracker=source.tracker,
            table_format=source.table_format,
            harvest_ms=found.harvest_ns / 1e6,
            rearm_ms=found.rearm_ns / 1e6,
            window_s=window_s,
        )

    def _look_at(self) -> tuple[VmState | None, Subject]:
        """Return the state of the VM, None for a process, and what is shown of it."""
        client = self._client
        if isinstance(client, Attached):
            n_bytes = self.memory.gfn_end * PAGE_BYTES
            image = client.state().image
            return None, Subject(client.vm, client.pid, image, "", False, n_bytes, None, None)
        state = client.state()
        return state, Subject(
            state.name,
            state.pid,
            state.image,
            state.engine,
            state.paused,
            state.mem_bytes,
            state.resident_bytes,
            state.resident_max_bytes,
        )

    def _residency(self) -> tuple[Mask | None, Mask | None, list[Residency]]:
        """Return which pages are resident and evicted, and the events since the tick before."""
        client = self._client
        if isinstance(client, Attached):
            return None, None, []
        replies = [client.residency(_NO_EVENTS if self._since is None else self._since)]
        while replies[-1].left and len(replies) < _MOST_REPLIES:
            replies.append(client.residency(replies[-1].next))
        self._since, found = replies[-1].next, replies[-1]
        masks = np.zeros((2, self.n_pages), dtype=bool)
        for mask, bits in zip(masks, (found.resident, found.evicted), strict=True):
            known = unpack(np.frombuffer(bits, dtype="<u8"), 8 * len(bits))[: self.n_pages]
            mask[: known.size] = known
        self._ever_evicted |= masks[1]
        return masks[0], masks[1], replies

    def _moved(self, replies: list[Residency]) -> dict[str, Mask]:
        """Return the pages of each event; events without any page are left out."""
        moved: dict[str, Mask] = {}
        for reply in replies:
            for name in SHOWN_EVENTS:
                gfns = np.frombuffer(reply.gfns.get(name, b""), dtype="<u8")
                if gfns.size:
                    mask = moved.setdefault(name, np.zeros(self.n_pages, dtype=bool))
                    mask[gfns[gfns < self.n_pages].astype(np.int64)] = True
        return moved

    def used_parts(self) -> PageParts:
        """Return the parts of memory in use since the view began: all if that is most of it.

        Used are bins of 512 pages with a page that was young or evicted in a tick.
        """
        starts = np.arange(0, self.n_pages, _USED_BIN_PAGES)
        pages = (self.last_young > _NEVER) | self._ever_evicted
        runs = joined_runs(np.logical_or.reduceat(pages, starts))
        if runs is None:
            return PageParts(((0, self.n_pages),))
        size = _USED_BIN_PAGES
        return PageParts(tuple((a * size, min(b * size, self.n_pages)) for a, b in runs))

    def recent(self) -> Mask:
        """Return the pages that were young in any of the recent ticks."""
        return self.last_young > self.tick - RECENT

    def next_tracker(self, force: bool = False) -> str:
        """Switch to the next tracker and return its name; the next tick shows whether it works.

        :param force: also while others read by the one in use; it is put back at the end
        """
        names, self._force = self._trackers, force
        at = names.index(self.tracker) + 1 if self.tracker in names else 0
        self.tracker = names[at % len(names)]
        return self.tracker

    def _harvest(self) -> Harvest:
        force, self._force = self._force, False
        try:
            found = self._client.harvest(
                tracker=self.tracker, view=self._view, max_age_s=self._max_age_s, force=force
            )
        except InUseError:
            self.tracker = self._used
            raise
        self._used = self.tracker
        return found

    def _rates(self) -> tuple[float | None, float | None, int, float]:
        """Return evictions and faults per second, evicted pages, and the length of the tick."""
        client, now_s = self._client, self._clock()
        pager = None if isinstance(client, Attached) else client.counters().pager
        before, self._before = self._before, (now_s, pager)
        took_s = now_s - before[0] if before else 0.0
        if pager is None:
            return None, None, 0, took_s
        evicted = int(pager.get("evicted_pages", 0))
        if before is None or took_s <= 0:
            return 0.0, 0.0, evicted, took_s
        earlier = before[1] or {}
        evictions, faults = (
            max(0, pager.get(name, 0) - earlier.get(name, 0)) / took_s
            for name in ("evictions", "fault_ins")
        )
        return evictions, faults, evicted, took_s

    def _pressure(self) -> float | None:
        try:
            return self._psi.share() if self._psi else None
        except KernelFileError:
            return None

    def _generations(self, state: VmState | None) -> tuple[list[Generation], bool]:
        if state is not None and state.lease is not None and state.lease.socket:
            with contextlib.suppress(VmGoneError, ControlError, LayoutError):
                path = Path(state.lease.socket)
                with DaemonClient(path, timeout_s=_DAEMON_TIMEOUT_S) as daemon:
                    found = parse_generations(daemon.show_lru_gen(state.name))
                if found:
                    return found, True
        return self._ages(), False

    def _ages(self) -> list[Generation]:
        """Group pages by ticks since they were last young; the current tick is 1."""
        ages = self.tick + 1 - self.last_young[self.mapped]
        found, low = [], 0
        for top in _AGES:
            pages = int(np.count_nonzero((ages > low) & (ages <= top)))
            found.append(Generation(f"{top}" if top - low == 1 else f"{low + 1}-{top}", pages))
            low = top
        older = int(np.count_nonzero((ages > low) & (ages <= self.tick + 1)))
        never = int(np.count_nonzero(ages > self.tick + 1))
        return [*found, Generation(f">{low}", older), Generation("never", never)]


def parse_generations(text: str) -> list[Generation]:
    """Parse a daemon's generations, the youngest first; malformed lines are skipped."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and all(word.isdigit() for word in words):
            found.append(Generation(words[0], int(words[2]) + int(words[3])))
    return found[::-1]
