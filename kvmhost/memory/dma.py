"""Access to guest memory by devices, on behalf of the guest.

Accesses use the guest mapping, not the alias: an evicted page is restored, and the limit
on resident pages is enforced, as for an access by a vCPU. The copies run in C, without
the interpreter's lock. Zeroing discards whole pages: its memory
and time do not grow with the size of the guest's request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kvmhost._ffi import check, ffi, lib
from kvmhost.memory.guest import GuestMemory
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["GuestDma"]

#: Size of one copy.
_PIECE_BYTES = 1 << 20


class GuestDma:
    """Reads, writes and zeroes ranges that each lie in one region.

    :param drop: discards ``n`` pages from a gfn on, which then read as zeros, and returns
        the number discarded
    :param pinned_ranges: ``(gpa, n_bytes)`` that ``drop`` does not change
    """

    def __init__(
        self,
        memory: GuestMemory,
        drop: Callable[[int, int], int],
        pinned_ranges: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._memory, self._drop = memory, drop
        self._pinned = sorted(
            (gpa & -PAGE_BYTES, -(-(gpa + n_bytes) & -PAGE_BYTES)) for gpa, n_bytes in pinned_ranges
        )

    def check(self, gpa: int, n_bytes: int) -> None:
        """Refuse a range that is not in one region.

        :raises LayoutError: if so
        """
        self._memory.region_at(gpa, n_bytes)

    def read(self, gpa: int, n_bytes: int) -> bytes:
        """Return at most 1 MiB of guest memory.

        :raises LayoutError: if the range is not in one region, or longer
        :raises HostError: ``EFAULT`` if the store has lost a page of it
        """
        # SAFETY: owned here; C writes n_bytes into it and keeps no pointer.
        buffer = ffi.new("uint8_t[]", min(n_bytes, _PIECE_BYTES))
        self._copy(gpa, buffer, n_bytes, write=False)
        return bytes(ffi.buffer(buffer, n_bytes))

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Set guest memory, a piece at a time.

        :raises LayoutError: if the range is not in one region; then nothing is written
        :raises HostError: ``EFAULT`` if the store has lost a page of it
        """
        self.check(gpa, len(data))
        for start in range(0, len(data), _PIECE_BYTES):
            piece = bytes(data[start : start + _PIECE_BYTES])
            # SAFETY: from_buffer keeps piece alive during the call; C only reads it.
            self._copy(gpa + start, ffi.from_buffer("uint8_t[]", piece), len(piece), write=True)

    def zero(self, gpa: int, n_bytes: int) -> None:
        """Make a range of guest memory zero.

        :raises LayoutError: if the range is not in one region; then nothing is changed
        """
        self.check(gpa, n_bytes)
        end = gpa + n_bytes
        first, last = min(-(-gpa & -PAGE_BYTES), end), end & -PAGE_BYTES
        if first >= last:
            self.write(gpa, bytes(n_bytes))
            return
        self.write(gpa, bytes(first - gpa))
        self.write(last, bytes(end - last))
        for start, stop, pinned in self._parts(first, last):
            n_pages = (stop - start) >> PAGE_SHIFT
            if pinned or self._drop(start >> PAGE_SHIFT, n_pages) < n_pages:
                for at in range(start, stop, PAGE_BYTES):
                    self.write(at, bytes(PAGE_BYTES))

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Split a range of whole pages at the pinned ranges."""
        for low, high in self._pinned:
            low, high = max(low, start), min(high, end)
            if low < high:
                if start < low:
                    yield start, low, False
                yield low, high, True
                start = high
        if start < end:
            yield start, end, False

    def _copy(self, gpa: int, buffer: object, n_bytes: int, write: bool) -> None:
        region = self._memory.region_at(gpa, n_bytes)
        # SAFETY: the range is in the region, whose guest mapping lives until the region closes.
        address = region.guest_address + gpa - region.gpa
        what = "process_vm_writev" if write else "process_vm_readv"
        check(lib.kh_guest_copy(address, buffer, n_bytes, int(write)), what, gpa=gpa)
