"""Huge pages of shared memory: what is evicted is gone, and what is not keeps its bytes.

The system's setting is left alone: huge pages are made per mapping, by MADV_COLLAPSE,
and held by a page in a pipe, as a reader, DMA or another process would.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hugepages import PIECE_BYTES, PIECE_PAGES, Window

from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.memory.layout import PAGE_BYTES
from kvmhost.pager.hugepages import has_odd_sizes
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import EvictOutcome, PageState

pytestmark = [pytest.mark.requires_uffd, pytest.mark.requires_kvm]

GFN = 0x1000  # 16 MiB: the first page of a piece


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine(
        image_path("touch"), mem_bytes=32 << 20, engine="kvm", store=StoreOptions()
    ) as made:
        yield made


@pytest.fixture
def window(machine: Machine) -> Iterator[Window]:
    made = Window(machine.memory.regions[0], GFN * PAGE_BYTES)
    fill(machine)
    if not made.collapse():
        made.close()
        pytest.skip("the kernel has no MADV_COLLAPSE of shared memory (Linux 6.1)")
    yield made
    made.close()


def contents(n_pages: int = PIECE_PAGES) -> np.ndarray:
    rows = np.arange(1, n_pages + 1, dtype=np.uint64)[:, None]
    return rows * np.uint64(0x9E3779B97F4A7C15) + np.arange(512, dtype=np.uint64)


def fill(machine: Machine) -> None:
    machine.memory.array(GFN * PAGE_BYTES, (PIECE_PAGES, 512), "<u8")[:] = contents()


def seen(machine: Machine) -> np.ndarray:
    return machine.memory.array(GFN * PAGE_BYTES, (PIECE_PAGES, 512), "<u8").copy()


def gone(machine: Machine) -> np.ndarray:
    """Return which pages of the piece the pager calls evicted; none of them may be there."""
    evicted = machine.open_pager().states()[GFN : GFN + PIECE_PAGES] == PageState.EVICTED
    assert not (evicted & machine.memory.held()[GFN : GFN + PIECE_PAGES]).any()
    return evicted


@pytest.mark.parametrize("held", [False, True])
def test_pages_of_a_huge_page_are_evicted_though_somebody_holds_it(
    machine: Machine, window: Window, held: bool
) -> None:
    ends = window.hold() if held else ()
    result = machine.open_pager().evict(range(GFN + 5, GFN + 105))
    assert result.count(EvictOutcome.DONE) == 100
    assert gone(machine).sum() == 100
    counters = machine.open_pager().counters()
    assert (counters["split_pieces"], counters["stayed_pages"]) == (1, 0)
    np.testing.assert_array_equal(seen(machine), contents())
    assert counters["errors"] == 0
    for end in ends:
        os.close(end)


def test_a_piece_that_becomes_a_huge_page_again_is_split_again(
    machine: Machine, window: Window
) -> None:
    for turn in range(3):
        ends = window.hold(page=turn)
        assert machine.open_pager().evict([GFN + turn]).count(EvictOutcome.DONE) == 1
        np.testing.assert_array_equal(seen(machine), contents())
        for end in ends:
            os.close(end)
        assert machine.open_pager().counters()["split_pieces"] == turn + 1
        assert window.collapse()


def test_a_punched_page_that_stays_gets_its_bytes_back(machine: Machine, window: Window) -> None:
    """Were a huge page overlooked: the punch then zeroes, and frees nothing."""
    machine.open_pager().arm()
    machine.open_pager().inject_failures(splits=1000)
    ends = window.hold()
    result = machine.open_pager().evict(range(GFN, GFN + PIECE_PAGES))
    assert result.count(EvictOutcome.STAYED) == PIECE_PAGES
    assert not gone(machine).any()
    np.testing.assert_array_equal(seen(machine), contents())
    counters = machine.open_pager().counters()
    assert counters["stayed_pages"] == counters["outcomes"]["stayed"] == PIECE_PAGES
    assert (counters["evictions"], counters["evicted_pages"], counters["store_bytes"]) == (0, 0, 0)
    for end in ends:
        os.close(end)
    machine.open_pager().inject_failures()
    assert machine.open_pager().evict(range(GFN, GFN + PIECE_PAGES)).count(EvictOutcome.DONE)
    np.testing.assert_array_equal(seen(machine), contents())


@pytest.mark.parametrize("armed", [False, True])
def test_pages_of_a_held_huge_page_that_the_guest_frees(
    machine: Machine, window: Window, armed: bool
) -> None:
    if armed:
        machine.open_pager().arm()
    ends = window.hold()
    assert machine.drop(GFN + 3, 40).dropped_pages == 40
    expected = contents()
    expected[3:43] = 0
    machine.open_pager().arm()
    states = machine.open_pager().states()[GFN : GFN + PIECE_PAGES]
    there = machine.memory.resident()[GFN : GFN + PIECE_PAGES]
    np.testing.assert_array_equal(states == PageState.RESIDENT, there)
    assert there[3:43].any() != armed, "dropped pages take memory only if nothing could be split"
    np.testing.assert_array_equal(seen(machine), expected)
    # What the drop left of the huge page is in folios of any size.
    machine.open_pager().evict(range(GFN + 43, GFN + 203))
    gone(machine)
    np.testing.assert_array_equal(seen(machine), expected)
    for end in ends:
        os.close(end)


def test_a_dropped_page_that_stays_is_counted_and_resident(
    machine: Machine, window: Window
) -> None:
    machine.open_pager().arm()
    before = machine.open_pager().counters()["resident_pages"]
    machine.open_pager().inject_failures(splits=1000)
    ends = window.hold()
    assert machine.drop(GFN, 16).dropped_pages == 16
    counters = machine.open_pager().counters()
    assert (counters["stayed_pages"], counters["resident_pages"]) == (16, before)
    assert not seen(machine)[:16].any()
    for end in ends:
        os.close(end)


def test_guest_that_checks_its_bytes_beside_collapse_readers_and_evictions() -> None:
    """All at once: a guest, huge pages made again and again, readers of the memfd, evictions."""
    params = {"gfn_start": GFN, "pages": 3 * PIECE_PAGES, "hot": 300, "epochs": 0}
    params |= {"scan_every": 2, "scan_epochs": 1, "write_permille": 500}
    with Machine(
        image_path("hotcold"), mem_bytes=32 << 20, engine="kvm", n_vcpus=1, params=params
    ) as machine:
        region = machine.memory.regions[0]
        windows = [Window(region, (GFN + i * PIECE_PAGES) * PAGE_BYTES) for i in range(3)]
        stop = threading.Event()
        collapses = [0]

        def collapse() -> None:
            while not stop.is_set():
                for window in windows:
                    collapses[0] += window.collapse()

        def read() -> None:
            while not stop.is_set():
                for i in range(3):
                    os.pread(region.memfd, PIECE_BYTES, (GFN + i * PIECE_PAGES) * PAGE_BYTES)

        machine.open_pager().arm()
        threads = [threading.Thread(target=work) for work in (collapse, read, read)]
        machine.start()
        for thread in threads:
            thread.start()
        rng = np.random.default_rng(3)
        try:
            while machine.doorbells < 40 or machine.open_pager().counters()["split_pieces"] < 3:
                assert machine.running, machine.error
                first = GFN + int(rng.integers(3 * PIECE_PAGES - 100))
                machine.open_pager().evict(np.arange(first, first + 100))
                # A piece can become a huge page only while all of it is there.
                machine.open_pager().restore(GFN, 3 * PIECE_PAGES)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert collapses[0] > 0
        assert machine.open_pager().counters()["lost_pages"] == 0
        machine.stop()
        assert machine.status is None, "the guest found a wrong byte"
        assert machine.result().status == 0
        for window in windows:
            window.close()


@pytest.mark.parametrize(
    ("general", "sizes", "odd"),
    [
        ("never", {2048: "inherit", 64: "never"}, False),
        ("always", {2048: "inherit", 64: "never"}, False),
        ("always", {2048: "inherit", 64: "inherit"}, True),
        ("deny", {2048: "inherit", 64: "inherit"}, False),
        ("never", {2048: "inherit", 64: "within_size"}, True),
        ("never", {}, False),
    ],
)
def test_which_settings_make_huge_pages_that_nothing_tells(
    tmp_path: Path, general: str, sizes: dict[int, str], odd: bool
) -> None:
    (tmp_path / "hpage_pmd_size").write_text(f"{PIECE_BYTES}\n")
    (tmp_path / "shmem_enabled").write_text(f"always within_size [{general}] advise\n")
    for kib, chosen in sizes.items():
        (tmp_path / f"hugepages-{kib}kB").mkdir()
        (tmp_path / f"hugepages-{kib}kB" / "shmem_enabled").write_text(f"a [{chosen}] b\n")
    assert has_odd_sizes(tmp_path) is odd
    assert not has_odd_sizes(tmp_path / "missing")
