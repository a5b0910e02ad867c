"""Functions shared by the formats: windows to be written to a record, and bounded reading."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, YoungBitmap, n_words
from kvmhost.files import read_regular
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record.meta import MAX_PAGES, RecordSession
from kvmhost.reclaim.record.writer import Cost, RecordWriter

__all__ = [
    "MAX_FILE_BYTES",
    "Imported",
    "ImportedWindow",
    "bitmap_of_ranges",
    "check_cost",
    "check_pages",
    "ranges_of",
    "read_bounded",
    "write_record",
]

#: Compressed text is refused as a decompression bomb if it expands by more than this factor
#: and to more than this number of bytes.
_UNPACKED_RATIO, _UNPACKED_BYTES = 256, 16 << 20
#: Pages allowed for a file of any size (64 GiB of memory), and additional pages per byte of
#: the file; 1 TiB then requires half a megabyte, and real recordings are much larger.
_FREE_PAGES, _PAGES_PER_BYTE = 1 << 24, 512
#: The same limits for the sum of the pages of all windows.
_FREE_WINDOW_PAGES, _WINDOW_PAGES_PER_BYTE = 1 << 30, 1 << 16
#: Maximum size of an imported file after decompression.
MAX_FILE_BYTES = 1 << 30

#: Runs of a bitmap are found in parts of this size.
_PART_WORDS = 1 << 16
_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

Edges = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class ImportedWindow:
    """One window to be written to the record."""

    bitmap: YoungBitmap
    wall_ns: int = 0
    cost: Cost = dataclasses.field(default_factory=Cost)


@dataclasses.dataclass(frozen=True)
class Imported:
    """The content of an imported file. ``windows`` can be iterated only once.

    :ivar remark: a note for the user about the import
    """

    gfn_start: int
    n_pages: int
    windows: Iterable[ImportedWindow]
    page_bytes: int = 4096
    name: str = ""
    interval_ns: int = 0
    remark: str = ""


def write_record(found: Imported, path: Path, origin: str) -> int:
    """Write imported windows as a record; return the number of windows.

    No file is left at ``path`` if the imported file turns out to be damaged.

    :param origin: source of the import, for the record's facts
    """
    windows = iter(found.windows)
    first = next(windows, None)
    source = None if first is None else first.bitmap.provenance
    session = RecordSession(
        0,
        source.tracker if source else "unknown",
        source.table_format if source else "none",
        found.interval_ns,
        facts={"imported_from": origin},
    )
    writer = RecordWriter.create(
        path,
        found.n_pages,
        gfn_start=found.gfn_start,
        page_bytes=found.page_bytes,
        name=found.name,
        session=session,
    )
    try:
        with writer:
            for window in itertools.chain([] if first is None else [first], windows):
                writer.append(window.bitmap, wall_ns=window.wall_ns, cost=window.cost)
    except BaseException:
        import shutil

        shutil.rmtree(path, ignore_errors=True)
        raise
    return writer.n_windows


def read_bounded(path: Path, most_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a file, decompressed if it is a zlib stream.

    :raises RecordError: if it is larger than ``most_bytes``, or damaged
    """
    try:
        raw = read_regular(path, most_bytes)
    except OSError as error:
        raise RecordError(str(path), "file", error.strerror or str(error)) from error
    most_bytes = min(most_bytes, max(_UNPACKED_BYTES, _UNPACKED_RATIO * len(raw)))
    if raw[:1] != b"\x78":
        return raw
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(raw, most_bytes)
    except zlib.error as error:
        raise RecordError(str(path), "zlib stream", str(error)) from None
    if not unpacker.eof:
        problem = (
            "is cut off" if not unpacker.unconsumed_tail else f"holds above {most_bytes} bytes"
        )
        raise RecordError(str(path), "zlib stream", problem)
    return plain


def check_pages(n_pages: int, path: Path, offset: int | None = None) -> None:
    """Check that a record can have this number of pages.

    :raises RecordError: if it cannot
    """
    if not 0 <= n_pages <= MAX_PAGES:
        problem = f"{n_pages} pages: a record has at most {MAX_PAGES}"
        raise RecordError(str(path), "range", problem, offset)


def check_cost(n_pages: int, n_windows: int, n_bytes: int, path: Path) -> None:
    """Refuse a file whose import would need memory and time out of proportion to its size.

    :param n_pages: pages of the largest window
    :param n_bytes: size of the file after decompression
    :raises RecordError: if the file is refused
    """
    check_pages(n_pages, path)
    most = max(_FREE_PAGES, _PAGES_PER_BYTE * n_bytes)
    if n_pages > most:
        problem = f"{n_pages} pages in {n_bytes} bytes: at most {most}; import a part (--range)"
        raise RecordError(str(path), "range", problem)
    most = max(_FREE_WINDOW_PAGES, _WINDOW_PAGES_PER_BYTE * n_bytes)
    if n_pages * n_windows > most:
        problem = f"{n_windows} windows of {n_pages} pages in {n_bytes} bytes: too many"
        raise RecordError(str(path), "windows", problem)


def ranges_of(words: Words, n_pages: int) -> tuple[Edges, Edges]:
    """Return the start and end pages of the runs of a bitmap, relative to its start.

    It needs memory for the runs and for a part of the bitmap, not for each page.
    """
    words = words.astype("<u8", copy=False)
    edges, carry = [np.zeros(0, dtype=np.int64)], np.uint64(0)
    for first in range(0, len(words), _PART_WORDS):
        part = words[first : first + _PART_WORDS]
        # Bit i is set if bit i differs from bit i - 1.
        before = np.concatenate([[carry], part[:-1] >> np.uint64(63)]).astype(np.uint64)
        changed = part ^ (part << np.uint64(1) | before)
        carry = part[-1] >> np.uint64(63)
        at = np.flatnonzero(changed)
        bits = np.unpackbits(changed[at].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        rows, columns = np.nonzero(bits)
        edges.append((first + at[rows]) * 64 + columns)
    found = np.concatenate(edges)
    found = found[found < n_pages]
    if found.size % 2:
        found = np.append(found, n_pages)
    return found[::2], found[1::2]


def bitmap_of_ranges(ranges: Iterable[tuple[int, int]], n_pages: int) -> Words:
    """Return the bitmap of ranges of pages, which may overlap and be in any order."""
    words = np.zeros(n_words(n_pages), dtype=np.uint64)
    for first, end in ranges:
        if first >= end:
            continue
        low, high = first // 64, (end - 1) // 64
        # Bits of the first word from the start of the range, and of the last up to its end.
        head, tail = _ONES << np.uint64(first % 64), _ONES >> np.uint64(63 - (end - 1) % 64)
        if low == high:
            words[low] |= head & tail
        else:
            words[low] |= head
            words[low + 1 : high] = _ONES
            words[high] |= tail
    return words
