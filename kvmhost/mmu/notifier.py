"""MMU notifiers: the owner of memory notifies secondary MMUs of changes.

:class:`AddressSpace` is the side of ``mm/mmu_notifier.c``: it has subscribers and calls them.
:class:`VmNotifier` is the side of ``virt/kvm/kvm_main.c``: it finds the gfns of a range of
hva in its memslots and works on its tables. Several VMs may subscribe to one memory.

There is no ``change_pte``. Every caller in the kernel wrapped it in an invalidation
(since commit 6bdb913f0a70 ("mm: wrap calls to set_pte_at_notify with
invalidate_range_start and invalidate_range_end")), which removes the entry before and
blocks faults until after: it could never find an entry to change. Linux v6.10 removed it.
A test replays the sequence against every placement of a racing fault.

Batches follow the proposal of 2023, with the predicate and the results of
:mod:`kvmhost.mmu.support`: the mm side asks whether any subscriber has them
(:attr:`AddressSpace.has_test_clear_young`), and each subscriber that has none, or cannot use
them now, is aged by ``clear_young`` if the caller allows the fallback.

Departures from the kernel: blockable and non-blockable callers are not distinguished, and
events have no type.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from kvmhost.bitmap import Words
from kvmhost.errors import KvmHostError
from kvmhost.mmu import support
from kvmhost.mmu.support import BatchResult, BatchSupport
from kvmhost.mmu.table import Mmu

__all__ = ["AddressSpace", "Notifier", "VmNotifier"]


class Notifier(Protocol):
    """What a secondary MMU implements (``struct mmu_notifier_ops``); ranges are of hva."""

    def invalidate_range_start(self, start: int, end: int) -> None:
        """Unmap the range, and block faults on it until the end."""

    def invalidate_range_end(self, start: int, end: int) -> None:
        """Allow faults on the range again."""

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Clear accessed bits and flush; return whether any was set."""

    def clear_young(self, start: int, end: int) -> bool:
        """Clear accessed bits; return whether any was set."""

    def test_young(self, start: int, end: int) -> bool:
        """Return whether any accessed bit is set."""

    @property
    def has_test_clear_young(self) -> bool:
        """Whether the host of this MMU has batches; may be a false positive."""

    def test_clear_young(self, start: int, end: int, bitmap: Words) -> BatchResult:
        """Do the batch in the form of 2023."""

    def release(self) -> None:
        """Unmap everything: the memory is being freed."""


class AddressSpace:
    """Memory with subscribers. A call reaches all that were subscribed when it began."""

    def __init__(self) -> None:
        self._subscribers: tuple[Notifier, ...] = ()
        self._lock = threading.Lock()

    def subscribe(self, notifier: Notifier) -> None:
        """Add a subscriber."""
        with self._lock:
            self._subscribers = (*self._subscribers, notifier)

    def unsubscribe(self, notifier: Notifier) -> None:
        """Remove a subscriber; a call in progress may still reach it."""
        with self._lock:
            self._subscribers = tuple(s for s in self._subscribers if s is not notifier)

    @contextlib.contextmanager
    def invalidating(self, start: int, end: int) -> Iterator[None]:
        """Invalidate ``[start, end)`` for the duration of the block; it ends even on an exception.

        Each subscriber whose start was reached gets its end, also if a later start fails.
        """
        begun: list[Notifier] = []
        try:
            for notifier in self._subscribers:
                begun.append(notifier)
                notifier.invalidate_range_start(start, end)
            yield
        finally:
            for notifier in reversed(begun):
                notifier.invalidate_range_end(start, end)

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Age a range everywhere, one lock and one flush a subscriber."""
        return self._any(lambda n: n.clear_flush_young(start, end))

    def clear_young(self, start: int, end: int) -> bool:
        """Age a range everywhere without a flush."""
        return self._any(lambda n: n.clear_young(start, end))

    def test_young(self, start: int, end: int) -> bool:
        """Return whether a range is young in any subscriber."""
        return self._any(lambda n: n.test_young(start, end))

    @property
    def has_test_clear_young(self) -> bool:
        """Whether any subscriber has batches: if not, preparing a bitmap is a waste."""
        return any(notifier.has_test_clear_young for notifier in self._subscribers)

    def test_clear_young(self, start: int, end: int, bitmap: Words, *, fallback: bool) -> bool:
        """Age a range everywhere by bitmap.

        A subscriber that stops half-way (:attr:`~kvmhost.mmu.support.BatchResult.NOT_NOW`) has
        flipped bits of the memslots before; the fallback then clears the whole range, also
        pages that were only to be tested, and its result stands beside the bitmap.

        :param bitmap: in the form of :meth:`~kvmhost.mmu.harvest.WalkedTable.test_clear_young`.
            Each subscriber flips bits, so a page that two of them find young flips back:
            as in 2023, a bitmap is meant for one subscriber
        :param fallback: age by :meth:`Notifier.clear_young` where a subscriber cannot batch
        :return: False without fallback; else whether a fallback found a young page
        """
        young = False
        for notifier in self._subscribers:
            if notifier.test_clear_young(start, end, bitmap) is BatchResult.DONE:
                continue
            if fallback:
                young |= notifier.clear_young(start, end)
        return young

    def release(self) -> None:
        """Notify every subscriber that the memory is freed, and remove them."""
        with self._lock:
            subscribers, self._subscribers = self._subscribers, ()
        for notifier in subscribers:
            notifier.release()

    def _any(self, call: Callable[[Notifier], bool]) -> bool:
        # No short cut: every subscriber must age its own tables.
        results = [call(notifier) for notifier in self._subscribers]
        return any(results)


class VmNotifier:
    """A VM's tables as a subscriber.

    :param table: the tables; its memslots map a range of hva to gfns
    :param batches: whether the host offers ``test_clear_young``; None: as
        :func:`kvmhost.mmu.support.of_table` has it for these tables
    :param constraint: called before each memslot of a batch; what it returns, unless empty,
        is a reason why this VM cannot batch now (reverse maps, a hash-MMU guest)
    """

    def __init__(
        self,
        table: Mmu,
        *,
        batches: BatchSupport | None = None,
        constraint: Callable[[], str] | None = None,
    ) -> None:
        self.table = table
        self.batches = support.of_table(table) if batches is None else batches
        self.constraint = constraint
        #: Why the last batch stopped; empty if it did not.
        self.refusal = ""
        self._open: dict[tuple[int, int], list[list[tuple[int, int, int]]]] = {}
        self._lock = threading.Lock()

    def invalidate_range_start(self, start: int, end: int) -> None:
        """Unmap the range; faults on it retry until the end."""
        ranges = self._ranges(start, end)
        # The slots may change before the end: end exactly the ranges that were begun.
        with self._lock:
            self._open.setdefault((start, end), []).append(ranges)
        self.table.invalidate_start(ranges)

    def invalidate_range_end(self, start: int, end: int) -> None:
        """End the invalidation.

        :raises KvmHostError: if it was never begun
        """
        with self._lock:
            begun = self._open.get((start, end))
            if not begun:
                raise KvmHostError(f"invalidate_range_end([{start:#x}, {end:#x})) without start")
            ranges = begun.pop()
        self.table.invalidate_end(ranges)

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Age the range under the MMU lock, with a flush."""
        return self._any(self.table.clear_flush_young, start, end)

    def clear_young(self, start: int, end: int) -> bool:
        """Age the range without lock or flush."""
        return self._any(self.table.clear_young, start, end)

    def test_young(self, start: int, end: int) -> bool:
        """Return whether any page in the range is young."""
        return self._any(self.table.test_young, start, end)

    @property
    def has_test_clear_young(self) -> bool:
        """Whether the host has batches, whatever this VM can do now."""
        return bool(self.batches)

    def test_clear_young(self, start: int, end: int, bitmap: Words) -> BatchResult:
        """Age the range by bitmap, without a lock, memslot by memslot."""
        self.refusal = self.batches.reason
        if not self.batches:
            return BatchResult.UNSUPPORTED
        self.table.test_clear_young(start, end, bitmap, self._may_go_on)
        return BatchResult.NOT_NOW if self.refusal else BatchResult.DONE

    def _may_go_on(self) -> bool:
        self.refusal = self.constraint() if self.constraint else ""
        return not self.refusal

    def release(self) -> None:
        """Zap everything, permanently; walks in progress end safely."""
        self.table.release()

    def _ranges(self, start: int, end: int) -> list[tuple[int, int, int]]:
        slots = self.table.slots
        if slots is None:
            return []
        return [
            (p.slot.as_id, p.gfn_start, p.gfn_start + p.n_pages)
            for p in slots.in_hva_range(start, end)
        ]

    def _any(self, operation: Callable[..., bool], start: int, end: int) -> bool:
        # No short cut: a page that several slots map is aged in all of them.
        results = [operation(s, e, as_id=a) for a, s, e in self._ranges(start, end)]
        return any(results)
