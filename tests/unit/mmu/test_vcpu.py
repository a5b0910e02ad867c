"""One vCPU's TLB against deferred flushes: the sequence of 2009, on real tables."""

from __future__ import annotations

import pytest

from kvmhost.mmu.flush import explore_reload
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.vcpu import CachingVcpu

FORMATS = ["npt", "ept", "stage2", "radix"]


@pytest.fixture(params=FORMATS)
def table(request):
    with Mmu(request.param) as table:
        table.set_slots(MemSlots([MemSlot(0, 0, 64, 0x7F00_0000_0000, huge=False)]))
        yield table


def test_a_vcpu_that_reloads_its_root_sees_a_deferred_flush(table):
    one, other = CachingVcpu(table), CachingVcpu(table)
    other.access(7, write=True)
    assert other.access(7, write=True)
    assert one.invlpg(7)
    # The stale translation for writing is used: no entry is left that would show it.
    assert table.leaf(7) is None
    assert other.access(7, write=True)
    assert other.reload_root(0, 64)
    assert table.counters()["tlbs_dirty"] == 0
    # The next write walks, faults, and is seen.
    assert not other.access(7, write=True)


def test_the_stale_translation_of_a_third_vcpu_goes_too(table):
    one, other, third = (CachingVcpu(table) for _ in range(3))
    third.access(7, write=True)
    one.invlpg(7)
    assert third.access(7, write=True)
    assert other.reload_root(0, 64)
    assert not third.access(7, write=True)
    assert third.remote_flushes == 1


def test_a_local_flush_reaches_one_vcpu_and_leaves_the_mark(table):
    one, other = CachingVcpu(table), CachingVcpu(table)
    one.access(7)
    other.access(7)
    one.invlpg(7)
    assert (one.local_flushes, one.remote_flushes) == (1, 0)
    assert table.counters()["tlbs_dirty"] == 1
    assert table.counters()["flushes"] == 0
    assert not one.access(7)
    assert other.access(7)


def test_a_reload_with_nothing_deferred_and_nothing_writable_flushes_nobody(table):
    one, other = CachingVcpu(table), CachingVcpu(table)
    table.map(7, 7, write=False, young=True)
    other.access(7)
    assert not one.reload_root(0, 64)
    assert one.local_flushes == 1
    assert other.access(7)
    assert other.remote_flushes == 0


def test_reload_in_all_orders():
    """Asking only whether a page was protected loses a write; asking the mark as well does not."""
    wrong, right = explore_reload(asks_mark=False), explore_reload(asks_mark=True)
    assert wrong.schedules == right.schedules
    assert wrong.failed > 0
    assert any("write_through_tlb" in step for step in wrong.example)
    assert (right.failed, right.deadlocks) == (0, 0)
