"""Stage 2 on arm64: concatenated start tables, break before make, two ways to set AF.

The walk is ``kvm_pgtable_walk()`` of ``arch/arm64/kvm/hyp/pgtable.c``: a visitor with leaf,
table-pre and table-post callbacks (``_core/mmu_stage2.c``). Departures from the kernel:

- concatenated start tables are one table with a wider index, not a loop over pages;
- a table-pre callback may report that it processed the table's entries itself (the
  harvest does);
- a walk may skip invalid entries;
- a table is found empty by reading it, not by a page count, before it is freed;
- the harvest is divided into chunks of 2**22 pages, between which it may leave its epoch;
- hardware dirty state (DBM) is used; KVM tracks writes by faults only;
- memory attributes, execute permission, and nested stage 2 are not modelled.

As in the kernel, -EAGAIN of a callback ends a walk unless the walk has
``KVM_PGTABLE_WALK_IGNORE_EAGAIN`` (before commit fedbe023f079 ("KVM: arm64: Invert
KVM_PGTABLE_WALK_HANDLE_FAULT to fix pKVM walkers"), unless it lacks the flag of fault
handlers), whether it is shared or not. Faults and :meth:`~kvmhost.mmu.table.Mmu.map` lack the
flag and start over; all other walks have it.

Native level numbers: 3 is the base page (level 1 here), 2 and 1 are blocks (2 and 3 here).
"""

from __future__ import annotations

import errno
from typing import Any

from kvmhost._ffi import check, ffi, lib
from kvmhost.mmu.table import Mmu

__all__ = ["Stage2Table"]


class Stage2Table(Mmu):
    """A stage-2 table over an IPA space of 32 to 48 bits.

    The bit is cleared by compare-and-swap, in the one helper that all entries are set with:
    if hardware or a fault handler was first, it fails, and the entry is read again.

    :param hardware_access: FEAT_HAFDBS: hardware sets AF (and the dirty state). Without it
        an access to an old page faults, and the handler makes the leaf young
    """

    def __init__(self, ipa_bits: int = 40, *, hardware_access: bool = True, **fields: Any) -> None:
        super().__init__("stage2", ipa_bits=ipa_bits, sw_access=not hardware_access, **fields)
        self.ipa_bits = ipa_bits

    @property
    def start_level(self) -> int:
        """Native number of the level that a walk starts at."""
        return 4 - self.n_levels

    @property
    def n_start_tables(self) -> int:
        """How many start tables are concatenated, 1 to 16."""
        return 1 << max(0, self.index_bits[self.n_levels] - 9)

    def count_visits(
        self, start: int, end: int, eagain_gfn: int, *, ignore_eagain: bool, shared: bool = False
    ) -> tuple[int, bool]:
        """Walk entries with a callback that loses a race at one gfn; for tests of the rule.

        :return: entries visited, and whether the walk went through to its end
        """
        flags = lib.KH_COUNT_IGNORE_EAGAIN if ignore_eagain else 0
        flags |= lib.KH_COUNT_SHARED if shared else 0
        visited = ffi.new("uint64_t *")
        with self._handle.use() as mmu:
            result = lib.kh_mmu_stage2_count(mmu, 0, start, end, flags, eagain_gfn, visited)
        if result != -errno.EAGAIN:
            check(result, "kh_mmu_stage2_count", start=start, end=end)
        return int(visited[0]), result == 0
