"""What may happen to a VM, one class each: an operation to repeat, and its contract.

A new actor is a class with an entry in :data:`ACTORS`; ``tests/kvm/test_pairs.py`` then
runs it beside every other one. Whatever an operation may not do beside others is asserted
in ``act``; what must hold when everybody has stopped, in ``finish``.
"""

from __future__ import annotations

import abc
import fcntl
import os
import random
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hugepages import PIECE_BYTES, PIECE_PAGES, Window, reference_page
from pairs import (
    FIXED,
    GUEST,
    LIMIT_PAGES,
    MODEL,
    STALL_S,
    World,
    assert_hotcold_memory,
    fixed_pages,
    read_pages,
)

from kvmhost._ffi import lib
from kvmhost.errors import KvmHostError
from kvmhost.guests.workloads import hotcold_gfns
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapshot import save_machine
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import EvictOutcome, EvictResult, PageState
from kvmhost.units import PAGE_BYTES

__all__ = ["ACTORS", "Actor"]

#: Everything that is evicted: the guest's range, its notes, the VMM's pages, scratch.
_ALL = range(GUEST.start, 3600)


class Actor(abc.ABC):
    """Does one thing to a VM again and again, in a thread of its own.

    :ivar done: operations finished
    :ivar last: what it did last, for the report of a run that hangs
    """

    name: ClassVar[str]
    #: Operations that make a short run.
    operations: ClassVar[int] = 10
    engines: ClassVar[tuple[str, ...]] = ("kvm", "emulated")
    #: What it may cause beside others: names of ``EvictOutcome``, ``LEFT`` for pages that a
    #: restore leaves in the store, ``OVER`` for a limit that others exceed meanwhile.
    permits: ClassVar[frozenset[str]] = frozenset()
    #: Whether two of it at once mean something.
    twice: ClassVar[bool] = True

    def __init__(self, seed: int) -> None:
        self.done = 0
        self.last = "nothing"
        self.random = random.Random(seed)

    def options(self) -> dict[str, Any]:
        """Return what it needs of the machine's constructor."""
        return {}

    def enter(self, world: World) -> None:
        """Prepare, before the guest starts."""
        self.world = world

    @abc.abstractmethod
    def act(self) -> None:
        """Do one operation; waits only through :meth:`World.until`."""

    def finish(self) -> None:  # noqa: B027 - most have nothing to add
        """Check what must hold now that the guest stands at its doorbells, alone."""

    def close(self) -> None:  # noqa: B027
        """Free what it has; after the machine's end."""

    def window(self, n_pages: int, gfns: range = _ALL) -> range:
        """Return a random range of pages."""
        first = self.random.randrange(gfns.start, gfns.stop - n_pages)
        return range(first, first + n_pages)

    def evict(self, gfns: range) -> EvictResult:
        """Evict pages; each outcome must be one that somebody here may cause."""
        self.last = f"evict {gfns}"
        result = self.world.pager.evict(gfns)
        found = {EvictOutcome(int(o)) for o in np.unique(result.outcomes)}
        assert found <= self.world.permitted(), result.by_name()
        return result

    def restore(self, gfns: range) -> None:
        """Bring pages back; none may be lost."""
        self.last = f"restore {gfns}"
        result = self.world.pager.restore(gfns.start, len(gfns))
        assert result.lost == 0
        assert result.left == 0 or "LEFT" in self.world.permits


class Snapshot(Actor):
    """Saves the VM live, cancels a save now and then, and restores what it saved at the end."""

    name = "snapshot"
    operations = 3
    engines = ("kvm",)

    def enter(self, world: World) -> None:
        super().enter(world)
        self.saved: list[Path] = []
        self.folder = world.folder / f"snapshots-{id(self)}"
        self.folder.mkdir()

    def act(self) -> None:
        if self.done % 3 == 1:
            self.last = "cancel a save"
            answers = iter([False, True])
            path = self.folder / "cancelled"
            with pytest.raises(KvmHostError, match="cancelled"):
                save_machine(self.world.machine, path, cancelled=lambda: next(answers))
            return
        path = self.folder / f"{self.done}"
        self.last = f"save {path.name}"
        save_machine(self.world.machine, path)
        self.saved.append(path)
        for old in self.saved[:-2]:
            old.unlink(missing_ok=True)

    def finish(self) -> None:
        assert {path.name for path in self.folder.iterdir()} == {p.name for p in self.saved[-2:]}
        for path in self.saved[-2:]:
            self.check_restored(path)

    def check_restored(self, path: Path) -> None:
        """Run a restored VM to its doorbells, under a limit, and compare its memory."""
        self.last = f"restore {path.name}"
        with restore_machine(path, resident_max_bytes=LIMIT_PAGES * 4096) as machine:
            machine.step_by_doorbell()
            assert machine.run_epoch(STALL_S), machine.console_text()
            assert_hotcold_memory(machine)
            np.testing.assert_array_equal(read_pages(machine.memory, FIXED), fixed_pages(FIXED))
            assert machine.open_pager().counters()["resident_pages"] <= LIMIT_PAGES
            assert machine.run_epoch(STALL_S), machine.console_text()


class LimitChange(Actor):
    """Sets limits, low and high and none, and shrinks to them."""

    name = "limit"
    operations = 12

    def act(self) -> None:
        limit = self.random.choice((LIMIT_PAGES, 900, 1300, 2000, 0))
        self.last = f"limit {limit} and shrink"
        self.world.pager.set_limit(limit * 4096)
        shrunk = self.world.pager.shrink()
        if not {"FULL", "OVER", "ERROR", "STAYED"} & self.world.permits:
            assert shrunk.over_pages == 0
        if "FULL" in self.world.permits:
            # Where hardly a page can go, each fault evicts what the guest needs next: it
            # goes on, but so slowly that no run would end.
            self.world.pager.set_limit(0)


class Eviction(Actor):
    """Evicts pages of guest and VMM, restores some, reads some."""

    name = "evict"
    operations = 24
    permits = frozenset({"OVER"})

    def act(self) -> None:
        gfns = self.window(self.random.choice((1, 17, 100, 400)))
        self.evict(gfns)
        if self.done % 3 == 0:
            self.restore(self.window(64, gfns) if len(gfns) > 64 else gfns)
        if self.done % 3 == 1:
            fixed = self.window(32, FIXED)
            self.evict(fixed)
            self.last = f"read {fixed}"
            self.world.assert_fixed(fixed)


class Drop(Actor):
    """Declares pages free in whatever state they are: they read as zeros, others do not."""

    name = "drop"
    operations = 16
    permits = frozenset({"OVER"})
    n_pages = 96

    def enter(self, world: World) -> None:
        super().enter(world)
        self.first = world.take_scratch(self.n_pages)
        self.expected = np.zeros((self.n_pages, 512), dtype=np.uint64)

    def act(self) -> None:
        own = range(self.first, self.first + self.n_pages)
        for gfn in self.window(40, own):
            self.last = f"write gfn {gfn:#x}"
            page = np.full(512, self.done * 4096 + gfn, dtype="<u8")
            self.expected[gfn - self.first] = page
            # A read into guest memory: who waits for the page does not hold the interpreter.
            with self.world.machine.memory.view(gfn * PAGE_BYTES, PAGE_BYTES) as view:
                self.fill(view, page.tobytes())
        self.evict(self.window(30, own))
        gfns = self.window(25, own)
        self.last = f"drop {gfns}"
        result = self.world.pager.drop(gfns.start, len(gfns))
        assert (result.dropped, result.pinned, result.failed) == (len(gfns), 0, 0)
        self.expected[gfns.start - self.first : gfns.stop - self.first] = 0
        self.last = "read what it wrote and dropped"
        self.compare()

    @staticmethod
    def fill(view: memoryview, page: bytes) -> None:
        """Write a page by readv(2) from a memfd."""
        source = os.memfd_create("page")
        try:
            os.write(source, page)
            assert os.preadv(source, [view], 0) == PAGE_BYTES
        finally:
            os.close(source)

    def compare(self) -> None:
        """Compare every byte of its pages."""
        found = read_pages(self.world.machine.memory, range(self.first, self.first + self.n_pages))
        np.testing.assert_array_equal(found, self.expected, "written and dropped pages")

    def finish(self) -> None:
        self.compare()


class Harvest(Actor):
    """Harvests young pages and clears them; at doorbells, not one may be missing."""

    operations = 12
    tracker: ClassVar[str]

    def act(self) -> None:
        self.last = "harvest"
        young = self.harvest()
        assert young.shape == (len(GUEST),)

    def harvest(self) -> np.ndarray:
        """Return which pages of the range were young."""
        found = self.world.machine.harvest(GUEST.start, len(GUEST), tracker=self.tracker)
        return found.young.as_bool()

    def finish(self) -> None:
        """The epoch that runs now is seen as a whole: nothing else changes pages meanwhile."""
        machine = self.world.machine
        self.world.pager.set_limit(0)
        self.world.pager.restore(0, machine.memory.gfn_end)
        self.harvest()
        epochs = [vcpu.doorbells for vcpu in machine.vcpus]
        assert machine.run_epoch(STALL_S)
        young = self.harvest()
        for vcpu, epoch in enumerate(epochs):
            touched = hotcold_gfns(MODEL, epoch, len(epochs), vcpu) - GUEST.start
            assert young[touched].all(), f"{(~young[touched]).sum()} touched pages are not young"


class GuestptHarvest(Harvest):
    """Harvests the guest's own page tables."""

    name = "guestpt"
    tracker = "guestpt"


class PagemapHarvest(Harvest):
    """Harvests the host's page table, which it zaps."""

    name = "pagemap"
    tracker = "pagemap"


class PauseResume(Actor):
    """Pauses and resumes; while it holds the pause, the guest touches nothing."""

    name = "pause"
    operations = 10

    def act(self) -> None:
        machine = self.world.machine
        self.last = "pause"
        machine.pause()
        try:
            self.last = "look whether the guest stands still"
            assert machine.paused
            assert machine.still
            before = self.world.touches()
            for _ in range(50):
                assert self.world.touches() == before, "the guest runs while it is paused"
        finally:
            self.last = "resume"
            machine.resume()
        self.last = "wait until the guest goes on"
        self.world.until(lambda: self.world.touches() != before, "the guest goes on")


class StoreFailure(Actor):
    """The store fails: pages that it does not take stay, with their bytes."""

    name = "store-failure"
    operations = 12
    permits = frozenset({"ERROR"})

    def enter(self, world: World) -> None:
        super().enter(world)
        self.refused = 0

    def act(self) -> None:
        self.last = "let the store fail"
        self.world.pager.inject_failures(stores=self.random.randrange(1, 100))
        fixed = self.window(48, FIXED)
        self.refused += self.evict(fixed).count(EvictOutcome.ERROR)
        self.last = f"read {fixed}"
        self.world.assert_fixed(fixed)

    def finish(self) -> None:
        assert self.refused > 0
        # None was remembered as one that cannot go.
        self.world.pager.set_limit(0)
        self.restore(FIXED)
        result = self.evict(FIXED)
        assert result.count(EvictOutcome.ERROR) == 0
        assert result.count(EvictOutcome.DONE) == len(FIXED) or "FULL" in self.world.permits


class FullStore(Actor):
    """The store has a limit far below what is evicted: what finds no room stays."""

    name = "full-store"
    operations = 12
    permits = frozenset({"FULL"})
    twice = False

    def options(self) -> dict[str, Any]:
        return {"store": StoreOptions(limit_bytes=64 << 10)}

    def enter(self, world: World) -> None:
        super().enter(world)
        self.refused = 0

    def act(self) -> None:
        self.refused += self.evict(self.window(400)).count(EvictOutcome.FULL)
        assert self.world.pager.counters()["store_bytes"] <= 64 << 10
        self.restore(self.window(200))

    def finish(self) -> None:
        assert self.refused > 0
        self.world.pager.set_limit(0)
        self.restore(range(self.world.machine.memory.gfn_end))
        assert self.evict(FIXED).count(EvictOutcome.DONE) > 0


class NoMemory(Actor):
    """The host has no memory for a page that comes back: the fault waits and is served."""

    name = "enomem"
    operations = 6
    permits = frozenset({"LEFT"})

    def act(self) -> None:
        pager = self.world.pager
        waits = pager.counters()["memory_waits"]
        fixed = self.window(16, FIXED)

        def waited() -> bool:
            self.evict(fixed)
            # Six and not one: the first of them only makes the pager evict.
            pager.inject_failures(fills=6)
            self.last = f"read {fixed} without memory"
            self.world.assert_fixed(fixed)
            return pager.counters()["memory_waits"] > waits

        self.world.until(waited, "a fault that waits for memory")
        pager.inject_failures()


class FullConsole(Actor):
    """The guest talks, and nobody reads: it goes on, and what finds no room is counted."""

    name = "console"
    operations = 12
    twice = False

    def options(self) -> dict[str, Any]:
        self.ends = os.pipe()
        fcntl.fcntl(self.ends[1], fcntl.F_SETPIPE_SZ, PAGE_BYTES)
        return {"console_fd": self.ends[1], "params": {"say_every": 1}}

    def enter(self, world: World) -> None:
        super().enter(world)
        # The pipe, and the buffer in front of it.
        world.machine.serial.write(b"-" * (lib.KH_SINK_BYTES + 2 * PAGE_BYTES))

    def act(self) -> None:
        serial = self.world.machine.serial
        said, lost = serial.n_bytes, serial.lost_bytes
        self.last = f"wait for a line after {said} bytes"
        self.world.until(
            lambda: serial.n_bytes > said and serial.lost_bytes > lost, "lines of the guest"
        )

    def finish(self) -> None:
        serial = self.world.machine.serial
        assert serial.lost_bytes <= serial.n_bytes
        assert serial.write_error == 0

    def close(self) -> None:
        for end in self.ends:
            os.close(end)


class MemfdReader(Actor):
    """Reads the memfd and keeps references to pages, as DMA or another process would."""

    name = "reader"
    operations = 24
    permits = frozenset({"STAYED"})

    def enter(self, world: World) -> None:
        super().enter(world)
        (self.region,) = world.machine.memory.regions
        self.held: list[tuple[int, int]] = []

    def act(self) -> None:
        piece = self.random.randrange(GUEST.start, GUEST.stop, PIECE_PAGES)
        self.last = f"read 2 MiB from gfn {piece:#x} on"
        assert len(os.pread(self.region.memfd, PIECE_BYTES, piece * PAGE_BYTES)) == PIECE_BYTES
        self.read_fixed()
        # Through a mapping that the pager serves: a page that is out comes back for it.
        gfn = self.random.randrange(GUEST.start, GUEST.stop)
        self.last = f"hold gfn {gfn:#x}"
        self.held.append(reference_page(self.region.alias_address + gfn * PAGE_BYTES))
        if len(self.held) > 8:
            self.release(self.held.pop(0))

    def read_fixed(self) -> None:
        """Read pages of the VMM: each is there as a whole, or evicted as a whole."""
        raw = os.pread(self.region.memfd, len(FIXED) * PAGE_BYTES, FIXED.start * PAGE_BYTES)
        found = np.frombuffer(raw, dtype="<u8").reshape(-1, 512)
        there = found.any(axis=1)
        np.testing.assert_array_equal(found[there], fixed_pages(FIXED)[there])

    @staticmethod
    def release(ends: tuple[int, int]) -> None:
        """Give a reference back."""
        for end in ends:
            os.close(end)

    def finish(self) -> None:
        while self.held:
            self.release(self.held.pop())

    def close(self) -> None:
        self.finish()


class Collapse(Actor):
    """Makes huge pages of guest memory, where all of a piece is there."""

    name = "collapse"
    operations = 12
    permits = frozenset({"STAYED", "OVER"})

    def enter(self, world: World) -> None:
        super().enter(world)
        (region,) = world.machine.memory.regions
        self.pieces = [range(gfn, gfn + PIECE_PAGES) for gfn in GUEST[::PIECE_PAGES]]
        self.windows = [Window(region, piece.start * PAGE_BYTES) for piece in self.pieces]
        self.made = 0

    def act(self) -> None:
        number = self.random.randrange(len(self.pieces))
        self.restore(self.pieces[number])
        self.last = f"collapse {self.pieces[number]}"
        self.made += self.windows[number].collapse()

    def finish(self) -> None:
        """Alone it works, where the kernel can; and such pages are evicted as all others."""
        self.world.pager.set_limit(0)
        self.restore(self.pieces[0])
        can = self.windows[0].collapse()
        assert can or not self.made
        self.evict(self.pieces[0][100:200])
        states = self.world.pager.states()[self.pieces[0][100] : self.pieces[0][200]]
        assert can or (states == PageState.EVICTED).any()

    def close(self) -> None:
        for window in self.windows:
            window.close()


class Freeze(Actor):
    """Freezes the pager for a while: the guest goes on, and who asks the pager waits."""

    name = "freeze"

    def enter(self, world: World) -> None:
        super().enter(world)
        self.gfn = world.take_scratch(1)

    def act(self) -> None:
        pager, done = self.world.pager, threading.Event()
        asker = threading.Thread(target=lambda: (pager.evict([self.gfn]), done.set()))
        with pager.frozen():
            touched = self.world.touches()
            asker.start()
            self.last = "wait, frozen, for one who asks"
            self.world.until(lambda: done.is_set() or waits(asker), "one who asks waits")
            self.last = "wait, frozen, for touches of the guest"
            self.world.until(lambda: self.world.touches() > touched, "touches while frozen")
            assert not done.is_set(), "a page was evicted while the pager was frozen"
        self.last = "wait for the end of the request"
        self.world.until(done.is_set, "the request goes on")
        asker.join()


def waits(thread: threading.Thread) -> bool:
    """Whether a thread waits for a lock in the kernel."""
    path = Path(f"/proc/self/task/{thread.native_id}/syscall")
    return thread.native_id is not None and path.read_text().startswith("202 ")  # futex


ACTORS: dict[str, type[Actor]] = {
    actor.name: actor
    for actor in (
        Snapshot,
        LimitChange,
        Eviction,
        Drop,
        GuestptHarvest,
        PagemapHarvest,
        PauseResume,
        StoreFailure,
        FullStore,
        NoMemory,
        FullConsole,
        MemfdReader,
        Collapse,
        Freeze,
    )
}
