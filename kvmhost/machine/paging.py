"""The userfaultfd and the pager of one VM, each opened when it is first needed."""

from __future__ import annotations

import threading
import typing
from collections.abc import Callable, Sequence

from kvmhost.errors import LostPageError, PagerError
from kvmhost.memory.guest import GuestMemory
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

if typing.TYPE_CHECKING:
    from kvmhost.bitmap import YoungBitmap
    from kvmhost.pager.options import StoreOptions
    from kvmhost.pager.pager import Pager
    from kvmhost.pager.userfault import Userfault

__all__ = ["Paging"]


class Paging:
    """Owns the userfaultfd and the pager of one VM.

    A VM that evicts nothing neither opens nor imports them.

    :param pinned_ranges: ``(gpa, n_bytes)`` that are never evicted or dropped
    :param options: where evicted pages are kept; None: compressed, in memory
    :param on_failure: called in the fault handler's thread if it fails
    """

    def __init__(
        self,
        memory: GuestMemory,
        pinned_ranges: Sequence[tuple[int, int]],
        options: StoreOptions | None,
        on_failure: Callable[[PagerError], None],
    ) -> None:
        self._memory, self._pinned = memory, pinned_ranges
        self._options, self._on_failure = options, on_failure
        self._lock = threading.RLock()
        self._userfault: Userfault | None = None
        self._pager: Pager | None = None

    @property
    def has_pager(self) -> bool:
        """Whether the pager is open."""
        return self._pager is not None

    @property
    def is_armed(self) -> bool:
        """Whether the pager's fault handler serves the mappings."""
        return self._pager is not None and self._pager.armed

    def open_userfault(self) -> Userfault:
        """Open the VM's userfaultfd, or return the open one.

        :raises CapabilityError: if the kernel has none, or forbids it
        """
        with self._lock:
            if self._userfault is None:
                from kvmhost.pager.userfault import Userfault

                self._userfault = Userfault()
            return self._userfault

    def open_pager(self) -> Pager:
        """Open the VM's pager with its pinned pages, or return the open one.

        :raises CapabilityError: if there is no userfaultfd, or no such codec
        :raises LayoutError: if the store's file cannot be made
        """
        with self._lock:
            if self._pager is None:
                from kvmhost.pager.pager import Pager

                pager = Pager(
                    self._memory,
                    self.open_userfault(),
                    self._options,
                    on_failure=self._on_failure,
                )
                for gpa, n_bytes in self._pinned:
                    pager.pin(gpa >> PAGE_SHIFT, -(-n_bytes // PAGE_BYTES))
                self._pager = pager
            return self._pager

    def note_young(self, young: YoungBitmap) -> None:
        """Pass the young pages of a harvest to the pager, if there is one."""
        if self._pager is not None:
            self._pager.note_young(young)

    def drop(self, gfn: int, n_pages: int) -> int:
        """Discard pages that the guest declared free; return how many will read as zeros.

        :raises LayoutError: if the range is not in one region; then nothing was dropped
        """
        return self.drop_by_outcome(gfn, n_pages)[0]

    def drop_by_outcome(self, gfn: int, n_pages: int) -> tuple[int, int, int]:
        """Discard pages that the guest declared free.

        :return: pages that will read as zeros, pinned pages, and pages that could not be discarded
        :raises LayoutError: if the range is not in one region; then nothing was dropped
        """
        with self._lock:
            if self._pager is None:
                dropped = self._memory.punch(gfn, n_pages, self._pinned)
                return dropped, n_pages - dropped, 0
        result = self._pager.drop(gfn, n_pages)
        return result.dropped, result.pinned, result.failed

    def fault_in(self, gfn: int) -> None:
        """Restore a page before the VMM itself reads it.

        :raises LostPageError: if the store cannot restore it: reading it would end the process
        """
        if self._pager is not None:
            self._pager.restore(gfn)
            if self._pager.state(gfn).name == "LOST":
                raise LostPageError([gfn], self._pager.lost_reason())

    def abandon(self) -> None:
        """Wake threads that wait for a page that cannot be restored; no fault is served again."""
        if self._userfault is not None:
            if self._pager is not None:
                self._pager.stop()
            self._userfault.close()

    def close(self) -> None:
        """Free the store and close the userfaultfd; the vCPUs are closed. Idempotent."""
        if self._pager is not None:
            self._pager.close()
        if self._userfault is not None:
            self._userfault.close()
