"""Memory regions and access to them.

Each region is one memfd, mapped twice. The **guest mapping** belongs to KVM:
its host PTEs reflect the guest's accesses. All other code reads and writes the
**alias**, which does not affect the PTEs of the guest mapping. Once the pager is
armed, a touch of an evicted page through either mapping restores it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvmhost._ffi import check, ffi, lib
from kvmhost.closing import Closing
from kvmhost.errors import CapabilityError, LayoutError, StateError
from kvmhost.files import os_errors
from kvmhost.units import HUGE_PAGE_BYTES, PAGE_BYTES, PAGE_SHIFT
from kvmhost.vm.names import ACCESS, Access

if typing.TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvmhost.bitmap import Words

__all__ = ["GfnRange", "GuestMemory", "GuestMemslot", "Region", "pieces"]


class GfnRange(typing.Protocol):
    """A run of guest pages that is mapped in a process; :class:`Region` is one."""

    @property
    def gfn(self) -> int:
        """First guest frame number."""

    @property
    def n_pages(self) -> int:
        """Size in pages."""

    @property
    def guest_address(self) -> int:
        """Address at which its first page is mapped."""


class GpaRange:
    """A run of whole pages of guest physical addresses."""

    gpa: int
    n_bytes: int

    @property
    def end(self) -> int:
        """Guest physical address after the last byte."""
        return self.gpa + self.n_bytes

    @property
    def gfn(self) -> int:
        """First guest frame number."""
        return self.gpa >> PAGE_SHIFT

    @property
    def n_pages(self) -> int:
        """Size in pages."""
        return self.n_bytes >> PAGE_SHIFT


class Region(GpaRange):
    """A run of guest physical memory in a memfd of its own.

    :param gpa: guest physical address of the first byte, page-aligned
    :param n_bytes: size, a multiple of the page size
    :raises LayoutError: for bad alignment or size
    :raises HostError: if the host has no memory for it, or a limit forbids it
    """

    def __init__(self, gpa: int, n_bytes: int, name: str = "kvmhost") -> None:
        if gpa % PAGE_BYTES or n_bytes % PAGE_BYTES or n_bytes <= 0 or gpa < 0:
            raise LayoutError(
                f"region [{gpa:#x}, {gpa + n_bytes:#x}): not a whole number of 4 KiB pages"
            )
        self.gpa, self.n_bytes = gpa, n_bytes
        with contextlib.ExitStack() as undo, os_errors(f"guest memory of {n_bytes:,} bytes"):
            self.memfd = os.memfd_create(f"{name}-{gpa:#x}", os.MFD_CLOEXEC)
            undo.callback(os.close, self.memfd)
            os.ftruncate(self.memfd, n_bytes)
            self.alias = mmap.mmap(self.memfd, n_bytes)
            undo.callback(self.alias.close)
            self.guest_address = _map(self.memfd, n_bytes)
            undo.pop_all()
        # SAFETY: an address only; the mapping belongs to self.alias and lives until close().
        self.alias_address = int(ffi.cast("uintptr_t", ffi.from_buffer(self.alias)))
        #: Whether a memslot shows it to the guest.
        self.attached = True

    def __repr__(self) -> str:
        return f"<Region gpa [{self.gpa:#x}, {self.end:#x})>"

    def zap(self, gfn: int, n_pages: int, words: Words | None = None) -> None:
        """Drop host PTEs of the guest mapping; the contents stay in the memfd.

        :param gfn: first page, with all ``n_pages`` in this region
        :param words: zap only the pages of the range whose bits are set; None: all
        :raises StateError: if the region is closed: other memory may be at its address
        """
        if self.memfd < 0:
            raise StateError(repr(self))
        address = self.guest_address + ((gfn - self.gfn) << PAGE_SHIFT)
        # SAFETY: words lives until the call returns; the range is inside this mapping.
        pointer = ffi.NULL if words is None else ffi.from_buffer("uint64_t[]", words)
        check(lib.kh_zap(address, n_pages, pointer, 0), "madvise", start=address, pages=n_pages)

    def use_huge_pages(self) -> None:
        """Back all of it with huge pages; before an engine uses the guest mapping.

        :raises CapabilityError: if the kernel makes none of shared memory, or has none free
        """
        if self.n_bytes % HUGE_PAGE_BYTES:
            raise LayoutError(f"{self!r}: not a whole number of 2 MiB pages")
        address = ffi.new("uint64_t *")
        check(lib.kh_map_huge(self.memfd, self.n_bytes, address), "mmap", length=self.n_bytes)
        before, self.guest_address = self.guest_address, int(address[0])
        lib.kh_unmap(before, self.n_bytes)
        self.populate()  # the kernel makes them of pages, not of holes
        result = lib.kh_collapse(self.guest_address, self.n_bytes)
        if result < 0:
            raise CapabilityError(
                "huge pages",
                "MADV_COLLAPSE of shared memory",
                os.strerror(-result),
                "use Linux 6.1 or newer with CONFIG_TRANSPARENT_HUGEPAGE, and free memory",
            )

    def populate(self) -> None:
        """Allocate all of it and map it in the guest mapping, as the guest's touches would.

        :raises HostError: if the host has not enough memory
        """
        with os_errors(f"guest memory of {self.n_bytes:,} bytes"):
            result = lib.kh_populate(self.guest_address, self.n_bytes)
            if result < 0:
                raise OSError(-result, os.strerror(-result))

    def protect(self, offset: int, n_bytes: int, access: Access) -> None:
        """Set what the guest mapping permits; the alias and the contents stay as they are.

        A vCPU that violates it stops with :class:`~kvmhost.exits.MemoryFault`.

        :param offset: in bytes, page-aligned, as is ``n_bytes``
        :raises LayoutError: for a range that is not inside the region
        """
        address = self.address_of(offset, n_bytes)
        check(
            lib.kh_protect(address, n_bytes, ACCESS.index(access)),
            "mprotect",
            start=address,
            length=n_bytes,
        )

    def vacate(self, offset: int, n_bytes: int) -> None:
        """Unmap a part of the guest mapping; its addresses stay reserved.

        :raises LayoutError: for a range that is not inside the region
        """
        address = self.address_of(offset, n_bytes)
        # SAFETY: inside this region's own mapping; nothing of the VMM reads through it.
        check(lib.kh_vacate(address, n_bytes), "mmap", start=address, length=n_bytes)

    def remap(self, offset: int, n_bytes: int) -> None:
        """Undo :meth:`vacate`: map the memfd there again.

        :raises LayoutError: for a range that is not inside the region
        """
        address = self.address_of(offset, n_bytes)
        # SAFETY: inside the addresses that this region reserves until close().
        result = lib.kh_remap(self.memfd, offset, n_bytes, address)
        check(result, "mmap", start=address, length=n_bytes)

    def address_of(self, offset: int, n_bytes: int) -> int:
        """Return the guest address of a part.

        :raises LayoutError: for a range that is not inside the region
        :raises StateError: if the region is closed
        """
        if self.memfd < 0:
            raise StateError(repr(self))
        is_whole = offset % PAGE_BYTES == 0 and n_bytes % PAGE_BYTES == 0
        if not is_whole or n_bytes <= 0 or not 0 <= offset <= self.n_bytes - n_bytes:
            start = self.gpa + offset
            raise LayoutError(
                f"gpa range [{start:#x}, {start + n_bytes:#x}): not whole pages of {self!r}"
            )
        return self.guest_address + offset

    def close(self) -> None:
        """Unmap both mappings and close the memfd. Idempotent.

        :raises BufferError: if a view on the alias is still held
        """
        if self.memfd < 0:
            return
        self.alias.close()
        fd, self.memfd = self.memfd, -1
        lib.kh_unmap(self.guest_address, self.n_bytes)
        os.close(fd)


@dataclasses.dataclass(frozen=True)
class GuestMemslot(GpaRange):
    """A run of guest physical addresses that shows a part of a region.

    :param number: the slot of KVM
    :param offset: of its first byte in the region
    :param is_alias: whether the region's pages have their gfns elsewhere: in pager, trackers and
        views a page goes by one gfn, that of the region
    """

    number: int
    gpa: int
    n_bytes: int
    region: Region
    offset: int = 0
    is_alias: bool = False

    @property
    def guest_address(self) -> int:
        """Address of its first byte in the guest mapping."""
        return self.region.guest_address + self.offset


def _map(memfd: int, n_bytes: int) -> int:
    """Return the address of a new mapping of the whole memfd."""
    address = ffi.new("uint64_t *")
    result = lib.kh_map(memfd, n_bytes, address)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return int(address[0])


class GuestMemory(Closing):
    """All regions of a VM, ascending, with bounds-checked access by gpa.

    >>> memory = GuestMemory.of_size(1 << 20)
    >>> memory[0x1000:0x1004] = b"abcd"
    >>> bytes(memory[0x1000:0x1004])
    b'abcd'
    >>> memory.close()
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = sorted(regions, key=lambda region: region.gpa)
        self._closed = False
        for below, above in zip(self._regions, self._regions[1:], strict=False):
            if below.end > above.gpa:
                raise LayoutError(f"regions overlap at {above.gpa:#x}")
        #: Whether parts of memory were punched: that splits huge pages into folios of all sizes.
        self.was_punched = False
        #: Memslots that show parts of the regions at other gpas; changed by ``machine.memslots``.
        self.aliases: list[GuestMemslot] = []

    @classmethod
    def of_size(cls, n_bytes: int, gpa: int = 0) -> GuestMemory:
        """Make one region at ``gpa``."""
        return cls([Region(gpa, n_bytes)])

    def __repr__(self) -> str:
        held = ", ".join(f"[{region.gpa:#x}, {region.end:#x})" for region in self._regions)
        return f"<GuestMemory gpa {held}{', closed' if self._closed else ''}>"

    @property
    def regions(self) -> list[Region]:
        """The regions, ascending.

        :raises StateError: if the memory is closed: nothing is mapped any more
        """
        if self._closed:
            raise StateError("guest memory")
        return self._regions

    @property
    def n_pages(self) -> int:
        """Pages in all regions."""
        return sum(region.n_pages for region in self.regions)

    @property
    def gfn_end(self) -> int:
        """First gfn above all regions."""
        return self.regions[-1].end >> PAGE_SHIFT

    def region_at(self, gpa: int, n_bytes: int = 1) -> Region:
        """Return the region that holds all of ``[gpa, gpa + n_bytes)``.

        :raises LayoutError: if there is none
        """
        for region in self.regions:
            if region.gpa <= gpa and gpa + n_bytes <= region.end:
                return region
        held = ", ".join(f"[{r.gpa:#x}, {r.end:#x})" for r in self.regions)
        raise LayoutError(f"gpa range [{gpa:#x}, {gpa + n_bytes:#x}) is not in {held}")

    def find_hva(self, gpa: int) -> int | None:
        """Return the host address of a gpa in the guest mapping; None outside all memslots."""
        for slot in [*self.own_memslots(), *self.aliases]:
            if slot.gpa <= gpa < slot.end:
                return slot.guest_address + gpa - slot.gpa
        return None

    def own_memslots(self) -> list[GuestMemslot]:
        """Return the memslots of the regions: one for each that is attached."""
        return [
            GuestMemslot(number, region.gpa, region.n_bytes, region)
            for number, region in enumerate(self.regions)
            if region.attached
        ]

    def view(self, gpa: int, n_bytes: int) -> memoryview:
        """Return a writable view on ``[gpa, gpa + n_bytes)`` through the alias.

        :raises LayoutError: if the range is not in one region
        """
        if n_bytes < 0:
            raise LayoutError(f"negative length {n_bytes} at gpa {gpa:#x}")
        region = self.region_at(gpa, max(n_bytes, 1))
        start = gpa - region.gpa
        return memoryview(region.alias)[start : start + n_bytes]

    def array(
        self, gpa: int, shape: int | tuple[int, ...], dtype: npt.DTypeLike
    ) -> npt.NDArray[typing.Any]:
        """Return a numpy view on guest memory through the alias; no copy.

        :param dtype: state the byte order of anything wider than a byte (``"<u8"``)
        """
        import numpy as np

        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        view: npt.NDArray[typing.Any] = np.frombuffer(self.view(gpa, count * kind.itemsize), kind)
        return view.reshape(shape)

    def resident(self) -> npt.NDArray[np.bool_]:
        """Return which pages are in memory now: shape ``(n_pages,)``, by region.

        Uses mincore(2) on the alias, which touches no page. Pages in the host's swap
        are not resident, but :meth:`held`.
        """
        return self._by_region(
            "mincore", lambda r, words: lib.kh_resident(r.alias_address, r.n_pages, words)
        )

    def resident_gfns(self, gfn_start: int, n_pages: int) -> npt.NDArray[np.bool_]:
        """Return :meth:`resident` by gfn: ``[i]`` is ``gfn_start + i``, False in holes."""
        import numpy as np

        resident, found, first = self.resident(), np.zeros(n_pages, dtype=bool), 0
        for region in self.regions:
            low = max(gfn_start, region.gfn)
            high = min(gfn_start + n_pages, region.gfn + region.n_pages)
            if low < high:
                shift = first - region.gfn
                found[low - gfn_start : high - gfn_start] = resident[low + shift : high + shift]
            first += region.n_pages
        return found

    def held(self) -> npt.NDArray[np.bool_]:
        """Return which pages the memfds hold, in memory or in swap: shape ``(n_pages,)``."""
        return self._by_region("lseek", lambda r, words: lib.kh_held(r.memfd, 0, r.n_pages, words))

    def _by_region(
        self, name: str, call: Callable[[Region, typing.Any], int]
    ) -> npt.NDArray[np.bool_]:
        import numpy as np

        from kvmhost.bitmap import n_words, unpack

        parts = []
        for region in self.regions:
            words = np.zeros(n_words(region.n_pages), dtype=np.uint64)
            check(call(region, ffi.from_buffer("uint64_t[]", words)), name, gpa=region.gpa)
            parts.append(unpack(words, region.n_pages))
        return np.concatenate(parts)

    def resident_bytes(self) -> int:
        """Return the bytes that the memfds hold now, from fstat(2)."""
        return sum(os.fstat(region.memfd).st_blocks * 512 for region in self.regions)

    def punch(self, gfn: int, n_pages: int, pinned: Iterable[tuple[int, int]] = ()) -> int:
        """Discard pages: they read as zeros. Only while no pager is open.

        Pages of a huge page with other references are zeroed, and their memory is not
        released.

        :param pinned: gpa ranges ``(gpa, n_bytes)`` that are kept
        :return: number of pages discarded
        :raises LayoutError: if the range is not in one region
        """
        region = self.region_at(gfn << PAGE_SHIFT, n_pages << PAGE_SHIFT)
        pieces_left = [(gfn, gfn + n_pages)]
        for gpa, n_bytes in pinned:
            low, high = gpa >> PAGE_SHIFT, -(-(gpa + n_bytes) // PAGE_BYTES)
            pieces_left = [
                part
                for start, end in pieces_left
                for part in ((start, min(end, low)), (max(start, high), end))
                if part[0] < part[1]
            ]
        self.was_punched = True
        for start, end in pieces_left:
            offset = (start - region.gfn) << PAGE_SHIFT
            check(
                lib.kh_punch(region.memfd, offset, (end - start) << PAGE_SHIFT),
                "fallocate",
                offset=offset,
            )
        return sum(end - start for start, end in pieces_left)

    def punch_all(self) -> None:
        """Zero all memory by releasing every page."""
        for region in self.regions:
            check(lib.kh_punch(region.memfd, 0, region.n_bytes), "fallocate", gpa=region.gpa)

    def index_of_gfn(self, gfn: int) -> int:
        """Return a page's number over all regions.

        :raises LayoutError: if no region holds it
        """
        first = 0
        for region in self.regions:
            if region.gfn <= gfn < region.gfn + region.n_pages:
                return first + gfn - region.gfn
            first += region.n_pages
        for slot in self.aliases:
            if slot.gfn <= gfn < slot.gfn + slot.n_pages:
                own = slot.region.gfn + (slot.offset >> PAGE_SHIFT) + gfn - slot.gfn
                raise LayoutError(f"gfn {gfn:#x} is an alias of gfn {own:#x}: name that one")
        raise LayoutError(f"gfn {gfn:#x} is in no memory region")

    def __getitem__(self, where: slice) -> memoryview:
        gpa, n_bytes = _bounds(where)
        return self.view(gpa, n_bytes)

    def __setitem__(self, where: slice, data: bytes | bytearray | memoryview) -> None:
        gpa, n_bytes = _bounds(where)
        if len(data) != n_bytes:
            raise LayoutError(f"{len(data)} bytes for a range of {n_bytes} at gpa {gpa:#x}")
        self.view(gpa, n_bytes)[:] = data

    def close(self) -> None:
        """Close all regions. Idempotent.

        :raises BufferError: if a view is still held; call again once it is released
        """
        self._closed = True
        for region in self._regions:
            region.close()


_Range = typing.TypeVar("_Range", bound=GfnRange)


def pieces(
    regions: Iterable[_Range], gfn_start: int, n_pages: int
) -> Iterator[tuple[_Range, int, int]]:
    """Split a gfn range by region: yields ``(region, first gfn, pages)``."""
    for region in regions:
        start = max(gfn_start, region.gfn)
        end = min(gfn_start + n_pages, region.gfn + region.n_pages)
        if start < end:
            yield region, start, end - start


def _bounds(where: slice) -> tuple[int, int]:
    if not isinstance(where, slice):
        raise TypeError(f"guest memory takes a slice [gpa:gpa + n_bytes], not {where!r}")
    for bound in (where.start, where.stop):
        if bound is not None and not isinstance(bound, int):
            raise TypeError(f"guest memory takes integers as bounds, not {bound!r}")
    if where.step is not None or where.start is None or where.stop is None:
        raise LayoutError("guest memory takes [gpa:gpa + n_bytes] without a step")
    if where.stop < where.start:
        raise LayoutError(f"gpa range ends ({where.stop:#x}) before it starts ({where.start:#x})")
    return where.start, where.stop - where.start
