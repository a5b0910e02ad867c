"""What the capabilities of lru_gen change in the requests to a VM, and in the counters."""

from __future__ import annotations

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap, pack, unpack
from kvmhost.errors import CapabilityError
from kvmhost.reclaim.loss.clearing import PageClasses
from kvmhost.reclaim.policy.lru_gen import MM_STATS, Caps, LruGen
from kvmhost.reclaim.vm.losscontrol import LossControl
from kvmhost.reclaim.vm.pages import ResidencyChanges
from kvmhost.reclaim.vm.policydriver import PolicyDriver, planned_parts
from kvmhost.vm import Harvest

TABLES, N = 40, 40 * 512
NONE = np.empty(0, dtype=np.int64)
NOTHING = ResidencyChanges(NONE, NONE, NONE, 0)


class Client:
    """A VM's accessed bits, and the harvests that were requested."""

    def __init__(self):
        self.accessed = np.zeros(N, dtype=bool)
        self.requests = []

    def rearm_cost(self):
        raise CapabilityError("the cost of a fault", "a real VM", "a fake one", "none")

    def harvest(self, gfn_start, n_pages, *, mask=None, **_):
        asked = np.ones(n_pages, bool) if mask is None else unpack(mask, n_pages)
        self.requests.append((gfn_start, n_pages, int(asked.sum())))
        part = self.accessed[gfn_start : gfn_start + n_pages]
        young = YoungBitmap.from_gfns(gfn_start, n_pages, gfn_start + np.flatnonzero(part))
        part[asked] = False
        return Harvest(young, 10, 1)


def driver(**options):
    client = Client()
    loss = LossControl(client, N, 0.0)
    return client, PolicyDriver(client, N, LruGen(N, seed=None, **options), loss, "mine")


def one_pass(client, driver, touched):
    """Touch pages, harvest as planned, age; return the requests."""
    client.accessed[list(touched)] = True
    client.requests.clear()
    found = driver.harvest("auto")
    driver.age(found.young, NOTHING)
    return list(client.requests)


#: A dense table, and a few pages of others.
TOUCHED = [*range(512, 1024), 5, 9000]


def test_the_filter_saves_scanning_and_clearing():
    client, mine = driver(probes=True, caps=Caps.CORE | Caps.MM_WALK | Caps.SPTE_WALK)
    assert one_pass(client, mine, TOUCHED) == [(0, N, N)]
    assert [mine.policy.mm_stats[name] for name in MM_STATS] == [N, N - 514, 514, 40, 40, 1]
    # Only the dense table is scanned; the others keep their accessed bits.
    assert one_pass(client, mine, TOUCHED) == [(512, 512, 512)]
    assert [mine.policy.mm_stats[name] for name in MM_STATS] == [512, 0, 512, 40, 1, 1]
    assert np.flatnonzero(client.accessed).tolist() == [5, 9000]
    assert mine.scanned_pages == N + 512


def test_without_mm_walk_nothing_is_swept():
    client, mine = driver(probes=True, caps=Caps.CORE | Caps.SPTE_WALK)
    assert one_pass(client, mine, TOUCHED) == []
    assert [mine.policy.mm_stats[name] for name in MM_STATS] == [0, 0, 0, 40, 0, 0]
    assert client.accessed.sum() == 514
    # Victims are tested, and what lies around the young ones, in two requests.
    for _ in range(3):
        one_pass(client, mine, [])
    candidates = np.zeros(N, dtype=bool)
    candidates[[5, 6, 8999]] = True
    client.requests.clear()
    chosen = mine.victims(1, candidates)
    assert chosen.size == 1
    assert client.requests[0] == (0, N, 1)
    assert not client.accessed[5]


def test_without_probes_every_sweep_scans_everything():
    client, mine = driver(caps=Caps.CORE | Caps.MM_WALK | Caps.SPTE_WALK)
    for _ in range(2):
        assert one_pass(client, mine, TOUCHED) == [(0, N, N)]
        assert mine.policy.mm_stats["MM_LEAF_TOTAL"] == N
    assert mine.policy.counters()["MM_LEAF_YOUNG"] == 514


def test_without_core_no_generation_opens():
    client, mine = driver(caps=0)
    one_pass(client, mine, TOUCHED)
    assert mine.policy.max_seq == 0
    assert mine.policy.mm_stats == dict.fromkeys(MM_STATS, 0)


@pytest.mark.parametrize("every", [1, 2, 3, 20])
def test_parts_contain_every_planned_page_in_few_requests(every):
    bits = np.zeros(TABLES, dtype=bool)
    bits[::every] = True
    filtered = LruGen(N).filter
    parts = planned_parts(filtered.pages(bits), N)
    covered = np.zeros(N, dtype=bool)
    for first, n_pages in parts:
        assert not covered[first : first + n_pages].any()
        covered[first : first + n_pages] = True
    assert covered[np.repeat(bits, 512)].all()
    assert len(parts) == {1: 1, 2: 16, 3: 14, 20: 2}[every]
    if every in (3, 20):
        assert covered.sum() == bits.sum() * 512


def test_parts_end_with_the_memory():
    filtered = LruGen(700).filter
    assert planned_parts(filtered.pages(np.array([False, True])), 700) == [(512, 188)]
    assert planned_parts(filtered.pages(np.array([False, False])), 700) == []


def test_a_page_that_was_not_scanned_stays_left_over():
    """It was young and not cleared: that it is young later is no new touch."""

    def bits(*gfns):
        mask = np.zeros(128, dtype=bool)
        mask[list(gfns)] = True
        return pack(mask)

    pages = PageClasses(128)
    pages.note(bits(3, 100), bits())
    pages.note(bits(3), None, scanned=bits(*range(64)))
    assert sum(pages.note(bits(3, 100), None).faults) == 1
