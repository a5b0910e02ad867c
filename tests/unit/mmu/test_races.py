"""Harvesters at work on the same leaves at once: exactly one of them reports each young bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap
from kvmhost.mmu.radix import RadixTable
from kvmhost.mmu.stage2 import Stage2Table
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tdp import TdpTable

N_PAGES = 1 << 17
ROUNDS = 3000
MAKERS = {
    "npt": lambda: TdpTable("npt"),
    "npt-careful": lambda: TdpTable("npt", poison=True),
    "ept": lambda: TdpTable("ept"),
    "stage2": Stage2Table,
    "radix": RadixTable,
}


def harvest_at_once(table: Mmu) -> list[YoungBitmap]:
    """Two harvests of the whole table that begin together."""
    begin, found = threading.Barrier(2), []

    def harvest() -> None:
        begin.wait()
        found.append(table.harvest(0, N_PAGES))

    threads = [threading.Thread(target=harvest) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_exactly_one_of_two_harvests_reports_a_bit(make) -> None:
    """Until both wanted the same bit; a table counts for how many one came too late."""
    with make() as table:
        table.map(0, 0, n=N_PAGES, young=True)
        for _ in range(ROUNDS):
            first, second = harvest_at_once(table)
            assert not (first.words & second.words).any()
            assert np.array_equal(
                first.words | second.words, np.full(N_PAGES // 64, 2**64 - 1, "u8")
            )
            if table.stats()["lost"]:
                return
            assert table.mark_young(0, N_PAGES) == N_PAGES
    pytest.skip(f"the two did not meet in {ROUNDS} rounds")
