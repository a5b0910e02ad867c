"""Plain text: ranges of gfns by window, and lists of gfns.

::

    # kvmhost young ranges: gfn_start=0x0 n_pages=16384 page_bytes=4096 interval_ns=1000000000
    window start_ns=1 end_ns=2 n_pages=16384 tracker=guestpt table_format=npt
    0x400 0x480
    coarse 0x400 0x480

A range is ``[first, end)``. Without ``window`` lines, all ranges belong to one window. A
list of gfns is one window too, with one number per line. Numbers are decimal, or
hexadecimal with 0x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.exchange.common import (
    Imported,
    ImportedWindow,
    bitmap_of_ranges,
    check_cost,
    check_pages,
    ranges_of,
    read_bounded,
)
from kvmhost.reclaim.record.clock import interval_s
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import Cost

__all__ = ["export_gfns", "export_ranges", "export_working_set", "read", "working_set_gfns"]

_HEAD = "# kvmhost young ranges:"
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|\d{1,19}")
_WORD = re.compile(r"(\w{1,20})=(\S{1,200})")


def export_ranges(
    record: YoungRecord, out: IO[bytes], first: int = 0, end: int | None = None
) -> None:
    """Write windows as ranges."""
    head = (
        f"{_HEAD} gfn_start={record.gfn_start:#x} n_pages={record.n_pages} "
        f"page_bytes={record.metadata.page_bytes} interval_ns={round(interval_s(record) * 1e9)}\n"
    )
    out.write(head.encode())
    for number, bitmap in enumerate(record.bitmaps(first, end), first):
        source = bitmap.provenance
        columns = " ".join(
            f"{name}={record.column(name)[number]}"
            for name in ("wall_ns", "harvest_ns", "rearm_ns")
        )
        lines = [
            f"window start_ns={source.window_start_ns} end_ns={source.window_end_ns} "
            f"n_pages={bitmap.n_pages} {columns} has_coarse={int(bitmap.coarse is not None)} "
            f"tracker={source.tracker} table_format={source.table_format}"
        ]
        for prefix, words in (("", bitmap.words), ("coarse ", bitmap.coarse)):
            if words is not None:
                starts, ends = ranges_of(words, bitmap.n_pages)
                lines += [
                    f"{prefix}{a:#x} {b:#x}"
                    for a, b in zip(
                        (starts + record.gfn_start).tolist(),
                        (ends + record.gfn_start).tolist(),
                        strict=True,
                    )
                ]
        out.write(("\n".join(lines) + "\n").encode())


def working_set_gfns(
    record: YoungRecord, first: int = 0, end: int | None = None, min_share: float = 0.0
) -> npt.NDArray[np.int64]:
    """Return the working set of some windows, ordered from most to least often young.

    This is the order in which to fault pages in if there is not enough time for all.

    :param min_share: leave out pages that were young in a smaller share of the windows
    """
    end = len(record) if end is None else end
    counts = record.between(first, end, "count").astype(np.int64)
    pages = np.flatnonzero(counts >= max(1, min_share * (end - first)))
    return pages[np.argsort(-counts[pages], kind="stable")] + record.gfn_start


def export_gfns(gfns: npt.NDArray[np.int64], out: IO[bytes], *, binary: bool = False) -> None:
    """Write a list of gfns: hexadecimal, one per line, or little-endian 64-bit numbers."""
    if binary:
        out.write(gfns.astype("<u8").tobytes())
        return
    for at in range(0, gfns.size, 4096):
        out.write("".join(f"{gfn:#x}\n" for gfn in gfns[at : at + 4096].tolist()).encode())


def export_working_set(
    record: YoungRecord,
    out: IO[bytes],
    first: int,
    end: int,
    *,
    min_share: float = 0.0,
    binary: bool = False,
) -> int:
    """Write the working set of some windows; return the number of gfns."""
    gfns = working_set_gfns(record, first, end, min_share)
    export_gfns(gfns, out, binary=binary)
    return int(gfns.size)


def read(path: Path) -> Imported:
    """Read ranges by window, or a list of gfns.

    :raises RecordError: with the offset of the first invalid line
    """
    head: dict[str, str] = {}
    windows: list[_Window] = []
    offset = 0
    whole = read_bounded(path)
    for raw in whole.splitlines(keepends=True):
        try:
            line = raw.decode("ascii").strip()
        except UnicodeDecodeError:
            raise RecordError(str(path), "line", "is no plain text", offset) from None
        if line.startswith(_HEAD):
            head = dict(_WORD.findall(line))
        elif line.startswith("window"):
            windows.append(_Window(dict(_WORD.findall(line))))
        elif line and not line.startswith("#"):
            if not windows:
                windows.append(_Window({}))
            windows[-1].add(line, path, offset)
        offset += len(raw)
    return _imported(head, windows, path, len(whole))


class _Window:
    def __init__(self, words: dict[str, str]) -> None:
        self.words = words
        self.ranges: list[tuple[int, int]] = []
        self.coarse: list[tuple[int, int]] = []

    def add(self, line: str, path: Path, offset: int) -> None:
        words = line.split()
        ranges = self.ranges
        if words[0] == "coarse":
            ranges, words = self.coarse, words[1:]
        if len(words) not in (1, 2) or not all(map(_NUMBER.fullmatch, words)):
            problem = f"invalid range {line[:80]!r}; write 0x400 0x480"
            raise RecordError(str(path), "line", problem, offset)
        first = int(words[0], 0 if words[0][:2].lower() == "0x" else 10)
        end = (
            int(words[1], 0 if words[1][:2].lower() == "0x" else 10)
            if len(words) == 2
            else first + 1
        )
        if not first < end < 1 << 52:
            raise RecordError(str(path), "line", f"invalid range of gfns {line[:80]!r}", offset)
        ranges.append((first, end))


def _imported(head: dict[str, str], windows: list[_Window], path: Path, n_bytes: int) -> Imported:
    every = [r for window in windows for r in (*window.ranges, *window.coarse)]
    first = _number(head, "gfn_start", path, min((a for a, _ in every), default=0) // 64 * 64)
    end = max((b for _, b in every), default=first)
    n_pages = _number(head, "n_pages", path, end - first)
    each = [_number(window.words, "n_pages", path, n_pages) for window in windows]
    check_cost(max([n_pages, *each]), len(windows), n_bytes, path)
    if any(not first <= a < b <= first + n_pages for a, b in every):
        raise RecordError(str(path), "ranges", f"lie outside {n_pages} pages from {first:#x}")
    page_bytes = _number(head, "page_bytes", path, 4096)
    if not 512 <= page_bytes <= 1 << 30 or first >= 1 << 52:
        raise RecordError(str(path), "page_bytes or gfn_start", "cannot be")

    def made() -> Iterator[ImportedWindow]:
        for window in windows:
            yield _window(window, first, n_pages, path)

    interval = _number(head, "interval_ns", path, 0)
    return Imported(first, n_pages, made(), page_bytes, path.stem, interval % (1 << 52))


def _window(window: _Window, first: int, n_pages: int, path: Path) -> ImportedWindow:
    words = window.words
    pages = _number(words, "n_pages", path, n_pages)
    check_pages(pages, path)
    if any(b - first > pages for _, b in (*window.ranges, *window.coarse)):
        raise RecordError(str(path), "ranges", f"lie outside the window's {pages} pages")
    source = Provenance(
        words.get("tracker", "unknown"),
        words.get("table_format", "none"),
        _number(words, "start_ns", path, 0),
        _number(words, "end_ns", path, 0),
    )
    young = bitmap_of_ranges(((a - first, b - first) for a, b in window.ranges), pages)
    coarse = None
    if window.coarse or words.get("has_coarse") == "1":
        coarse = bitmap_of_ranges(((a - first, b - first) for a, b in window.coarse), pages)
    cost = Cost(_number(words, "harvest_ns", path, 0), _number(words, "rearm_ns", path, 0))
    bitmap = YoungBitmap(first, pages, young, coarse, source)
    return ImportedWindow(bitmap, _number(words, "wall_ns", path, 0), cost)


def _number(words: dict[str, str], name: str, path: Path, default: int) -> int:
    text = words.get(name)
    if text is None:
        return default
    if not _NUMBER.fullmatch(text) or int(text, 0 if text[:2].lower() == "0x" else 10) >= 1 << 63:
        raise RecordError(str(path), name, f"{text[:80]!r} is no number")
    return int(text, 0 if text[:2].lower() == "0x" else 10)
