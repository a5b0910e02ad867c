"""Who goes when nobody was named: the clock hand, against a history kept page by page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap, pack
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.pager.pager import Pager
from kvmhost.pager.results import PageState
from kvmhost.pager.userfault import Userfault
from kvmhost.units import PAGE_BYTES

pytestmark = pytest.mark.requires_uffd

# Neither region is a whole number of 64 pages, so that words straddle the border.
REGIONS = [(0, 1000), (0x4000, 777)]
#: Windows that a page may have been young in, to go in the hand's first, second, … lap.
LAPS = np.array([0, 1, 3, 8])


class World:
    def __init__(self) -> None:
        self.memory = GuestMemory([Region(gfn * PAGE_BYTES, n * PAGE_BYTES) for gfn, n in REGIONS])
        self.userfault = Userfault()
        self.pager = Pager(self.memory, self.userfault)
        self.gfns = np.concatenate([gfn + np.arange(n) for gfn, n in REGIONS])
        for gfn, n in REGIONS:
            self.memory.array(gfn * PAGE_BYTES, (n, 512), "<u8")[:, 0] = np.arange(n) + 1
        #: Young or not, by page and window; the latest window first.
        self.history = np.zeros((self.gfns.size, 8), dtype=bool)

    def window(self, gfn_start: int, n_pages: int, rng: np.random.Generator) -> None:
        """A harvest of some range, told to the pager and to the oracle."""
        young = rng.random(n_pages) < rng.choice([0.05, 0.5, 0.95])
        self.pager.note_young(YoungBitmap(gfn_start, n_pages, pack(young)))
        inside = (self.gfns >= gfn_start) & (self.gfns < gfn_start + n_pages)
        self.history[inside] = np.roll(self.history[inside], 1, axis=1)
        self.history[inside, 0] = young[self.gfns[inside] - gfn_start]

    def laps(self) -> np.ndarray:
        return np.searchsorted(LAPS, self.history.sum(axis=1))

    def resident(self) -> np.ndarray:
        return self.pager.states() == PageState.RESIDENT

    def close(self) -> None:
        self.pager.close()
        self.userfault.close()
        self.memory.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("seed", range(6))
def test_colder_pages_go_first(world: World, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pinned = rng.choice(world.gfns.size, 40, replace=False)
    for index in pinned:
        world.pager.pin(int(world.gfns[index]))
    world.pager.arm()
    for _ in range(12):
        start = int(rng.integers(0, 0x4000 + 700))
        world.window(start, int(rng.integers(1, 0x4000 + 777 - start + 1)), rng)
    laps = world.laps()
    for limit in (1500, 1000, 400, 100):
        before = world.resident()
        world.pager.set_limit(limit * 4096)
        went = world.pager.shrink().evicted
        after = world.resident()
        gone = before & ~after
        assert gone.sum() == went
        assert limit - 16 < after.sum() <= limit
        assert not gone[pinned].any()
        stayed = np.delete(np.flatnonzero(after), np.isin(np.flatnonzero(after), pinned))
        # The last lap may be half done; nothing colder than it may have stayed.
        assert laps[stayed].min() >= laps[gone].max()


def test_the_hand_goes_on_where_it_stopped(world: World) -> None:
    """With all pages alike each page goes once before any goes twice."""
    world.pager.arm()
    total = world.gfns.size
    order: list[int] = []
    before = world.resident()
    for limit in range(total - 16, 0, -16):
        world.pager.set_limit(limit * 4096)
        world.pager.shrink()
        after = world.resident()
        order += np.flatnonzero(before & ~after).tolist()
        before = after
    assert order == sorted(order)
    assert order[0] == 0


def test_nothing_left_to_evict_ends(world: World) -> None:
    for gfn, n in REGIONS:
        world.pager.pin(gfn, n)
    world.pager.set_limit(10 * 4096)
    shrunk = world.pager.shrink()
    assert (shrunk.evicted, shrunk.over_pages) == (0, world.pager.counters()["resident_pages"] - 10)
    assert world.resident().all()


def test_a_refaulted_page_outlives_cold_ones(world: World) -> None:
    world.pager.evict(world.gfns[:64])
    for gfn in range(64):
        assert world.memory.array(gfn * PAGE_BYTES, 1, "<u8")[0] == gfn + 1
    world.pager.set_limit(200 * 4096)
    world.pager.shrink()
    assert world.resident()[:64].all()


@pytest.mark.parametrize("way", ["evict", "drop"])
def test_a_page_that_left_has_no_history(world: World, way: str) -> None:
    """128 pages were young in every window; the last 64 of them leave and come back.

    The hand would take the first 64 before them if they were as young.
    """
    young = np.zeros(1000, dtype=bool)
    young[:128] = True
    for _ in range(8):
        world.pager.note_young(YoungBitmap(0, 1000, pack(young)))
    world.pager.arm()
    if way == "evict":
        world.pager.evict(world.gfns[64:128])
    else:
        world.pager.drop(64, 64)
    world.memory.array(64 * PAGE_BYTES, (64, 512), "<u8")[:, 0] = 7
    assert world.resident()[64:128].all()
    world.pager.set_limit(70 * 4096)
    world.pager.shrink()
    assert world.resident()[:64].all()
    assert world.resident()[64:].sum() <= 6
