"""Read records: young bitmaps over time, in a Zarr group on disk.

Opening reads the metadata and the headers of the tail; everything else is read on demand,
chunk by chunk. Windows are numbered from 0; ranges of windows and of pages are
``[first, end)``, and pages are gfns. Every method raises
:class:`~kvmhost.reclaim.errors.RecordError` if the file it reads is damaged; the error
names the file inside the record. ``docs/record.md`` describes the format, and
:mod:`kvmhost.reclaim.record.writer` writes it.

>>> with YoungRecord.open("vm.young") as record:  # doctest: +SKIP
...     record.bitmap(-1)  # the last window
...     record.between(0, 60, "or").count()  # pages touched in the first sixty
"""

from __future__ import annotations

import bisect
import dataclasses
import html
import operator
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Provenance, Words, YoungBitmap, n_words, pack, unpack
from kvmhost.closing import Closing
from kvmhost.errors import LayoutError, StateError
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record import meta as recordmeta
from kvmhost.reclaim.record.files import RecordFiles, is_record, names_in
from kvmhost.reclaim.record.journal import JOURNAL_FILE
from kvmhost.reclaim.record.meta import EVENTS, STATES, MemslotLayout, RecordMeta, RecordSession
from kvmhost.reclaim.record.residency import WindowResidency
from kvmhost.reclaim.record.summary import last_window_of
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS, count_bits, window_mask

__all__ = ["Block", "YoungRecord"]

_Part = TypeVar("_Part", RecordSession, MemslotLayout)
Counts = npt.NDArray[np.int64]
#: First gfn, first window, and one word per page: bit ``63 - j`` is window ``first + j``.
Block = tuple[int, int, Words]


class YoungRecord(Closing):
    """Reads one record, also while it is being written. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open_files: RecordFiles | None = RecordFiles(path)
        self._columns: dict[str, Counts] = {}
        self._load()

    @classmethod
    def open(cls, path: str | Path) -> YoungRecord:
        """Open a record for reading.

        :param path: of the record, or of a directory that contains exactly one
        :raises RecordError: if it does not exist or is damaged
        """
        path = Path(path)
        if not is_record(path) and path.is_dir() and not (path / recordmeta.METADATA_FILE).exists():
            names = names_in(path)
            if len(names) == 1:
                return cls(path / names[0])
            if names:
                shown = ", ".join(str(path / name) for name in names)
                raise RecordError(str(path), "name", f"several records, name one of: {shown}")
        return cls(path)

    def refresh(self) -> int:
        """Read windows that were written since; return their number."""
        before = len(self)
        self._load()
        return len(self) - before

    def close(self) -> None:
        """Close the tail; nothing can be read any more. Idempotent."""
        if self._open_files is not None:
            self._open_files.close()
            self._open_files = None
            self._columns.clear()

    @property
    def _files(self) -> RecordFiles:
        if self._open_files is None:
            raise StateError(f"record {self.path}")
        return self._open_files

    def _load(self) -> None:
        self._columns.clear()
        for _ in range(100):
            if self._files.load():
                return
            # A writer was replacing metadata and tail.
            time.sleep(0.001)
        problem = "the tail has windows or pages that do not follow from the metadata"
        raise RecordError(str(self.path / JOURNAL_FILE), "head", problem, 0)

    # -- properties -----------------------------------------------------------

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[YoungBitmap]:
        """Yield the bitmap of every window, the first one first."""
        return self.bitmaps()

    @overload
    def __getitem__(self, where: int) -> YoungBitmap: ...

    @overload
    def __getitem__(self, where: slice) -> list[YoungBitmap]: ...

    def __getitem__(self, where: int | slice) -> YoungBitmap | list[YoungBitmap]:
        """Return the bitmap of a window, or those of a slice; negative ones count from the end.

        :raises IndexError: if there is no such window
        """
        if isinstance(where, slice):
            windows = range(len(self))[where]
            if windows.step == 1:
                return list(self.bitmaps(windows.start, max(windows.start, windows.stop)))
            return [self.bitmap(window) for window in windows]
        if not -len(self) <= (window := operator.index(where)) < len(self):
            raise IndexError(f"{self.path}: no window {where}: there are {len(self)}")
        return self.bitmap(window)

    def __repr__(self) -> str:
        if self._open_files is None:
            return f"YoungRecord({str(self.path)!r}, closed)"
        trackers = sorted({session.tracker for session in self.metadata.sessions})
        return (
            f"YoungRecord({str(self.path)!r}: VM {self.name!r}, {len(self)} windows, "
            f"gfns [{self.gfn_start:#x}, {self.gfn_end:#x}), {'/'.join(trackers)})"
        )

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        rows = {
            "file": str(self.path),
            "VM": self.name,
            "windows": f"{len(self):,}" + (", being written" if self.is_being_written() else ""),
            "gfns": f"[{self.gfn_start:#x}, {self.gfn_end:#x}): {self.n_pages:,} pages of "
            f"{self.metadata.page_bytes} bytes",
            "memslots": f"{len(self.memslots())}",
            "trackers": ", ".join(sorted({s.tracker for s in self.metadata.sessions})),
        }
        if len(self):
            young = self.column("n_young")
            rows["young pages"] = f"{young.min():,} to {young.max():,} per window"
        cells = "".join(
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in rows.items()
        )
        return f"<table><caption>Young record</caption>{cells}</table>"

    @property
    def metadata(self) -> RecordMeta:
        """The metadata of the record."""
        return self._files.metadata

    @property
    def loss(self) -> str:
        """Description of data lost at the end because a writer was killed, or empty."""
        return self._files.loss

    @property
    def n_windows(self) -> int:
        """Number of windows, including those in the tail."""
        return len(self)

    @property
    def gfn_start(self) -> int:
        """The first gfn."""
        return self.metadata.gfn_start

    @property
    def n_pages(self) -> int:
        """Number of pages from :attr:`gfn_start`: the largest of any window."""
        return self.metadata.n_pages

    @property
    def gfn_end(self) -> int:
        """One more than the last gfn."""
        return self.metadata.gfn_start + self.metadata.n_pages

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.metadata.name

    def is_being_written(self) -> bool:
        """Return whether a writer has the record open."""
        return self._files.is_being_written()

    def session(self, window: int) -> RecordSession:
        """Return the source of a window's bits."""
        window = self._window(window)
        return _part_of(self.metadata.sessions, window)

    def layout(self, window: int) -> MemslotLayout:
        """Return the memslots of a window."""
        window = self._window(window)
        return _part_of(self.metadata.layouts, window)

    def memslots(self, window: int = -1) -> list[recordmeta.Memslot]:
        """Return the memslots of a window, the last one by default."""
        return self.layout(window).memslots if len(self) else self.metadata.layouts[-1].memslots

    def provenance(self, window: int) -> Provenance:
        """Return tracker, format and times of a window."""
        window, session = self._window(window), self.session(window)
        start, end = int(self.column("start_ns")[window]), int(self.column("end_ns")[window])
        evidence = session.facts.get(recordmeta.EVIDENCE, "")
        return Provenance(session.tracker, session.table_format, start, end, evidence)

    # -- numbers per window ---------------------------------------------------

    def column(self, name: str) -> Counts:
        """Return one number per window, of :data:`~kvmhost.reclaim.record.meta.COLUMNS`."""
        if name not in self._columns:
            self._columns[name] = self._files.column(name)
        return self._columns[name]

    def histogram(self, name: str, first: int = 0, end: int | None = None) -> Counts:
        """Return shape ``(windows, buckets)``: rows of ``reuse`` or ``ages``.

        Bucket ``b`` counts pages whose number of windows is above ``UPPER[b - 1]`` and
        at most ``UPPER[b]`` (:data:`~kvmhost.reclaim.record.meta.UPPER`).
        """
        first, end = self._range(first, end)
        return self._files.histogram(name, first, end)

    def sums(self, level: int, first: int = 0, end: int | None = None) -> npt.NDArray[np.uint32]:
        """Return shape ``(windows, bins)``: young pages in bins of ``2 ** level`` pages.

        :param level: one of :data:`~kvmhost.reclaim.record.meta.LEVELS`
        """
        if level not in recordmeta.LEVELS:
            raise LayoutError(f"no level {level}; levels: {recordmeta.LEVELS}")
        first, end = self._range(first, end)
        bins = recordmeta.n_bins(self.n_pages, level)
        found = np.zeros((end - first, bins), dtype=np.uint32)
        sealed_end = min(end, self.metadata.n_windows)
        for block in range(first // BLOCK_WINDOWS, -(-sealed_end // BLOCK_WINDOWS)):
            low, high = _overlap(block, first, sealed_end)
            for column in range(0, bins, recordmeta.LEVEL_CHUNK_BINS):
                part = self._files.level_chunk(level, block, column // recordmeta.LEVEL_CHUNK_BINS)
                if part is not None:
                    width = min(recordmeta.LEVEL_CHUNK_BINS, bins - column)
                    base = block * BLOCK_WINDOWS
                    found[low - first : high - first, column : column + width] = part[
                        low - base : high - base, :width
                    ]
        self._tail_sums(level, found, first, end)
        return found

    # -- bits -----------------------------------------------------------------

    def bitmap(self, window: int) -> YoungBitmap:
        """Return the bitmap of one window, as it was appended."""
        window = self._window(window)
        n_pages = int(self.column("n_pages")[window])
        coarse = None
        if self.column("flags")[window] & 1:
            coarse = self._files.row("coarse", window)[: n_words(n_pages)]
        words = self._checked(window, self._files.row("young", window)[: n_words(n_pages)])
        return YoungBitmap(self.gfn_start, n_pages, words, coarse, self.provenance(window))

    def bitmaps(self, first: int = 0, end: int | None = None) -> Iterator[YoungBitmap]:
        """Yield the bitmaps of ``[first, end)`` in order, decompressing each chunk once."""
        first, end = self._range(first, end)
        if not self._files.is_dense():  # A row a window takes less than a block of them.
            yield from (self.bitmap(window) for window in range(first, end))
            return
        sizes, flags = self.column("n_pages"), self.column("flags")
        for base in range(first - first % BLOCK_WINDOWS, end, BLOCK_WINDOWS):
            low, high = _overlap(base // BLOCK_WINDOWS, first, end)
            rows = self._files.block_rows("young", base // BLOCK_WINDOWS)
            any_coarse = bool((flags[low:high] & 1).any())
            coarse = self._files.block_rows("coarse", base // BLOCK_WINDOWS) if any_coarse else None
            for window in range(low, high):
                words = n_words(int(sizes[window]))
                yield YoungBitmap(
                    self.gfn_start,
                    int(sizes[window]),
                    self._checked(window, rows[window - base, :words].copy()),
                    coarse[window - base, :words].copy()
                    if coarse is not None and flags[window] & 1
                    else None,
                    self.provenance(window),
                )

    def blocks(
        self,
        first: int = 0,
        end: int | None = None,
        gfn_first: int | None = None,
        gfn_end: int | None = None,
        name: str = "young",
    ) -> Iterator[Block]:
        """Yield the chunks of a range of windows and gfns that are not all zeros.

        Each is (gfn of the first page, window of bit 63, one word per page); bits outside
        the range of windows are 0. Chunks of the same pages are consecutive, in time order.

        :param name: ``young``, or another of :data:`~kvmhost.reclaim.record.meta.BITS`
        """
        first, end = self._range(first, end)
        low_page, high_page = self._pages(gfn_first, gfn_end)
        size = self.metadata.chunk_pages
        for chunk in range(low_page // size, -(-high_page // size)):
            low, high = max(low_page, chunk * size), min(high_page, (chunk + 1) * size)
            for block in range(first // BLOCK_WINDOWS, -(-end // BLOCK_WINDOWS)):
                history = self._files.history(name, chunk, block)
                if history is None:
                    continue
                base = block * BLOCK_WINDOWS
                since, until = _overlap(block, first, end)
                part = history[low - chunk * size : high - chunk * size]
                if until - since < BLOCK_WINDOWS:
                    part = part & window_mask(since - base, until - base)
                yield self.gfn_start + low, base, part

    def layer(self, name: str, window: int) -> Words:
        """Return one of :data:`~kvmhost.reclaim.record.meta.BITS` of a window, a bit per page.

        All zeros where residency was not recorded, see :meth:`has_residency`.

        :raises LayoutError: if there is no such array
        """
        if name not in recordmeta.BITS:
            raise LayoutError(f"no bits {name!r}; there are {', '.join(recordmeta.BITS)}")
        window = self._window(window)
        return self._files.row(name, window)[: n_words(int(self.column("n_pages")[window]))]

    def has_residency(self) -> npt.NDArray[np.bool_]:
        """Return shape ``(windows,)``: whether residency and events of a window were recorded."""
        known: npt.NDArray[np.bool_] = (self.column("flags") & recordmeta.RESIDENCY_KNOWN) != 0
        return known

    def residency(self, window: int) -> WindowResidency | None:
        """Return where pages were at the end of a window, and what happened to them; or None."""
        window = self._window(window)
        if not self.has_residency()[window]:
            return None
        return WindowResidency(
            bits={name: self.layer(name, window) for name in (*STATES, *EVENTS)},
            counts={name: int(self.column(f"n_{name}")[window]) for name in EVENTS},
            is_complete=not self.column("flags")[window] & recordmeta.EVENTS_LOST,
        )

    def history(self, gfn: int, name: str = "young") -> npt.NDArray[np.bool_]:
        """Return shape ``(windows,)``: the windows in which a page was young.

        :param name: ``young``, ``coarse`` for bits that came from a larger leaf, or another
            of :data:`~kvmhost.reclaim.record.meta.BITS`
        :raises LayoutError: if the record does not contain that gfn
        """
        found = np.zeros(-(-len(self) // BLOCK_WINDOWS) * BLOCK_WINDOWS, dtype=bool)
        for _, base, words in self.blocks(gfn_first=gfn, gfn_end=gfn + 1, name=name):
            bits = np.unpackbits(words.astype(">u8").view(np.uint8)).view(bool)
            found[base : base + BLOCK_WINDOWS] = bits
        return found[: len(self)]

    @overload
    def between(
        self, first: int, end: int | None, op: Literal["or", "and"] = ...
    ) -> YoungBitmap: ...

    @overload
    def between(
        self, first: int, end: int | None, op: Literal["count"]
    ) -> npt.NDArray[np.uint32]: ...

    def between(
        self, first: int, end: int | None = None, op: Literal["or", "and", "count"] = "or"
    ) -> YoungBitmap | npt.NDArray[np.uint32]:
        """Combine windows: pages young in any, pages young in all, or counts per page.

        :return: a bitmap, or for ``count`` shape ``(n_pages,)``. ``and`` of no windows is
            all pages
        """
        first, end = self._range(first, end)
        if op == "count":
            self._files.check_cost()
            counts = np.zeros(self.n_pages, dtype=np.uint32)
            for gfn, _, words in self.blocks(first, end):
                at = gfn - self.gfn_start
                counts[at : at + words.size] += count_bits(words)
            return counts
        if op == "or":
            found = np.zeros(n_words(self.n_pages), dtype=np.uint64)
            for gfn, _, words in self.blocks(first, end):
                part = pack(words != 0)
                at = (gfn - self.gfn_start) // 64  # Chunks are whole words.
                found[at : at + part.size] |= part
        elif op == "and":
            found = pack(self.between(first, end, "count") == end - first)
        else:
            raise LayoutError(f"between: no operation {op!r}; operations: or, and, count")
        times = Provenance()
        if end > first:
            begin, last = self.provenance(first), self.provenance(end - 1)
            times = dataclasses.replace(begin, window_end_ns=last.window_end_ns)
        return YoungBitmap(self.gfn_start, self.n_pages, found, None, times)

    def weighted_counts(self, first: int, weights: npt.NDArray[np.int64]) -> Counts:
        """Return shape ``(n_pages,)``: the sum of the weights of the windows of each page.

        :param weights: of the windows from ``first`` on, below 2**16; the cost grows with the
            number of bits in which they differ from 0
        """
        first, end = self._range(first, first + weights.size)
        self._files.check_cost()
        counts = np.zeros(self.n_pages, dtype=np.int64)
        n_bits = int(weights.max(initial=0)).bit_length()
        for gfn, base, words in self.blocks(first, end):
            at, (low, high) = gfn - self.gfn_start, _overlap(base // BLOCK_WINDOWS, first, end)
            part = counts[at : at + words.size]
            for bit in range(n_bits):
                chosen = np.flatnonzero(weights[low - first : high - first] >> bit & 1)
                mask = sum(1 << (BLOCK_WINDOWS - 1 - (low - base + int(j))) for j in chosen)
                if mask:
                    part += count_bits(words & np.uint64(mask)).astype(np.int64) << bit
        return counts

    def last_young(self, window: int = -1) -> Counts:
        """Return shape ``(n_pages,)``: the last young window up to this one, -1 for none."""
        self._files.check_cost()
        found = np.full(self.n_pages, -1, dtype=np.int64)
        end = self._window(window) + 1 if len(self) else 0
        for gfn, base, words in self.blocks(0, end):
            last = last_window_of(words)
            part = found[gfn - self.gfn_start :][: words.size]
            np.copyto(part, last + base, where=last >= 0)
        return found

    def region_counts(
        self, edges: npt.ArrayLike, first: int = 0, end: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return shape ``(windows, regions)``: young pages between adjacent edges.

        Reads bits only if an edge is not at the edge of a bin of the record.

        :param edges: ascending gfns
        """
        bounds = np.asarray(edges, dtype=np.int64) - self.gfn_start
        fits = bounds.size and (np.diff(bounds) > 0).all()
        if not fits or bounds[0] < 0 or bounds[-1] > self.n_pages:
            raise LayoutError("region_counts: edges must be ascending gfns of the record")
        first, end = self._range(first, end)
        aligned = [
            level
            for level in recordmeta.LEVELS
            if not (bounds[bounds < self.n_pages] % (1 << level)).any()
        ]
        if aligned:
            sums = self.sums(aligned[-1], first, end).astype(np.int64)
            below = np.concatenate([np.zeros((end - first, 1), dtype=np.int64), sums], axis=1)
            below = np.cumsum(below, axis=1)
            at = np.minimum(-(-bounds // (1 << aligned[-1])), sums.shape[1])
            return np.diff(below[:, at], axis=1)
        rows = [
            np.add.reduceat(
                np.append(unpack(self._files.row("young", window), self.n_pages), False),
                bounds,
                dtype=np.int64,
            )[:-1]
            for window in range(first, end)
        ]
        return np.array(rows, dtype=np.int64).reshape(end - first, bounds.size - 1)

    # -- reading --------------------------------------------------------------

    def _checked(self, window: int, words: Words) -> Words:
        """Check that a bitmap has the number of young pages that was recorded with it."""
        found, wanted = (
            int(count_bits(words).sum(dtype=np.int64)),
            int(self.column("n_young")[window]),
        )
        if found != wanted:
            problem = f"window {window} has {found} young pages, need {wanted}"
            raise RecordError(str(self.path / "young"), "bits", problem)
        return words

    def _window(self, window: int) -> int:
        found = window + len(self) if window < 0 else window
        if not 0 <= found < len(self):
            raise LayoutError(f"{self.path}: no window {window}; it has {len(self)}")
        return found

    def _range(self, first: int, end: int | None) -> tuple[int, int]:
        end = len(self) if end is None else end
        if not 0 <= first <= end <= len(self):
            problem = f"no windows [{first}, {end}); it has {len(self)}"
            raise LayoutError(f"{self.path}: {problem}")
        return first, end

    def _pages(self, gfn_first: int | None, gfn_end: int | None) -> tuple[int, int]:
        first = self.gfn_start if gfn_first is None else gfn_first
        end = self.gfn_end if gfn_end is None else gfn_end
        if not self.gfn_start <= first <= end <= self.gfn_end:
            raise LayoutError(
                f"{self.path}: gfns [{first:#x}, {end:#x}) are out of range: "
                f"the record has [{self.gfn_start:#x}, {self.gfn_end:#x})"
            )
        return first - self.gfn_start, end - self.gfn_start

    def _tail_sums(self, level: int, found: npt.NDArray[np.uint32], first: int, end: int) -> None:
        for window in range(max(first, self.metadata.n_windows), end):
            for chunk, words in self._files.tail_chunks("young", window):
                at = chunk * self.metadata.chunk_pages >> level
                counts = count_bits(words).astype(np.uint32)
                # A chunk has several bins, or a bin has several chunks: both are powers of 2.
                bins = counts.reshape(-1, min(counts.size, 1 << (level - 6))).sum(axis=1)
                part = found[window - first, at : at + bins.size]
                part += bins[: part.size].astype(np.uint32)


def _part_of(parts: list[_Part], window: int) -> _Part:
    """Return the last part that begins at a window or before; parts are in order."""
    return parts[bisect.bisect_right(parts, window, key=lambda part: part.first_window) - 1]


def _overlap(block: int, first: int, end: int) -> tuple[int, int]:
    """Return the windows of a block that are in ``[first, end)``."""
    base = block * BLOCK_WINDOWS
    return max(first, base), min(end, base + BLOCK_WINDOWS)
