"""Guest memory in chunks of 1 MiB, for snapshots: read while frozen, and restored.

A chunk is up to 256 neighbouring pages of one region; pages that are all zero are not
kept. Evicted pages are read directly from the pager's store, and restored into it if they
exceed the limit: neither saving nor restoring increases memory use.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import typing
from collections.abc import Iterator, Sequence

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import LayoutError, PagerError
from kvmhost.memory.guest import GuestMemory
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

if typing.TYPE_CHECKING:
    from kvmhost.pager.pager import Pager

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_PAGES",
    "ChunkRange",
    "ChunkReader",
    "ChunkWriter",
    "chunk_ranges",
    "crc32c",
]

CHUNK_PAGES: int = lib.KH_CHUNK_PAGES
CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkRange:
    """The pages of one chunk.

    :ivar region: number of the region
    :ivar page: first page, counted within the region
    :ivar index: the same page, counted over all regions
    :ivar gfn: the same page as a guest frame number
    """

    region: int
    page: int
    index: int
    gfn: int
    n_pages: int


def chunk_ranges(regions: Sequence[tuple[int, int]]) -> Iterator[ChunkRange]:
    """Cut memory regions into chunks, in order.

    :param regions: ``(gpa, n_bytes)`` each, ascending
    """
    index = 0
    for number, (gpa, n_bytes) in enumerate(regions):
        n_pages = n_bytes >> PAGE_SHIFT
        for page in range(0, n_pages, CHUNK_PAGES):
            count = min(CHUNK_PAGES, n_pages - page)
            yield ChunkRange(number, page, index + page, (gpa >> PAGE_SHIFT) + page, count)
        index += n_pages


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C of bytes, as in RFC 3720.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    # SAFETY: the buffer lives until the call returns.
    return int(lib.kh_crc32c(ffi.from_buffer(data), len(data)))


class ChunkReader:
    """Reads chunks of a VM whose vCPUs are stopped.

    :param pager_core: from :meth:`~kvmhost.pager.Pager.frozen`; None: there is no pager
    """

    def __init__(self, memory: GuestMemory, pager_core: typing.Any) -> None:
        self._memory, self._pager = memory, pager_core or ffi.NULL
        self._chunk = ffi.new("struct kh_chunk *")
        self._bad = ffi.new("uint32_t *")

    def read(self, where: ChunkRange, into: memoryview) -> tuple[bytes, int, int]:
        """Read the pages of a chunk that are not zero, packed, to the start of ``into``.

        :param into: room for all pages of the chunk
        :return: bitmap of the pages that were read (32 bytes), their number, their CRC-32C
        :raises PagerError: if a page cannot be read; names its gfn
        """
        if into.nbytes < where.n_pages * PAGE_BYTES:
            raise LayoutError(f"{into.nbytes} bytes for a chunk of {where.n_pages} pages")
        # SAFETY: from_buffer holds into until the call returns.
        result = lib.kh_chunk_read(
            self._pager,
            self._memory.regions[where.region].memfd,
            where.page,
            where.index,
            where.n_pages,
            self._chunk,
            ffi.from_buffer(into),
            self._bad,
        )
        if result < 0:
            raise PagerError(_unreadable(where.gfn + self._bad[0], -result))
        chunk = self._chunk
        return bytes(ffi.buffer(chunk.held)), int(chunk.n_held), int(chunk.crc)


def _unreadable(gfn: int, number: int) -> str:
    if number == errno.EBADMSG:
        return f"gfn {gfn:#x} is lost: what the store has is not what was evicted"
    return f"gfn {gfn:#x} cannot be read: {os.strerror(number)}"


class ChunkWriter:
    """Fills the memory of a VM that has not started; holes stay holes.

    :param pager: an armed pager with a limit, enforced from the first page on;
        None: everything becomes resident
    """

    def __init__(self, memory: GuestMemory, pager: Pager | None, n_pinned: int = 0) -> None:
        self._memory, self._pager = memory, ffi.NULL if pager is None else pager.core
        self._chunk = ffi.new("struct kh_chunk *")
        self._bad = ffi.new("uint32_t *")
        limit = 0 if pager is None else pager.resident_max_bytes // PAGE_BYTES
        self._room = max(0, limit - n_pinned) if limit else memory.n_pages

    def fill(self, where: ChunkRange, held: bytes, data: memoryview) -> None:
        """Write the pages of a chunk to memory or the store.

        :param held: which pages ``data`` has, as :meth:`ChunkReader.read` returns it
        :raises LayoutError: if ``data`` has a page that is all zero, or the store is full;
            names the gfn
        """
        n_held = int.from_bytes(held, "little").bit_count()
        if data.nbytes != n_held * PAGE_BYTES or len(held) * 8 != CHUNK_PAGES:
            raise LayoutError(f"{data.nbytes} bytes for {n_held} pages at gfn {where.gfn:#x}")
        ffi.memmove(self._chunk.held, held, len(held))
        # SAFETY: from_buffer holds data until the call returns.
        result = lib.kh_chunk_fill(
            self._pager,
            self._memory.regions[where.region].memfd,
            where.page,
            where.index,
            where.n_pages,
            self._chunk,
            ffi.from_buffer(data),
            self._room,
            self._bad,
        )
        gfn = where.gfn + self._bad[0]
        if result == -errno.EINVAL:
            raise LayoutError(f"gfn {gfn:#x} is all zero, and no snapshot has such a page")
        if result == -errno.ENOSPC:
            raise LayoutError(f"gfn {gfn:#x} does not fit: the store of evicted pages is full")
        self._room -= check(result, "kh_chunk_fill", gfn=gfn)
