"""The pagemap tracker: buffers that grow, plain reads, coarse cases, states of pages."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import Words, n_words, pack, unpack
from kvmhost.errors import CapabilityError, IoctlError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import touch_gfns
from kvmhost.machine import Machine
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.pager.userfault import Userfault
from kvmhost.trackers.pagemap import PagemapTracker
from kvmhost.trackers.pagescan import PLAIN_PAGEMAP_ENV, new_scanner, page_states, scans

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
START, PAGES = 1029, 2043
HUGE_BYTES = 2 << 20
MADV_PAGEOUT, MADV_COLLAPSE, MAP_FIXED = 21, 25, 0x10

libc = ctypes.CDLL(None, use_errno=True)
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p


@pytest.fixture
def pagemap() -> Iterator[int]:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


def need_scan(fd: int) -> None:
    if not scans(fd):
        pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7); plain reads are tested")


def out(words: Words):
    return ffi.from_buffer("uint64_t[]", words)


def touch(address: int, page: int) -> None:
    ctypes.c_uint8.from_address(address + page * 4096).value = 1


def touch_machine(engine: str = "auto", **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 0} | params
    machine = Machine(image_path("touch"), mem_bytes=48 << 20, engine=engine, params=given)
    machine.step_by_doorbell()
    return machine


@pytest.mark.parametrize("start_regions", [1, 2, 7, 64])
@pytest.mark.parametrize("max_regions", [1, 100, 5000])
def test_alternating_pages_through_a_tiny_buffer(
    pagemap: int, start_regions: int, max_regions: int
) -> None:
    """Every region is one page: the buffer fills, grows to its bound, and resumes."""
    need_scan(pagemap)
    n_pages = 6000
    region = Region(0, n_pages * 4096)
    try:
        for page in range(0, n_pages, 2):
            touch(region.guest_address, page)
        scanner = lib.kh_scanner_new(start_regions, max_regions)
        try:
            for _ in range(2):
                words = np.zeros(n_words(n_pages), dtype=np.uint64)
                bits = ffi.new("struct kh_page_bits *", {"present": out(words)})
                address = region.guest_address
                found = lib.kh_scanner_scan(scanner, pagemap, address, n_pages, bits)
                assert found == lib.KH_PAGES_PRESENT
                assert np.flatnonzero(unpack(words, n_pages)).tolist() == list(range(0, 6000, 2))
            bound = max(start_regions, max_regions)
            grown = lib.kh_scanner_regions(scanner)
            assert grown == bound if bound <= 100 else start_regions < grown <= bound
            assert lib.kh_scanner_calls(scanner) >= 3000 // bound
        finally:
            lib.kh_scanner_free(scanner)
    finally:
        region.close()


def test_a_scan_agrees_with_plain_reads_on_random_pages(pagemap: int) -> None:
    need_scan(pagemap)
    n_pages = 5003
    region = Region(0, n_pages * 4096)
    try:
        rng = np.random.default_rng(7)
        touched = np.sort(rng.choice(n_pages, 1700, replace=False))
        for page in touched:
            touch(region.guest_address, int(page))
        scanned = page_states(pagemap, region.guest_address, n_pages, new_scanner(n_pages, 3))
        read = page_states(pagemap, region.guest_address, n_pages)
        assert np.flatnonzero(scanned.present).tolist() == touched.tolist()
        assert np.array_equal(scanned.present, read.present)
        assert not scanned.swapped.any()
        assert not read.swapped.any()
    finally:
        region.close()


def test_the_scan_buffer_stays_under_a_thousandth_of_memory(pagemap: int) -> None:
    need_scan(pagemap)
    n_pages = 1 << 16
    region = Region(0, n_pages * 4096)
    try:
        for page in range(0, n_pages, 2):
            touch(region.guest_address, page)
        scanner = new_scanner(n_pages)
        page_states(pagemap, region.guest_address, n_pages, scanner)
        held = lib.kh_scanner_regions(scanner) * 24 + 3 * n_words(n_pages) * 8
        assert held <= n_pages * 4096 // 1000
        assert lib.kh_scanner_regions(scanner) == n_pages // 64
    finally:
        region.close()


def test_a_scan_outside_user_memory_is_an_error(pagemap: int) -> None:
    need_scan(pagemap)
    with pytest.raises(IoctlError) as caught:
        page_states(pagemap, 1 << 63, 8, new_scanner(8))
    assert caught.value.errno in (errno.EFAULT, errno.EINVAL, errno.ENOMEM)


@pytest.mark.requires_uffd
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("params", [{}, {"stride": 2}, {"pattern": 2, "count": 300, "write": 1}])
def test_forced_plain_reads_equal_prediction(
    engine: str, params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLAIN_PAGEMAP_ENV, "1")
    with touch_machine(engine, **params) as machine:
        used = machine.use_tracker("pagemap")
        assert isinstance(used, PagemapTracker)
        assert not used.scans
        for epoch in range(3):
            assert machine.run_epoch()
            young = used.harvest(START, PAGES)
            assert young.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
            assert young.coarse is None
            assert used.harvest(START, PAGES).count() == 0


def no_write_protection(self: Userfault, region: Region) -> None:
    raise CapabilityError("userfaultfd", "write-protect", "nothing", "none")


@pytest.mark.requires_uffd
@pytest.mark.parametrize("engine", ENGINES)
def test_without_userfaultfd_all_bits_are_coarse(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault-around is on: blocks of 64 KiB come back, and no bit claims to be a page's."""
    monkeypatch.setattr(Userfault, "silence_fault_around", no_write_protection)
    with touch_machine(engine, stride=37) as machine:
        # Fault-around maps what the memfd holds: let every page be there.
        machine.memory[START << 12 : (START + PAGES) << 12] = bytes(PAGES << 12)
        used = machine.use_tracker("pagemap")
        for epoch in range(3):
            assert machine.run_epoch()
            young = used.harvest(START, PAGES)
            touched = touch_gfns(machine.params, epoch)
            assert set(touched.tolist()) <= set(young.gfns().tolist())
            assert young.count() > touched.size
            assert young.coarse is not None
            assert np.array_equal(young.coarse, young.words)
            assert used.harvest(START, PAGES).count() == 0


class Host:
    """What a tracker needs of a machine: one region, touched by the test itself."""

    def __init__(self, region: Region, userfault: bool = False) -> None:
        self.memory = GuestMemory([region])
        self._userfault = Userfault() if userfault else None

    def open_userfault(self) -> Userfault:
        if self._userfault is None:
            raise CapabilityError("userfaultfd", "write-protect", "nothing", "none")
        return self._userfault

    def close(self) -> None:
        if self._userfault is not None:
            self._userfault.close()
        self.memory.close()


class HugeRegion(Region):
    """A region whose guest mapping begins at a multiple of 2 MiB, and can be collapsed."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__(0, n_bytes)
        lib.kh_unmap(self.guest_address, n_bytes)
        self._room = mmap.mmap(-1, n_bytes + HUGE_BYTES, mmap.MAP_PRIVATE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self.guest_address = -(-at // HUGE_BYTES) * HUGE_BYTES
        flags = mmap.MAP_SHARED | MAP_FIXED
        got = libc.mmap(self.guest_address, n_bytes, 3, flags, self.memfd, 0)
        assert got == self.guest_address

    def collapse(self, first: int) -> None:
        """Make one huge page of 512, the first of them ``first``."""
        start = self.guest_address + first * 4096
        ctypes.memset(start, 1, HUGE_BYTES)
        if libc.madvise(start, HUGE_BYTES, MADV_COLLAPSE):
            reason = os.strerror(ctypes.get_errno())
            pytest.skip(f"no huge page to be had here: madvise(MADV_COLLAPSE): {reason}")


@pytest.fixture
def huge(pagemap: int) -> Iterator[tuple[HugeRegion, PagemapTracker]]:
    """Four times 2 MiB, the second one huge in the host, and a tracker that has begun."""
    need_scan(pagemap)
    region = HugeRegion(4 * HUGE_BYTES)
    host = Host(region)
    tracker = PagemapTracker(host.memory, host.open_userfault)
    tracker.start()
    tracker.coarse = False  # fault-around plays no part: the test maps all around it
    region.collapse(512)
    yield region, tracker
    tracker.stop()
    host.close()


def refault(region: HugeRegion, page: int) -> None:
    """Touch one page; the kernel maps the huge page that holds it whole again."""
    touch(region.guest_address, page)


def test_huge_host_pages_are_coarse(huge: tuple[HugeRegion, PagemapTracker]) -> None:
    region, tracker = huge
    states = tracker.states(0, 2048)
    assert np.flatnonzero(states.huge).tolist() == list(range(512, 1024))
    touch(region.guest_address, 3)
    young = tracker.harvest(0, 2048)
    assert young.gfns().tolist() == [3, *range(512, 1024)]
    assert np.flatnonzero(young.coarse_as_bool()).tolist() == list(range(512, 1024))
    assert tracker.harvest(0, 2048).count() == 0
    refault(region, 700)
    young = tracker.harvest(0, 2048)
    assert young.gfns().tolist() == list(range(512, 1024))
    assert young.coarse_as_bool().sum() == 512


@pytest.mark.parametrize(
    ("first", "n_pages"), [(600, 10), (500, 100), (1000, 100), (500, 1000), (512, 512), (1023, 1)]
)
def test_a_huge_page_is_cleared_whole_by_a_range_that_cuts_it(
    huge: tuple[HugeRegion, PagemapTracker], first: int, n_pages: int
) -> None:
    region, tracker = huge
    touch(region.guest_address, 499)
    touch(region.guest_address, 1500)
    inside = np.arange(max(first, 512), min(first + n_pages, 1024))
    young = tracker.harvest(first, n_pages)
    assert young.gfns().tolist() == inside.tolist()
    assert (np.flatnonzero(young.coarse_as_bool()) + first).tolist() == inside.tolist()
    # The rest of the huge page went with it, and nothing else did.
    assert tracker.harvest(0, 2048).gfns().tolist() == [499, 1500]


def test_one_page_of_a_mask_clears_the_huge_page(
    huge: tuple[HugeRegion, PagemapTracker],
) -> None:
    region, tracker = huge
    touch(region.guest_address, 100)
    asked = np.zeros(2048, dtype=bool)
    asked[900] = True
    assert tracker.harvest(0, 2048, mask=pack(asked)).count() == 513
    assert tracker.harvest(0, 2048, clear=False).gfns().tolist() == [100]
    asked[:] = False
    asked[100] = True
    refault(region, 512)
    assert tracker.harvest(0, 2048, mask=pack(asked)).count() == 513
    assert tracker.harvest(0, 2048, clear=False).count() == 512


ENTRIES = {
    "absent": 0,
    "present": lib.KH_PAGEMAP_PRESENT | 0x1234,
    "present, dirty, exclusive": lib.KH_PAGEMAP_PRESENT | 1 << 55 | 1 << 56 | 1 << 61,
    "swapped": lib.KH_PAGEMAP_SWAPPED | 5 | 0x400 << 5,
    "swapped, soft-dirty": lib.KH_PAGEMAP_SWAPPED | lib.KH_PAGEMAP_SOFT_DIRTY,
    "marker of userfaultfd": lib.KH_PAGEMAP_SWAPPED | 1 << 57,
    "soft-dirty only": lib.KH_PAGEMAP_SOFT_DIRTY,
}


@pytest.mark.parametrize("first", [0, 1, 63, 130])
def test_entries_are_decoded(first: int) -> None:
    names = list(ENTRIES) * 30
    entries = np.array([ENTRIES[name] for name in names], dtype=np.uint64)
    words = np.zeros((2, n_words(first + len(names))), dtype=np.uint64)
    bits = ffi.new("struct kh_page_bits *", {"present": out(words[0]), "swapped": out(words[1])})
    found = lib.kh_pagemap_decode(out(entries), first, len(names), bits)
    assert found == lib.KH_PAGES_PRESENT | lib.KH_PAGES_SWAPPED
    kinds = {"present": ("present",), "swapped": ("swapped", "marker")}
    for row, starts in zip(words, kinds.values(), strict=True):
        got = np.flatnonzero(unpack(row, first + len(names))) - first
        assert got.tolist() == [i for i, name in enumerate(names) if name.startswith(starts)]


@pytest.mark.requires_uffd
@pytest.mark.parametrize("plain", [False, True])
def test_real_entries_that_are_not_present(pagemap: int, plain: bool) -> None:
    """Swap entries without swap: the markers where write-protected pages were zapped."""
    if not plain:
        need_scan(pagemap)
    region = Region(0, 600 * 4096)
    host = Host(region, userfault=True)
    host.open_userfault().silence_fault_around(region)
    for page in range(0, 600, 3):
        touch(region.guest_address, page)
    start, length = region.guest_address + 100 * 4096, 200 * 4096
    check(
        lib.kh_uffd_write_protect(host.open_userfault().fd, start, length, 1), "UFFDIO_WRITEPROTECT"
    )
    check(lib.kh_zap(start, 200, ffi.NULL, 0), "madvise")
    states = page_states(pagemap, region.guest_address, 600, None if plain else new_scanner(600))
    mapped = np.arange(600) % 3 == 0
    inside = (np.arange(600) >= 100) & (np.arange(600) < 300)
    assert np.array_equal(states.present, mapped & ~inside)
    assert states.swapped[mapped & inside].all()
    assert not states.swapped[~inside].any()
    # What is a marker or a swap entry is not young.
    tracker = PagemapTracker(host.memory, host.open_userfault)
    if plain:
        tracker.scans = False
    assert (
        tracker.harvest(0, 600, clear=False).gfns().tolist()
        == np.flatnonzero(states.present).tolist()
    )
    found = tracker.states(0, 600)
    assert np.array_equal(found.swapped, states.swapped)
    tracker.stop()
    host.close()


@pytest.mark.parametrize("plain", [False, True])
def test_swapped_pages_are_told_from_absent_ones(pagemap: int, plain: bool) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("this host has no swap (/proc/swaps); markers and made-up entries are tested")
    with mmap.mmap(-1, 512 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in range(0, 512, 2):
            touch(address, page)
        assert libc.madvise(address, 512 * 4096, MADV_PAGEOUT) == 0
        states = page_states(pagemap, address, 512, None if plain else new_scanner(512))
        touched = np.arange(512) % 2 == 0
        assert np.array_equal(states.swapped | states.present, touched)
        assert states.swapped.any()
