"""Epochs on weak memory, and memslots that change under faults: the model and the code."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import kvmhost._core
from kvmhost.mmu.epochs import FENCES, explore_free, explore_slots
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.radix import RadixTable
from kvmhost.mmu.stage2 import Stage2Table
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tdp import TdpTable

CORE = Path(next(iter(kvmhost._core.__path__)))
SOON = 120.0
N_PAGES = 1 << 20


def test_both_fences_free_nothing_under_a_reader() -> None:
    report = explore_free("both")
    assert (report.failed, report.deadlocks) == (0, 0)
    assert report.schedules > 100


@pytest.mark.parametrize("fences", FENCES[:-1])
def test_a_fence_that_is_missing_frees_what_is_in_use(fences: str) -> None:
    report = explore_free(fences)
    assert 0 < report.failed < report.schedules
    assert report.example[-1] == "end"


def test_the_code_has_the_steps_of_the_model_in_their_order() -> None:
    code = (CORE / "mmu_epoch.c").read_text()
    fence = "__atomic_thread_fence(__ATOMIC_SEQ_CST); /* [{} fence] */"
    enter, scan = code.partition("oldest_reader(struct")[::2]
    assert re.search(
        r"\[publish\].*compare_exchange.*" + re.escape(fence.format("reader")), enter, re.S
    )
    assert re.search(re.escape(fence.format("writer")) + r".*\[scan\]", scan, re.S)


def test_a_grace_period_leaves_no_leaf_of_a_slot_that_is_gone() -> None:
    report = explore_slots(grace=True)
    assert (report.failed, report.deadlocks) == (0, 0)
    assert explore_slots(grace=False).failed > 0


@pytest.mark.parametrize("make", [TdpTable, Stage2Table, RadixTable])
def test_new_slots_wait_for_the_faults_that_use_the_old_ones(make: Callable[[], Mmu]) -> None:
    """A fault has found its slot; the slot goes; the fault maps, and only then is unmapped."""
    with make() as table:
        table.set_slots(one_slot(table))
        with table.epoch():  # as a fault is
            change = threading.Thread(target=table.set_slots, args=(MemSlots(),))
            change.start()
            # Each page once: one that is mapped is found without its slot.
            gfns = itertools.count(8)
            while has_slot(table, next(gfns)):
                pass
            change.join(0.1)  # time to go wrong: without a grace period it unmaps now
            table.map(5, 5)
        change.join(SOON)
        assert not change.is_alive()
        assert table.leaf(5) is None


def one_slot(table: Mmu) -> MemSlots:
    return MemSlots([MemSlot(0, 0, N_PAGES, 1 << 30, huge=False)], page_bytes=table.page_bytes)


def has_slot(table: Mmu, gfn: int) -> bool:
    assert gfn < N_PAGES, "the new slots are never seen"
    try:
        table.touch(gfn)
    except OSError:
        return False
    return True
