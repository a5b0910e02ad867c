"""KVM dirty bitmaps: a directory with one file per window, as ``KVM_GET_DIRTY_LOG`` fills it.

Each file contains little-endian 64-bit words; bit ``i`` of word ``w`` is page
``64 * w + i``. ``index.json`` contains the page range and the times. Single files of
other programs, without an index, can be imported too: each file is one window.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words
from kvmhost.decoding import decode_json
from kvmhost.files import new_directory, read_regular
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.exchange.common import (
    Imported,
    ImportedWindow,
    check_cost,
    check_pages,
    read_bounded,
)
from kvmhost.reclaim.record.chunks import write_file
from kvmhost.reclaim.record.clock import interval_s
from kvmhost.reclaim.record.meta import MAX_PAGES
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import Cost

__all__ = ["INDEX_FILE", "export", "read", "read_any", "read_files"]

INDEX_FILE = "index.json"
_NAME = re.compile(r"[\w.-]{1,80}")


class _Window(msgspec.Struct, frozen=True):
    file: str
    n_pages: int
    start_ns: int = 0
    end_ns: int = 0
    wall_ns: int = 0
    harvest_ns: int = 0
    rearm_ns: int = 0
    tracker: str = "dirty"
    table_format: str = "none"
    coarse_file: str = ""


class _Index(msgspec.Struct, frozen=True):
    gfn_start: int
    n_pages: int
    windows: list[_Window]
    page_bytes: int = 4096
    name: str = ""
    interval_ns: int = 0


def export(record: YoungRecord, directory: Path, first: int = 0, end: int | None = None) -> None:
    """Write windows as files in a new directory; the index is written last.

    :raises HostError: if a file cannot be written; the directory is removed then
    """
    with new_directory(directory) as partial:
        _export(record, partial, first, end)


def _export(record: YoungRecord, directory: Path, first: int, end: int | None) -> None:
    windows = []
    for number, bitmap in enumerate(record.bitmaps(first, end), first):
        name, coarse_name = f"{number:08}.bin", ""
        write_file(directory / name, bitmap.words.astype("<u8").tobytes())
        if bitmap.coarse is not None:
            coarse_name = f"{number:08}.coarse.bin"
            write_file(directory / coarse_name, bitmap.coarse.astype("<u8").tobytes())
        source = bitmap.provenance
        columns = {
            column: int(record.column(column)[number])
            for column in ("wall_ns", "harvest_ns", "rearm_ns")
        }
        windows.append(
            _Window(
                name,
                bitmap.n_pages,
                source.window_start_ns,
                source.window_end_ns,
                tracker=source.tracker,
                table_format=source.table_format,
                coarse_file=coarse_name,
                **columns,
            )
        )
    index = _Index(
        record.gfn_start, record.n_pages, windows, record.metadata.page_bytes, record.name,
        round(interval_s(record) * 1e9),
    )  # fmt: skip
    write_file(directory / INDEX_FILE, msgspec.json.format(msgspec.json.encode(index)))


def read(directory: Path) -> Imported:
    """Read a directory with an index.

    :raises RecordError: if the index is damaged, or a file does not match it
    """
    path = directory / INDEX_FILE
    try:
        raw = read_bounded(path)
        index = decode_json(raw, _Index)
    except msgspec.DecodeError as error:
        raise RecordError(str(path), "index", str(error)) from None
    n_pages = max([index.n_pages, *(window.n_pages for window in index.windows)])
    check_cost(n_pages, len(index.windows), len(raw) + _bytes_of(index, directory), path)
    if not 0 <= index.gfn_start < 1 << 52 or not 512 <= index.page_bytes <= 1 << 30:
        raise RecordError(str(path), "gfn_start or page_bytes", "cannot be")
    times = [t for w in index.windows for t in (w.start_ns, w.end_ns, w.wall_ns)]
    if not all(0 <= time < 1 << 63 for time in times) or not 0 <= index.interval_ns < 1 << 52:
        raise RecordError(str(path), "times", "are negative or too large")
    return Imported(
        index.gfn_start, index.n_pages, _indexed(index, directory), index.page_bytes,
        index.name, index.interval_ns,
    )  # fmt: skip


def read_any(
    paths: Sequence[Path], gfn_start: int = 0, n_pages: int | None = None, interval_s: float = 1.0
) -> Imported:
    """Read a directory with an index, or single bitmaps."""
    if paths[0].is_dir():
        return read(paths[0])
    return read_files(paths, gfn_start, n_pages, interval_s)


def read_files(
    files: Sequence[Path], gfn_start: int = 0, n_pages: int | None = None, interval_s: float = 1.0
) -> Imported:
    """Read single bitmaps as windows, in the order given, with synthetic times.

    :param n_pages: number of pages; None: the number of bits of the longest file
    """
    step = round(interval_s * 1e9)
    most = max((file.stat().st_size for file in files if file.is_file()), default=0) * 8
    pages = most if n_pages is None else n_pages
    for file in files:
        check_pages(pages, file)

    def windows() -> Iterator[ImportedWindow]:
        for number, file in enumerate(files):
            source = Provenance("dirty", "none", number * step, (number + 1) * step)
            yield ImportedWindow(YoungBitmap(gfn_start, pages, _words(file, pages), None, source))

    return Imported(gfn_start, pages, windows(), interval_ns=step)


def _bytes_of(index: _Index, directory: Path) -> int:
    """Return the total size of the bitmaps that an index names, each counted once."""
    names = {name for window in index.windows for name in (window.file, window.coarse_file)}
    sizes = 0
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            sizes += (directory / name).stat().st_size if _NAME.fullmatch(name) else 0
    return sizes


def _indexed(index: _Index, directory: Path) -> Iterator[ImportedWindow]:
    for window in index.windows:
        check_pages(window.n_pages, directory / INDEX_FILE)
        for name in (window.file, window.coarse_file):
            # Plain names only: an index must not refer to files outside its directory.
            if name and not _NAME.fullmatch(name):
                problem = f"{name[:80]!r} is no file name"
                raise RecordError(str(directory / INDEX_FILE), "file", problem)
        words = _words(directory / window.file, window.n_pages)
        coarse = None
        if window.coarse_file:
            coarse = _words(directory / window.coarse_file, window.n_pages)
        source = Provenance(window.tracker, window.table_format, window.start_ns, window.end_ns)
        yield ImportedWindow(
            YoungBitmap(index.gfn_start, window.n_pages, words, coarse, source),
            window.wall_ns,
            Cost(window.harvest_ns, window.rearm_ns),
        )


def _words(path: Path, n_pages: int) -> Words:
    raw = read_bounded_plain(path)
    wanted = n_words(n_pages) * 8
    # KVM rounds a bitmap up to 64 bits, other programs to a byte or a page.
    if len(raw) * 8 < n_pages or raw[wanted:].strip(b"\0"):
        problem = f"{len(raw)} bytes do not hold the bits of {n_pages} pages and nothing else"
        raise RecordError(str(path), "bitmap", problem, min(len(raw), wanted))
    words = np.frombuffer(raw[:wanted].ljust(wanted, b"\0"), dtype="<u8").astype(np.uint64)
    spare = -n_pages % 64
    if words.size and spare and int(words[-1]) >> (64 - spare):
        problem = f"a bit is set after the last of {n_pages} pages"
        raise RecordError(str(path), "bitmap", problem, wanted - 8)
    return words


def read_bounded_plain(path: Path) -> bytes:
    """Return a bitmap's bytes.

    :raises RecordError: if it is larger than a record can be
    """
    try:
        return read_regular(path, MAX_PAGES // 8 + 4096)
    except OSError as error:
        raise RecordError(str(path), "file", error.strerror or str(error)) from error
