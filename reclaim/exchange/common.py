"""What the formats share: windows on their way into a record, and bounded reading."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, YoungBitmap, n_words
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record.meta import MAX_PAGES, RecordSession
from kvmhost.reclaim.record.writer import Cost, RecordWriter
from kvmhost.reclaim.young.bits import runs

__all__ = [
    "MAX_FILE_BYTES",
    "Imported",
    "ImportedWindow",
    "bitmap_of_ranges",
    "check_pages",
    "ranges_of",
    "read_bounded",
    "write_record",
]

#: A file to import, unpacked, is at most so large.
MAX_FILE_BYTES = 1 << 30

Edges = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class ImportedWindow:
    """One window, as the record shall have it."""

    bitmap: YoungBitmap
    wall_ns: int = 0
    cost: Cost = dataclasses.field(default_factory=Cost)


@dataclasses.dataclass(frozen=True)
class Imported:
    """A file that was read. ``windows`` is read once.

    :ivar remark: what the user should know about what was read
    """

    gfn_start: int
    n_pages: int
    windows: Iterable[ImportedWindow]
    page_bytes: int = 4096
    name: str = ""
    interval_ns: int = 0
    remark: str = ""


def write_record(found: Imported, path: Path, origin: str) -> int:
    """Write what was read as a record; return how many windows it has.

    Nothing is left at ``path`` if the file turns out to be damaged on the way.

    :param origin: where it comes from, for the record's facts
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
    """Return a file's bytes, unpacked if they are zlib's.

    :raises RecordError: if there are more than ``most_bytes``, or they are damaged
    """
    try:
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except OSError as error:
        raise RecordError(str(path), "file", error.strerror or str(error)) from error
    if len(raw) > most_bytes:
        raise RecordError(str(path), "size", f"above {most_bytes} bytes, the most that is read")
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
    """Refuse more pages than a record can have.

    :raises RecordError: if so
    """
    if not 0 <= n_pages <= MAX_PAGES:
        problem = f"{n_pages} pages: a record has at most {MAX_PAGES}"
        raise RecordError(str(path), "range", problem, offset)


def ranges_of(words: Words, n_pages: int) -> tuple[Edges, Edges]:
    """Return first and end page of the runs of a bitmap, counted from its start."""
    raw = words.astype("<u8", copy=False).view(np.uint8)
    return runs(np.unpackbits(raw, count=n_pages, bitorder="little").view(bool))


def bitmap_of_ranges(ranges: Iterable[tuple[int, int]], n_pages: int) -> Words:
    """Return the bitmap of runs of pages; they may overlap and lie in any order."""
    bits = np.zeros(n_words(n_pages) * 64, dtype=bool)
    for first, end in ranges:
        bits[first:end] = True
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64, copy=False)
