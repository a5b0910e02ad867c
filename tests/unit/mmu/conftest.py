"""Tables that tests write themselves, with numpy alone: independent of the C core."""

from __future__ import annotations

import numpy as np
import pytest

from kvmhost._ffi import lib
from kvmhost.mmu.tablemem import TableMemory

PRESENT, WRITE, ACCESSED, HUGE = 1, 2, 1 << 5, 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000


class LongModeTables:
    """Long-mode tables in one block of memory that starts at physical address ``base_pa``."""

    def __init__(self, n_tables: int = 64, base_pa: int = 0x10_0000) -> None:
        raw = np.zeros((n_tables + 1) * 512, dtype=np.uint64)
        skip = (-raw.ctypes.data % 4096) // 8
        self.words = raw[skip : skip + n_tables * 512].reshape(n_tables, 512)
        self.base_pa = base_pa
        self.used = 1
        self.memory = TableMemory([(base_pa, self.words.ctypes.data, self.words.nbytes)], self)

    @property
    def root_pa(self) -> int:
        return self.base_pa

    def entry(self, gfn: int, level: int = 1) -> tuple[int, int]:
        """Return (table, index) of an entry, making the tables above it."""
        table = 0
        for at in range(4, level, -1):
            index = (gfn >> 9 * (at - 1)) & 511
            value = int(self.words[table, index])
            if not value & PRESENT:
                value = (self.base_pa + 4096 * self.used) | PRESENT | WRITE | ACCESSED
                self.words[table, index] = value
                self.used += 1
            table = ((value & ADDRESS) - self.base_pa) // 4096
        return table, (gfn >> 9 * (level - 1)) & 511

    def map(self, gfn: int, *, flags: int = 0, level: int = 1, pfn: int | None = None) -> None:
        where = self.entry(gfn, level)
        value = ((gfn if pfn is None else pfn) << 12) | PRESENT | WRITE | flags
        self.words[where] = value | (HUGE if level > 1 else 0)

    def get(self, gfn: int, level: int = 1) -> int:
        return int(self.words[self.entry(gfn, level)])


@pytest.fixture
def long_mode_tables():
    return LongModeTables


@pytest.fixture(params=[0, 1], ids=["scalar", "avx2"])
def scan(request):
    before = lib.kh_scan_level(-1)
    if lib.kh_scan_level(request.param) != request.param:
        pytest.skip("this CPU has no AVX2")
    yield request.param
    lib.kh_scan_level(before)
