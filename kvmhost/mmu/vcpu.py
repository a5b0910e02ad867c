"""A vCPU with a TLB, one access at a time: what it still reaches through stale translations.

It compares the flush sequence before each access, as the vCPUs of :mod:`kvmhost.mmu.soft` do in
C, and exists to replay sequences by hand. :meth:`CachingVcpu.invlpg` and
:meth:`CachingVcpu.reload_root` are the two operations of the thread of 2009: the first zaps an
entry and defers the remote flush, the second must find out about it.

Departure: the guest's own tables are pages like any other here; "unsync" is a page that a
guest may write because a translation for writing exists.
"""

from __future__ import annotations

from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tlb import Tlb, TlbGeometry

__all__ = ["CachingVcpu"]


class CachingVcpu:
    """One vCPU over a table. Not for several threads at a time.

    :param geometry: of its TLB; the default of :class:`~kvmhost.mmu.tlb.TlbGeometry`
    """

    def __init__(self, table: Mmu, geometry: TlbGeometry | None = None, *, as_id: int = 0) -> None:
        self.table, self.as_id = table, as_id
        self.tlb = Tlb(geometry, table_format=table.format_id, page_shift=table.page_shift)
        self._seq = table.counters()["tlb_seq"]
        #: TLB flushes of this vCPU: requested by others, and its own.
        self.remote_flushes = self.local_flushes = 0

    def access(self, gfn: int, write: bool = False) -> bool:
        """Access a page; return whether a cached translation served, without a walk.

        :raises IoctlError: as :meth:`~kvmhost.mmu.table.Mmu.touch`
        """
        self._take_requests()
        if self.tlb.lookup(gfn, write):
            return True
        self.table.touch(gfn, write, as_id=self.as_id)
        found = self.table.leaf(gfn, as_id=self.as_id)
        if found is not None:
            self.tlb.insert(gfn, found[0], write)
        return False

    def flush_local(self) -> None:
        """Empty the TLB of this vCPU only; the dirty mark of deferred flushes stays."""
        self.tlb.flush()
        self.local_flushes += 1

    def invlpg(self, gfn: int) -> bool:
        """Zap the entry of a page, deferring the remote flush; return whether there was one.

        This vCPU is flushed at once, since its guest asked for it. The mark goes up after the
        entry is gone and before the MMU lock is dropped.
        """
        zapped = self.table.unmap(gfn, gfn + 1, as_id=self.as_id, defer_flush=True)
        self.flush_local()
        return zapped

    def reload_root(self, start: int, end: int) -> bool:
        """Load a new root: write-protect the guest's tables in the range, to read them in.

        A translation for writing may be left from an entry that was zapped with its flush
        deferred. No entry shows that, so the dirty mark decides (``protected`` or the mark):
        a table that is written without a fault after it was read would never be read again.

        :return: whether all vCPUs were requested to flush
        """
        before = self.table.counters()["flushes"]
        self.table.write_protect(start, end, as_id=self.as_id)
        self._take_requests()
        self.flush_local()
        return self.table.counters()["flushes"] > before

    def _take_requests(self) -> None:
        seq = self.table.counters()["tlb_seq"]
        if seq != self._seq:
            self._seq = seq
            self.tlb.flush()
            self.remote_flushes += 1
