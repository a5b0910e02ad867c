"""Feeding a model table: every format says what was fed, bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvmhost.bitmap import Provenance, YoungBitmap, pack
from kvmhost.errors import LayoutError
from kvmhost.mmu.feed import Feed
from kvmhost.vm.names import TABLE_FORMATS as FORMATS


@dataclasses.dataclass(frozen=True)
class Slot:
    gfn: int
    n_pages: int
    guest_address: int


#: One that ends inside a block of 512, a hole, and one that begins inside a block.
SLOTS = [Slot(0, 3000, 1 << 30), Slot(5003, 2500, 1 << 31)]
GFN_END = 7503
SOURCE = Provenance("made-up", "none", 5, 9)


def in_slots(gfns: np.ndarray) -> np.ndarray:
    return (gfns < 3000) | (gfns >= 5003)


@pytest.mark.parametrize("table_format", FORMATS)
def test_what_is_fed_is_harvested(table_format: str) -> None:
    rng = np.random.default_rng(3)
    with Feed(table_format, SLOTS) as feed:
        for density in (0.001, 0.5, 0.02, 1.0, 0.0):
            for start, n_pages in ((0, GFN_END), (700, 4500), (2999, 2010), (5003, 1)):
                gfns = np.arange(start, start + n_pages)
                bits = (rng.random(n_pages) < density) & in_slots(gfns)
                fed = YoungBitmap(start, n_pages, pack(bits), None, SOURCE)
                found = feed.harvest_via_model(fed)
                assert found == fed
                assert found.coarse is None
                name = "npt" if table_format == "tdp" else table_format
                assert found.provenance.table_format == f"{name}-model"
                assert found.provenance.tracker == "made-up"
                assert found.provenance.window_start_ns == 5
                assert not feed.table.test_young(0, GFN_END), "the window is the tracker's"


@pytest.mark.parametrize("table_format", FORMATS)
def test_the_walker_keeps_a_window_of_its_own(table_format: str) -> None:
    """feed() alone: bits add up in the table until its walker clears them, with a mask too."""
    with Feed(table_format, SLOTS) as feed:
        first = YoungBitmap.from_gfns(0, 3000, [1, 2, 700, 2999])
        second = YoungBitmap.from_gfns(0, 3000, [2, 3, 1024])
        assert feed.feed(first) == 4
        assert feed.feed(second) == 2  # 2 is young already
        both = [1, 2, 3, 700, 1024, 2999]
        assert feed.table.harvest(0, 3000, False).gfns().tolist() == both
        mask = YoungBitmap.from_gfns(0, 3000, [2, 700]).words
        assert feed.table.harvest(0, 3000, True, mask).gfns().tolist() == both
        assert feed.table.harvest(0, 3000).gfns().tolist() == [1, 3, 1024, 2999]


@pytest.mark.parametrize("table_format", FORMATS)
def test_coarse_blocks_are_huge_leaves_until_they_are_told_apart(table_format: str) -> None:
    with Feed(table_format, SLOTS) as feed:
        block = pack((np.arange(3000) >= 512) & (np.arange(3000) < 1024))
        coarse = YoungBitmap(0, 3000, block, block)
        found = feed.harvest_via_model(coarse)
        leaf = feed.table.leaf(600)
        assert leaf is not None
        assert leaf[0] == 2
        assert found == coarse
        assert np.flatnonzero(found.coarse_as_bool()).tolist() == list(range(512, 1024))
        fine = YoungBitmap.from_gfns(0, 3000, [600, 601])
        found = feed.harvest_via_model(fine)
        leaf = feed.table.leaf(600)
        assert leaf is not None
        assert leaf[0] == 1
        assert found == fine
        assert found.coarse is None
        # Small leaves stay; what the tracker says of them is passed on.
        found = feed.harvest_via_model(coarse)
        assert found == coarse
        assert np.array_equal(found.coarse, block)


def test_coarse_bits_of_a_part_of_a_block_are_passed_on() -> None:
    with Feed("ept", SLOTS) as feed:
        part = YoungBitmap.from_gfns(500, 40, range(510, 526))
        found = feed.harvest_via_model(dataclasses.replace(part, coarse=part.words))
        assert found == part
        assert np.array_equal(found.coarse, part.words)


def test_pages_outside_slots_do_not_get_in() -> None:
    with Feed("radix", SLOTS) as feed:
        fed = YoungBitmap.from_gfns(2990, 3000, [2999, 3000, 4000, 5002, 5003])
        assert feed.harvest_via_model(fed).gfns().tolist() == [2999, 5003]


def test_memory_is_what_page_tables_cost() -> None:
    with Feed("npt", [Slot(0, 1 << 18, 1 << 30)]) as feed:
        before = feed.table.counters()["table_bytes"]
        feed.feed(YoungBitmap.from_gfns(0, 1 << 18, [5]))
        assert feed.table.counters()["table_bytes"] - before <= 3 * 4096
        feed.feed(YoungBitmap.from_gfns(0, 1 << 18, range(0, 1 << 18, 100)))
        assert feed.table.counters()["table_bytes"] <= (512 + 4) * 4096


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(LayoutError, match="stage2"):
        Feed("sv39", SLOTS)
