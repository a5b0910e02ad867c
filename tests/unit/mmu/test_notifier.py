"""Notifier calls: invalidation and retry, several VMs, fallback, release, no change_pte."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from kvmhost.errors import KvmHostError
from kvmhost.mmu import support
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.notifier import AddressSpace, VmNotifier
from kvmhost.mmu.soft import SoftEngine, Trace
from kvmhost.mmu.support import BatchResult, BatchSupport
from kvmhost.mmu.table import Mmu

HVA = 0x7F00_0000_0000
PAGE = 4096
FORMATS = ["npt", "ept", "stage2", "radix"]


def vm(table_format="npt", slots=None, **fields):
    table = Mmu(table_format, poison=True)
    rows = slots or [MemSlot(0, 100, 256, HVA, huge=False)]
    table.set_slots(MemSlots(rows))
    return table, VmNotifier(table, **fields)


@pytest.mark.parametrize("table_format", FORMATS)
def test_a_fault_that_races_an_invalidation_retries(table_format):
    table, notifier = vm(table_format)
    memory = AddressSpace()
    memory.subscribe(notifier)
    with table:
        seq = table.fault_begin()
        with memory.invalidating(HVA, HVA + 16 * PAGE):
            # Started before or during: the range is held, whatever it saw.
            assert not table.fault_finish(100, seq)
            assert not table.fault_finish(100, table.fault_begin())
            assert table.invalidate_retry(115, seq)
            # x86 compares the range; arm64 and powerpc retry for any invalidation.
            assert table.fault_finish(116, seq) == (table_format in ("npt", "ept"))
        # Ended since: what the fault looked up before may be stale, wherever it was.
        assert not table.fault_finish(100, seq)
        assert table.fault_finish(100, table.fault_begin())
        assert table.leaf(100) is not None
        assert table.counters()["fault_retries"] == (3 if table_format in ("npt", "ept") else 4)


@pytest.mark.parametrize("range_retry", [True, False])
@pytest.mark.parametrize("table_format", FORMATS)
def test_retry_by_range_is_an_option_of_every_format(table_format, range_retry):
    table = Mmu(table_format, range_retry=range_retry)
    table.set_slots(MemSlots([MemSlot(0, 100, 256, HVA, huge=False)]))
    notifier = VmNotifier(table)
    with table:
        seq = table.fault_begin()
        notifier.invalidate_range_start(HVA, HVA + 16 * PAGE)
        assert table.invalidate_retry(115, seq)
        assert table.invalidate_retry(116, seq) == (not range_retry)
        notifier.invalidate_range_end(HVA, HVA + 16 * PAGE)
        # The sequence is compared without a range in both.
        assert table.invalidate_retry(116, seq)
        assert not table.invalidate_retry(116, table.fault_begin())


def test_nested_invalidations_hold_the_union_until_the_last_ends():
    table, notifier = vm()
    with table:
        notifier.invalidate_range_start(HVA, HVA + PAGE)
        notifier.invalidate_range_start(HVA + 10 * PAGE, HVA + 11 * PAGE)
        seq = table.fault_begin()
        assert table.invalidate_retry(105, seq)
        notifier.invalidate_range_end(HVA, HVA + PAGE)
        assert table.invalidate_retry(110, table.fault_begin())
        notifier.invalidate_range_end(HVA + 10 * PAGE, HVA + 11 * PAGE)
        assert not table.invalidate_retry(110, table.fault_begin())
        assert table.counters()["invalidate_seq"] == 2


def test_end_without_start_is_an_error():
    table, notifier = vm()
    with table:
        with pytest.raises(KvmHostError, match="without start"):
            notifier.invalidate_range_end(HVA, HVA + PAGE)
        with pytest.raises(OSError, match="Invalid argument"):
            table.invalidate_end([(0, 0, 1)])


def test_the_end_is_that_of_what_was_begun_even_if_slots_change():
    table, notifier = vm()
    with table:
        notifier.invalidate_range_start(HVA, HVA + PAGE)
        table.set_slots(MemSlots())
        notifier.invalidate_range_end(HVA, HVA + PAGE)
        assert table.counters()["invalidate_in_progress"] == 0


@pytest.mark.parametrize("table_format", FORMATS)
def test_change_pte_could_never_find_an_entry(table_format):
    """The recorded sequence: start, change_pte, end; and a fault at every possible place.

    At the moment of change_pte there is no leaf to change, wherever the two halves of a
    racing fault fall, and whether or not the page was mapped before.
    """
    notify = ["start", "change_pte", "end"]
    fault = ["begin", "finish"]
    orders = 0
    for places in itertools.combinations(range(5), 2):
        for mapped_before in (False, True):
            steps = iter(notify)
            halves = iter(fault)
            order = [next(halves) if i in places else next(steps) for i in range(5)]
            table, notifier = vm(table_format)
            with table:
                if mapped_before:
                    table.touch(100, write=True)
                seq = 0
                for step in order:
                    if step == "start":
                        notifier.invalidate_range_start(HVA, HVA + PAGE)
                    elif step == "change_pte":
                        assert table.leaf(100) is None, order
                        orders += 1
                    elif step == "end":
                        notifier.invalidate_range_end(HVA, HVA + PAGE)
                    elif step == "begin":
                        seq = table.fault_begin()
                    else:
                        table.fault_finish(100, seq, write=True)
    assert orders == 20


def test_several_vms_on_one_memory_are_all_told():
    first, a = vm("npt")
    second, b = vm("radix", slots=[MemSlot(5, 7, 256, HVA, huge=False)])
    memory = AddressSpace()
    memory.subscribe(a)
    memory.subscribe(b)
    with first, second:
        first.touch(103)
        second.touch(10)
        assert memory.test_young(HVA + 3 * PAGE, HVA + 4 * PAGE)
        assert memory.clear_young(HVA, HVA + 10 * PAGE)
        assert first.harvest(0, 512).count() == second.harvest(0, 512).count() == 0
        assert not memory.clear_flush_young(HVA, HVA + 10 * PAGE)
        first.touch(103)
        second.touch(10)
        with memory.invalidating(HVA, HVA + 10 * PAGE):
            assert first.leaf(103) is None
            assert second.leaf(10) is None
        memory.unsubscribe(b)
        second.touch(10)
        memory.clear_young(HVA, HVA + 10 * PAGE)
        assert second.test_young(0, 512)


def test_every_subscriber_gets_its_end_also_when_a_start_fails():
    table, notifier = vm()
    ended = []

    class Broken:
        def invalidate_range_start(self, start, end):
            raise RuntimeError("no")

        def invalidate_range_end(self, start, end):
            ended.append((start, end))

    memory = AddressSpace()
    memory.subscribe(notifier)
    memory.subscribe(Broken())
    with table:
        with pytest.raises(RuntimeError), memory.invalidating(HVA, HVA + PAGE):
            pytest.fail("not reached")
        assert ended == [(HVA, HVA + PAGE)]
        assert table.counters()["invalidate_in_progress"] == 0


def test_clear_flush_young_flushes_only_what_was_young():
    table, notifier = vm()
    with table:
        table.touch(100)
        before = table.counters()["flushes"]
        assert notifier.clear_flush_young(HVA, HVA + PAGE)
        assert not notifier.clear_flush_young(HVA, HVA + PAGE)
        assert not notifier.clear_young(HVA, HVA + PAGE)
        assert table.counters()["flushes"] == before + 1


def test_fallback():
    table, notifier = vm(batches=BatchSupport("none", "clear_young"))
    memory = AddressSpace()
    memory.subscribe(notifier)
    bitmap = np.array([0b11], dtype=np.uint64)
    with table:
        table.touch(100)
        # Without batches and without fallback nothing happens, and nothing is reported.
        assert not memory.test_clear_young(HVA, HVA + 2 * PAGE, bitmap, fallback=False)
        assert table.test_young(100, 101)
        assert memory.test_clear_young(HVA, HVA + 2 * PAGE, bitmap, fallback=True)
        assert not table.test_young(100, 101)
        assert bitmap.tolist() == [0b11]
        table.touch(100)
        notifier.batches = BatchSupport()
        # With batches the answer is in the bitmap, and the result is False.
        assert not memory.test_clear_young(HVA, HVA + 2 * PAGE, bitmap, fallback=True)
        assert bitmap.tolist() == [0b01]
        assert not table.test_young(100, 101)


def test_batch_support_has_a_reason_and_a_fallback_where_it_is_missing():
    """kvm_arch_has_test_clear_young() of the three architectures, as proposed in 2023."""
    supported = [support.x86(), support.arm64(), support.powerpc()]
    assert all(supported)
    assert {s.reason + s.fallback for s in supported} == {""}
    missing = {
        "A/D bits": support.x86(ad_bits=False),
        "reverse maps": support.x86(tdp=False),
        "hardware access flag": support.arm64(hardware_access=False),
        "protected KVM": support.arm64(protected=True),
        "hash MMU": support.powerpc(radix=False),
        "pseries": support.powerpc(on_pseries=True),
    }
    for word, answer in missing.items():
        assert not answer
        assert word in answer.reason
        assert answer.fallback == "clear_young over the range"
    with Mmu("stage2", sw_access=True) as without, Mmu("stage2") as hardware:
        assert not support.of_table(without)
        assert support.of_table(hardware)


def test_a_vm_that_stops_half_way_has_flipped_the_slots_before():
    """False positive: the host has batches, the VM says no at its second memslot."""
    slots = [
        MemSlot(0, 100, 4, HVA, huge=False),
        MemSlot(1, 200, 4, HVA + 4 * PAGE, huge=False),
    ]
    answers = iter(["", "reverse maps", "", ""])
    table, notifier = vm(slots=slots, constraint=lambda: next(answers))
    memory = AddressSpace()
    memory.subscribe(notifier)
    with table:
        for gfn in (101, 103, 200, 201):
            table.touch(gfn)
        assert memory.has_test_clear_young
        # Bit 7 - i is page i: clear page 1, test page 3, clear 4, test 5.
        bitmap = np.array([0b0100_1000], dtype=np.uint64)
        assert notifier.test_clear_young(HVA, HVA + 8 * PAGE, bitmap) is BatchResult.NOT_NOW
        assert notifier.refusal == "reverse maps"
        assert bitmap.tolist() == [0b0001_1000]
        young = [table.test_young(gfn, gfn + 1) for gfn in (101, 103, 200, 201)]
        assert young == [False, True, True, True]
        # The constraint is gone: the call does the rest.
        bitmap[0] = 0b0000_1000
        assert notifier.test_clear_young(HVA, HVA + 8 * PAGE, bitmap) is BatchResult.DONE
        assert bitmap.tolist() == [0b0001_0100]


def test_the_fallback_clears_what_was_only_to_be_tested():
    table, notifier = vm(constraint=lambda: "hash MMU")
    memory = AddressSpace()
    memory.subscribe(notifier)
    with table:
        table.touch(100)
        bitmap = np.zeros(1, dtype=np.uint64)
        assert not memory.test_clear_young(HVA, HVA + PAGE, bitmap, fallback=False)
        assert table.test_young(100, 101)
        assert memory.test_clear_young(HVA, HVA + PAGE, bitmap, fallback=True)
        assert not bitmap.any()
        assert not table.test_young(100, 101)


def test_any_listener_that_batches_is_enough_to_ask():
    batching, a = vm("npt")
    falling_back, b = vm("stage2", batches=support.arm64(protected=True))
    memory = AddressSpace()
    assert not memory.has_test_clear_young
    memory.subscribe(b)
    assert not memory.has_test_clear_young
    memory.subscribe(a)
    assert memory.has_test_clear_young
    bitmap = np.array([0b11], dtype=np.uint64)
    with batching, falling_back:
        batching.touch(100)
        falling_back.touch(101)
        # One answers in the bitmap, the other through the result.
        assert memory.test_clear_young(HVA, HVA + 2 * PAGE, bitmap, fallback=True)
        assert bitmap.tolist() == [0b01]
        assert not batching.test_young(100, 102)
        assert not falling_back.test_young(100, 102)


@pytest.mark.parametrize("table_format", FORMATS)
def test_release_while_walks_and_vcpus_run(table_format):
    table, notifier = vm(table_format)
    memory = AddressSpace()
    memory.subscribe(notifier)
    stop = threading.Event()

    def age():
        while not stop.is_set():
            table.harvest(0, 1024)

    with table:
        run = SoftEngine(table).start(Trace.random(100, 256), n_vcpus=2)
        threads = [threading.Thread(target=age) for _ in range(2)]
        for thread in threads:
            thread.start()
        while run.progress() < 5000:
            pass
        memory.release()
        run.wait()
        stop.set()
        for thread in threads:
            thread.join()
        table.synchronize()
        counters, walked = table.counters(), table.stats()
        assert (counters["table_bytes"], counters["roots"], counters["retired"]) == (0, 0, 0)
        assert walked["poisoned"] == walked["bad_pointers"] == 0
        with pytest.raises(OSError, match="kh_mmu_touch"):
            table.touch(100)
        with pytest.raises(OSError, match="kh_mmu_map"):
            table.map(1, 1)
        assert table.harvest(0, 1024).count() == 0
        memory.release()


def test_slots_that_overlap_in_hva_are_all_unmapped():
    rows = [
        MemSlot(0, 0, 64, HVA, huge=False),
        MemSlot(1, 1000, 64, HVA + 32 * PAGE, huge=False),
    ]
    table, notifier = vm(slots=rows)
    with table:
        for gfn in (40, 1008):
            table.touch(gfn)
        notifier.invalidate_range_start(HVA + 40 * PAGE, HVA + 41 * PAGE)
        assert table.leaf(40) is None
        assert table.leaf(1008) is None
        notifier.invalidate_range_end(HVA + 40 * PAGE, HVA + 41 * PAGE)
