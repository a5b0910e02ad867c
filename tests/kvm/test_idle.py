"""The idle tracker against a fake of the kernel's files that real memory drives.

The fake keeps the kernel's rules: an idle flag a page (the first one of a huge
page only), set by writing 1 and untouched by writing 0, moved along when a page
moves, cleared by an access. An access is a real one: making a page idle zaps it in
the real guest mapping, and it counts as accessed once the host has mapped it again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost import doctor
from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Words, n_words, pack, unpack
from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns, touch_gfns
from kvmhost.machine import Machine
from kvmhost.trackers.idle import IDLE_BITMAP, IdleFiles, IdleTracker, Pfns
from kvmhost.trackers.sharing import SharedHarvests
from kvmhost.trackers.views import ViewKey
from kvmhost.vm.harvest import HarvestRequest

pytestmark = pytest.mark.requires_uffd

MEM_BYTES = 48 << 20
START, PAGES = 1029, 2043
FIRST_PFN = 0x40000
HEAD, TAIL = 1 << 15, 1 << 16
ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]


class FakeFiles:
    """pagemap, kpageflags and the idle bitmap over one region of a machine."""

    def __init__(self, machine: Machine, *, scattered: bool = True, seed: int = 1) -> None:
        self.region = machine.memory.regions[0]
        machine.open_userfault().silence_fault_around(self.region)
        n = self.region.n_pages
        order = np.random.default_rng(seed).permutation(n) if scattered else np.arange(n)
        self.pfn = (order + FIRST_PFN).astype(np.uint64)
        self.next_pfn = FIRST_PFN + n
        self.mapped = np.zeros(n, dtype=bool)
        self.idle = np.zeros(n, dtype=bool)
        self.huge = np.zeros(n, dtype=bool)
        self.off_lru = np.zeros(n, dtype=bool)
        self.on_read_idle: Callable[[], None] = lambda: None
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
        self.reads = 0

    def pfns(self, address: int, n_pages: int) -> Pfns:
        self._look()
        first = (address - self.region.guest_address) // 4096
        here = slice(first, first + n_pages)
        return np.where(self.mapped[here], self.pfn[here], 0).astype(np.uint64)

    def read_idle(self, indexes: Pfns) -> Words:
        assert (np.diff(indexes.astype(np.int64)) > 0).all(), "ascending, each once"
        self.on_read_idle()
        self._look()
        self.reads += 1
        words = np.zeros(indexes.size, dtype=np.uint64)
        for page in np.flatnonzero(self.idle & self._has_flag()):
            at = np.flatnonzero(indexes == self.pfn[page] // np.uint64(64))
            words[at] |= np.uint64(1) << self.pfn[page] % np.uint64(64)
        return words

    def write_idle(self, indexes: Pfns, words: Words) -> None:
        self._look()
        asked = {
            int(index) * 64 + bit
            for index, word in zip(indexes, words, strict=True)
            for bit in range(64)
            if int(word) >> bit & 1
        }
        for page in np.flatnonzero(self.mapped & self._has_flag() & ~self.off_lru):
            if int(self.pfn[page]) in asked:
                for member in self._members(page):
                    self.idle[member] = True
                    self._zap(member)

    def flags(self, pfns: Pfns) -> Words:
        where = {int(pfn): page for page, pfn in enumerate(self.pfn)}
        found = np.zeros(pfns.size, dtype=np.uint64)
        for i, pfn in enumerate(pfns):
            page = where.get(int(pfn))
            if page is not None and self.huge[page]:
                found[i] = HEAD if pfn % 512 == 0 else TAIL
        return found

    def close(self) -> None:
        if self.pagemap >= 0:
            fd, self.pagemap = self.pagemap, -1
            os.close(fd)

    def move(self, page: int) -> None:
        """Migrate a page: a new pfn, with the idle flag that it had."""
        self.pfn[page] = self.next_pfn
        self.next_pfn += 1

    def share(self, page: int, other: int) -> None:
        """Have one page of memory behind two pages of the guest, as merging does."""
        self.pfn[other] = self.pfn[page]

    def make_huge(self, first: int) -> None:
        """Lay 512 pages into one huge one."""
        self.next_pfn += -self.next_pfn % 512
        self.pfn[first : first + 512] = np.arange(self.next_pfn, self.next_pfn + 512)
        self.next_pfn += 512
        self.huge[first : first + 512] = True

    def _members(self, page: int) -> Iterable[int]:
        if not self.huge[page]:
            return np.flatnonzero(self.pfn == self.pfn[page]).tolist()
        first = page - int(self.pfn[page] % np.uint64(512))
        return range(first, first + 512)

    def _has_flag(self) -> np.ndarray:
        return ~self.huge | (self.pfn % np.uint64(512) == 0)

    def present_gfns(self) -> set[int]:
        """What the host maps now."""
        return set((np.flatnonzero(self._present()) + self.region.gfn).tolist())

    def _present(self) -> np.ndarray:
        words = np.zeros(n_words(self.region.n_pages), dtype=np.uint64)
        out = ffi.from_buffer("uint64_t[]", words)
        scan = lib.kh_pagemap_scan
        check(
            scan(self.pagemap, self.region.guest_address, self.region.n_pages, out), "PAGEMAP_SCAN"
        )
        return unpack(words, self.region.n_pages)

    def _look(self) -> None:
        """What is really mapped was accessed since it was last zapped."""
        present = self._present()
        self.mapped |= present
        self.idle &= ~present
        alike = np.unique(self.pfn, return_counts=True)
        shared = np.isin(self.pfn, alike[0][alike[1] > 1])
        for page in np.flatnonzero(present & (self.huge | shared)):
            self.idle[list(self._members(page))] = False

    def _zap(self, page: int) -> None:
        check(lib.kh_zap(self.region.guest_address + page * 4096, 1, ffi.NULL, 0), "madvise")


@pytest.fixture
def make_tracker() -> Iterator[Callable[..., tuple[Machine, FakeFiles, IdleTracker]]]:
    made: list[tuple[Machine, IdleTracker]] = []

    def make(
        engine: str = "auto", guest: str = "touch", n_vcpus: int = 1, **params: int
    ) -> tuple[Machine, FakeFiles, IdleTracker]:
        given = {"gfn_start": START, "pages": PAGES, "epochs": 0} | params
        image = image_path(guest)
        machine = Machine(image, mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=given)
        machine.step_by_doorbell()
        files = FakeFiles(machine)
        tracker = IdleTracker(machine.memory.regions, files)
        made.append((machine, tracker))
        return machine, files, tracker

    yield make
    for machine, tracker in made:
        tracker.stop()
        machine.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "params", [{}, {"stride": 3, "write": 1}, {"pattern": 2, "count": 200}, {"pattern": 1}]
)
def test_bits_equal_prediction(make_tracker: Callable, engine: str, params: dict) -> None:
    machine, _, tracker = make_tracker(engine, **params)
    machine.run_epoch()
    tracker.start()
    for epoch in range(1, 5):
        assert machine.run_epoch()
        young = tracker.harvest(START - 500, PAGES + 1000)
        assert young.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
        assert young.coarse is None
        assert tracker.harvest(START - 500, PAGES + 1000).count() == 0


@pytest.mark.requires_kvm
def test_hotcold_on_two_vcpus(make_tracker: Callable) -> None:
    params = {"pages": 3001, "hot": 400, "scan_every": 4, "scan_epochs": 2}
    machine, files, tracker = make_tracker("kvm", "hotcold", 2, **params)
    tracker.start()
    n_exact = epoch = 0
    deadline = time.monotonic() + DEADLINE_S
    while n_exact < 5:
        assert time.monotonic() < deadline, f"{n_exact} of {epoch} epochs without a lost mapping"
        assert machine.run_epoch()
        found = set(tracker.harvest(START, 3001).gfns().tolist())
        expected = set(hotcold_gfns(machine.params, epoch, 2).tolist())
        assert found <= expected
        # A page that lost its host mapping reads as old; on a busy nested host one does
        # in some hundred runs. The tracker may miss that, and nothing that is mapped.
        missing = expected - found
        assert not missing & files.present_gfns()
        n_exact += not missing
        epoch += 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("params", [{"stride": 3, "write": 1}, {"pattern": 2, "count": 200}])
def test_three_readers_at_different_intervals(
    make_tracker: Callable, engine: str, params: dict
) -> None:
    """As for the trackers that work on every kernel: bit for bit what the guest touched."""
    machine, _, tracker = make_tracker(engine, **params)
    machine.run_epoch()
    tracker.start()
    shared = SharedHarvests(machine.memory.gfn_end, lambda young: None)
    asked = HarvestRequest(START, PAGES).within(machine.memory.gfn_end)
    intervals = {"every": 1, "second": 2, "seldom": 5}
    expected: dict[str, set[int]] = {name: set() for name in intervals}
    for number, name in enumerate(intervals):
        assert not shared.harvest(tracker, ViewKey(number + 1, name), asked).young
    for epoch in range(1, 12):
        assert machine.run_epoch()
        for touched in expected.values():
            touched |= set(touch_gfns(machine.params, epoch).tolist())
        # The one that came last asks first, so that each of them sweeps in its turn.
        for number, name in reversed(list(enumerate(intervals))):
            if epoch % intervals[name]:
                continue
            young = shared.harvest(tracker, ViewKey(number + 1, name), asked).young
            assert young.coarse is None
            assert set(young.gfns().tolist()) == expected[name], (epoch, name)
            expected[name] = set()


def test_clear_false_and_masks(make_tracker: Callable) -> None:
    machine, _, tracker = make_tracker()
    machine.run_epoch()
    assert tracker.harvest(START, PAGES, clear=False).count() == PAGES
    asked = np.zeros(PAGES, dtype=bool)
    asked[np.random.default_rng(2).choice(PAGES, 777, replace=False)] = True
    assert tracker.harvest(START, PAGES, mask=pack(asked)).count() == PAGES
    assert np.array_equal(tracker.harvest(START, PAGES, clear=False).as_bool(), ~asked)


def test_pages_that_nobody_mapped_are_old(make_tracker: Callable) -> None:
    machine, _, tracker = make_tracker(pages=100)
    tracker.start()
    machine.run_epoch()
    assert tracker.harvest(START, PAGES).gfns().tolist() == list(range(START, START + 100))


def test_moved_pages_keep_their_answer(make_tracker: Callable) -> None:
    """Half the pages move between two harvests, with their flags."""
    machine, files, tracker = make_tracker(stride=2)
    machine.run_epoch()
    tracker.start()
    for page in range(START, START + PAGES, 3):
        files.move(page)
    assert tracker.harvest(START, PAGES).count() == 0
    machine.run_epoch()
    for page in range(START, START + PAGES, 5):
        files.move(page)
    young = tracker.harvest(START, PAGES)
    assert young.gfns().tolist() == touch_gfns(machine.params, 1).tolist()


def test_pages_that_move_while_they_are_looked_up(make_tracker: Callable) -> None:
    """Their old pfn has no flag or a stranger's; the second look gets the right one."""
    machine, files, tracker = make_tracker(stride=2)
    machine.run_epoch()
    tracker.start()
    machine.run_epoch()
    moves = iter([list(range(START, START + PAGES, 7)), [START + 1, START + 14]])

    def move_some() -> None:
        for page in next(moves, []):
            files.move(page)

    files.on_read_idle = move_some
    young = tracker.harvest(START, PAGES)
    assert young.gfns().tolist() == touch_gfns(machine.params, 1).tolist()
    assert young.coarse is None
    files.on_read_idle = lambda: None
    assert tracker.harvest(START, PAGES).count() == 0


def test_a_page_that_never_stands_still_is_young_and_coarse(make_tracker: Callable) -> None:
    machine, files, tracker = make_tracker()
    machine.run_epoch()
    tracker.start()
    files.on_read_idle = lambda: files.move(START + 9)
    young = tracker.harvest(START, PAGES)
    assert young.gfns().tolist() == [START + 9]
    assert np.flatnonzero(young.coarse_as_bool()).tolist() == [9]


def test_a_shared_page_is_young_wherever_it_is_mapped(make_tracker: Callable) -> None:
    """One flag, two guest pages: a touch of either shows at both, and one mark is enough."""
    machine, files, tracker = make_tracker(stride=10)
    files.share(START + 20, START + 33)
    files.share(START + 41, START + 42)
    machine.run_epoch()
    files.mapped[[START + 33, START + 41, START + 42]] = True
    tracker.start()
    assert tracker.harvest(START, PAGES).count() == 0
    machine.run_epoch()
    expected = sorted([*touch_gfns(machine.params, 1).tolist(), START + 33])
    assert tracker.harvest(START, PAGES, clear=False).gfns().tolist() == expected
    asked = np.zeros(PAGES, dtype=bool)
    asked[33] = True
    tracker.harvest(START, PAGES, mask=pack(asked))
    left = [gfn for gfn in expected if gfn not in (START + 20, START + 33)]
    assert tracker.harvest(START, PAGES).gfns().tolist() == left


def test_pages_that_cannot_be_made_idle_read_as_young(make_tracker: Callable) -> None:
    machine, files, tracker = make_tracker(stride=100)
    machine.run_epoch()
    files.off_lru[[START, START + 500]] = True
    tracker.start()
    assert tracker.harvest(START, PAGES).gfns().tolist() == [START, START + 500]
    files.off_lru[START] = False
    tracker.harvest(START, PAGES)
    assert tracker.harvest(START, PAGES).gfns().tolist() == [START + 500]


def test_tails_without_a_head_nearby_do_not_mark_another_page(make_tracker: Callable) -> None:
    """A gigantic page: its head lies beyond 2 MiB, and its flag is nobody else's."""
    machine, files, tracker = make_tracker(pages=600)
    files.make_huge(START)
    files.pfn[START : START + 512] += 512  # no member is at a multiple of 512 any more
    files.pfn[START : START + 512] += 1
    machine.run_epoch()
    marked: list[int] = []
    write = files.write_idle

    def note(indexes: Pfns, words: Words) -> None:
        marked.extend(int(i) * 64 + b for i, w in zip(indexes, words, strict=True)
                      for b in range(64) if int(w) >> b & 1)  # fmt: skip
        write(indexes, words)

    files.write_idle = note  # type: ignore[method-assign]
    tracker.harvest(START, PAGES)
    assert 0 not in marked
    assert set(marked) <= set(files.pfn.tolist())


def test_a_mapping_by_its_address(make_tracker: Callable) -> None:
    """The same for a mapping of whatever process the files look at."""
    machine, files, _ = make_tracker(stride=7)
    tracker = IdleTracker.on_mapping(files.region.guest_address, files.region.n_pages, files)
    machine.run_epoch()
    tracker.start()
    machine.run_epoch()
    young = tracker.harvest(START, PAGES)
    assert young.gfns().tolist() == touch_gfns(machine.params, 1).tolist()


def test_huge_pages_are_coarse(make_tracker: Callable) -> None:
    machine, files, tracker = make_tracker(stride=1000)
    files.make_huge(START + 900)
    machine.run_epoch()
    files.mapped[START + 900 : START + 1412] = True  # a huge page is mapped as one
    tracker.start()
    assert tracker.harvest(START, PAGES).count() == 0
    machine.run_epoch()
    young = tracker.harvest(START, PAGES)
    # Touched: +0, +1000 (in the huge page) and +2000.
    huge = list(range(START + 900, START + 1412))
    assert young.gfns().tolist() == [START, *huge, START + 2000]
    assert (np.flatnonzero(young.coarse_as_bool()) + START).tolist() == huge
    # Asking for one page of it clears the whole.
    machine.run_epoch()
    asked = np.zeros(PAGES, dtype=bool)
    asked[1200] = True
    assert tracker.harvest(START, PAGES, mask=pack(asked)).count() == 514
    assert tracker.harvest(START, PAGES).gfns().tolist() == [START, START + 2000]


def test_bits_are_asked_for_64_at_a_time(make_tracker: Callable) -> None:
    machine, files, tracker = make_tracker()
    files.pfn = np.arange(files.pfn.size, dtype=np.uint64) + np.uint64(FIRST_PFN)
    asked: list[int] = []
    read = files.read_idle

    def count(indexes: Pfns) -> Words:
        asked.append(indexes.size)
        return read(indexes)

    files.read_idle = count  # type: ignore[method-assign]
    machine.run_epoch()
    tracker.harvest(START, PAGES)
    # One word for 64 pages; one more where the run begins inside a word; one for pfn 0.
    assert asked[0] <= PAGES // 64 + 3


def test_real_files_read_and_write_whole_words(tmp_path: Path) -> None:
    """Ordinary files in place of the kernel's, with neighbours, gaps and an end."""
    content = np.random.default_rng(4).integers(0, 2**63, 2000).astype("<u8")
    bitmap, flags = tmp_path / "bitmap", tmp_path / "flags"
    bitmap.write_bytes(content.tobytes())
    flags.write_bytes(content.tobytes())
    files = IdleFiles(bitmap, Path("/proc/self/pagemap"), flags)
    indexes = np.array([0, 1, 2, 700, *range(900, 1600), 1999, 2000, 5000], dtype=np.uint64)
    expected = np.concatenate([content, np.zeros(3001, dtype="<u8")])[indexes.astype(int)]
    assert files.read_idle(indexes).tolist() == expected.tolist()
    assert files.flags(indexes).tolist() == expected.tolist()
    where = np.array([3, 4, 5, 1200], dtype=np.uint64)
    files.write_idle(where, np.array([7, 8, 9, 10], dtype=np.uint64))
    content[[3, 4, 5, 1200]] = [7, 8, 9, 10]
    assert bitmap.read_bytes() == content.tobytes()
    files.close()
    files.close()


@pytest.mark.requires_root
def test_real_pagemap_tells_distinct_pfns(tmp_path: Path) -> None:
    for name in ("bitmap", "flags"):
        (tmp_path / name).write_bytes(bytes(8))
    files = IdleFiles(tmp_path / "bitmap", Path("/proc/self/pagemap"), tmp_path / "flags")
    with Machine(image_path("touch"), mem_bytes=MEM_BYTES, engine="emulated") as machine:
        region = machine.memory.regions[0]
        for page in (5, 6, 900):
            machine.memory[(8000 + page) * 4096 : (8000 + page) * 4096 + 1] = b"x"
        found = files.pfns(region.alias_address + 8000 * 4096, 1000)
        assert {5, 6, 900} <= set(np.flatnonzero(found).tolist())
        assert np.unique(found[[5, 6, 900]]).size == 3
        assert not files.pfns(region.guest_address + 8000 * 4096, 1000).any()
    files.close()


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdleTracker, "open_files", lambda: IdleFiles(tmp_path / "none"))
    support = IdleTracker.probe()
    assert not support.works
    assert str(tmp_path / "none") in support.reason
    with pytest.raises(CapabilityError) as caught:
        IdleFiles(tmp_path / "none")
    assert str(caught.value) == (
        f"tracker idle needs {tmp_path / 'none'}, which does not exist; "
        "enable CONFIG_IDLE_PAGE_TRACKING or use --tracker pagemap"
    )


def test_doctor_tells_what_this_kernel_lacks() -> None:
    found = {f.name: f for f in doctor.probe_host() if f.area == "tracker"}["idle"]
    assert found.works == IDLE_BITMAP.exists()
    if not found.works:
        assert "CONFIG_IDLE_PAGE_TRACKING" in found.found


def test_bad_arguments_are_refused(make_tracker: Callable) -> None:
    _, _, tracker = make_tracker()
    with pytest.raises(LayoutError):
        tracker.harvest(-1, 5)
    with pytest.raises(LayoutError):
        tracker.harvest(0, 64, mask=np.zeros(2, dtype=np.uint64))
