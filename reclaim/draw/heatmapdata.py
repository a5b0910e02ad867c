"""The data of a record's heatmaps: counts of young pages in equal bins, and a time axis.

Counts come from the sums stored in the record, and from its bits only for bins smaller
than those. At most a band of windows is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvmhost.errors import LayoutError
from kvmhost.reclaim.draw.heatmap import Heatmap, HeatmapLayers, HeatmapMark, bin_edges
from kvmhost.reclaim.draw.parts import PageParts, joined_runs
from kvmhost.reclaim.errors import RecordError
from kvmhost.reclaim.record.clock import (
    GAP_SHARE,
    coverage_of,
    elapsed_s,
    find_jumps,
    interval_s,
    starts_s,
)
from kvmhost.reclaim.record.meta import EVENTS, EVENTS_LOST, EVICTIONS, LEVELS, STATES, Memslot
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS, count_bits, to_rows
from kvmhost.units import PAGE_BYTES, size_text
from kvmhost.vm.names import NOT_SEEN

__all__ = [
    "BIT_LEVELS",
    "RecordView",
    "Timeline",
    "heatmap_of",
    "notes_of",
    "summed",
    "timeline_of",
    "used_view",
]

#: Levels counted from bits: words of 64 pages, bytes, single pages.
BIT_LEVELS = (6, 3, 0)
#: Ranges of more pages than this are aligned to the bins of the record's finest sums.
_FINE_PAGES = 1 << 15
#: Maximum number of counts of a band of windows in memory.
_BAND_COUNTS = 1 << 24

Counts = npt.NDArray[np.unsignedinteger]


class RecordView:
    """A part of a record: windows ``[first, end)`` and ranges of pages.

    A range of gfns is extended to whole words of 64 pages, and above 128 MiB to bins of
    512 pages, counted from the first page of the record. Pages of the view are numbered by
    their positions (:mod:`.parts`).

    :param gfns: ``[first, end)``; None: all
    :param parts: pages to show, counted from the first one of the record, in whole bins of 512
        pages; None: the whole range
    :raises LayoutError: if windows or pages are outside the record, or the view is empty
    """

    def __init__(
        self,
        record: YoungRecord,
        first: int = 0,
        end: int | None = None,
        gfns: tuple[int, int] | None = None,
        parts: PageParts | None = None,
    ) -> None:
        self.record, self.first = record, first
        self.end = len(record) if end is None else end
        low, high = gfns or (record.gfn_start, record.gfn_end)
        if not record.gfn_start <= low < high <= record.gfn_end:
            raise LayoutError(
                f"{record.path}: gfns [{low:#x}, {high:#x}) are out of range: "
                f"the record has [{record.gfn_start:#x}, {record.gfn_end:#x})"
            )
        if not 0 <= self.first < self.end <= len(record):
            raise LayoutError(
                f"{record.path}: no windows [{first}, {self.end}); it has {len(record)}"
            )
        step = 64 if high - low <= _FINE_PAGES else 1 << LEVELS[0]
        whole = (
            (low - record.gfn_start) // step * step,
            min(-(-(high - record.gfn_start) // step) * step, record.n_pages),
        )
        #: Ranges of pages, counted from the first page of the record.
        self.parts = parts or PageParts((whole,))
        #: Pages of the record that the view could show and does not.
        self.n_left_out = 0 if parts is None else record.n_pages - parts.n_pages

    @property
    def low(self) -> int:
        """The first page, counted from the first one of the record."""
        return self.parts.low

    @property
    def high(self) -> int:
        """One more than the last page."""
        return self.parts.high

    @property
    def gfn_start(self) -> int:
        """The first gfn."""
        return self.record.gfn_start + self.parts.low

    @property
    def n_pages(self) -> int:
        """Pages that are shown."""
        return self.parts.n_pages

    def gfn_ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of gfns that are shown."""
        start = self.record.gfn_start
        return [(start + low, start + high) for low, high in self.parts.ranges]

    @property
    def n_windows(self) -> int:
        """Windows."""
        return self.end - self.first

    def n_bins(self, level: int) -> int:
        """Return the number of bins of ``2 ** level`` pages."""
        return -(-self.n_pages // (1 << level))

    def counts(self, level: int, first: int, end: int) -> Counts:
        """Return shape ``(windows, bins)``: young pages in bins of ``2 ** level`` pages.

        :param first: first window of the record; ``end`` is one more than the last
        """
        base = self._stored_level(level)
        if base is None:
            base = min(level, BIT_LEVELS[0])
            found = self.bit_counts((base,), first, end)[base]
        else:
            sums = self.record.sums(base, first, end)
            parts = [sums[:, low >> base : -(-high >> base)] for low, high in self.parts.ranges]
            found = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return summed(found, level - base)

    def bit_counts(
        self,
        levels: tuple[int, ...],
        first: int,
        end: int,
        pages: tuple[int, int] | None = None,
        name: str = "young",
    ) -> dict[int, Counts]:
        """Return the counts of levels in :data:`BIT_LEVELS`, by level, computed from bits.

        :param name: which array of bits
        :param pages: positions within this view, in multiples of 64; None: all
        """
        start, stop = pages or (0, self.n_pages)
        n_words = -(-(stop - start) // 64)
        rows = np.zeros((end - first, n_words), dtype=np.uint64)
        for low, high, position in self.parts.between(start, stop):
            self._fill(rows[:, (position - start) // 64 :], (first, end), (low, high), name)
        low, high = start, stop
        return {level: _counted(rows, level)[:, : -(-(high - low) >> level)] for level in levels}

    def _fill(
        self,
        rows: npt.NDArray[np.uint64],
        windows: tuple[int, int],
        pages: tuple[int, int],
        name: str,
    ) -> None:
        """Read the bits of a range of pages of the record into the first columns of ``rows``."""
        (first, end), start = windows, self.record.gfn_start
        low, high = start + pages[0], start + pages[1]
        for gfn, base, words in self.record.blocks(first, end, low, high, name):
            padded = np.pad(words, (0, -words.size % 64))
            since, until = max(first, base), min(end, base + BLOCK_WINDOWS)
            part = to_rows(padded)[since - base : until - base]
            at = (gfn - low) // 64
            rows[since - first : until - first, at : at + part.shape[1]] = part

    def bands(self, n_bins: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of windows to read together: whole blocks of the record."""
        blocks = max(_BAND_COUNTS // (BLOCK_WINDOWS * max(n_bins, 1)), 1)
        size = blocks * BLOCK_WINDOWS
        for base in range(self.first - self.first % BLOCK_WINDOWS, self.end, size):
            yield max(base, self.first), min(base + size, self.end)

    def memslots(self) -> list[Memslot]:
        """Return the memslots of the last window that overlap the pages, in order."""
        end = self.record.gfn_start + self.high
        slots = self.record.memslots(self.end - 1)
        touching = [s for s in slots if s.gfn < end and s.gfn + s.n_pages > self.gfn_start]
        return sorted(touching, key=lambda s: s.gfn)

    def _stored_level(self, level: int) -> int | None:
        """Return the coarsest level of the record's sums from which bins can be summed."""
        fitting = [
            stored
            for stored in LEVELS
            if stored <= level
            and all(
                low % (1 << stored) == 0
                and (high % (1 << stored) == 0 or high == self.record.n_pages)
                for low, high in self.parts.ranges
            )
        ]
        return fitting[-1] if fitting else None


def used_view(record: YoungRecord, first: int = 0, end: int | None = None) -> RecordView:
    """Return a view of the used part of memory: of all of it, if more than half is used.

    Used are bins of 512 pages in which a page was young in the windows, or is evicted at their
    end.
    """
    whole = RecordView(record, first, end)
    level, used = LEVELS[0], np.zeros(whole.n_bins(LEVELS[0]), dtype=bool)
    for since, until in whole.bands(used.size):
        used |= whole.counts(level, since, until).any(axis=0)
    if record.has_residency()[whole.end - 1]:
        base = BIT_LEVELS[0]
        counts = whole.bit_counts((base,), whole.end - 1, whole.end, name="evicted")[base]
        used |= summed(counts, level - base).any(axis=0)
    runs = joined_runs(used)
    if runs is None:
        return whole
    pages = ((a << level, min(b << level, record.n_pages)) for a, b in runs)
    return RecordView(record, first, end, parts=PageParts(tuple(pages)))


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Start and end of each window of a view, in seconds from the start of the first.

    :param marks: gaps, clock jumps, changes of tracker or memslots, in time order
    """

    starts_s: npt.NDArray[np.float64]
    ends_s: npt.NDArray[np.float64]
    marks: list[HeatmapMark]
    #: Windows after a gap.
    gaps: npt.NDArray[np.int64]


def timeline_of(view: RecordView) -> Timeline:
    """Place the windows of a view on one monotonic time axis."""
    record = view.record
    starts, ends = starts_s(record), elapsed_s(record)
    before = np.concatenate([[0.0], ends[:-1]])
    is_gap = starts - before > GAP_SHARE * interval_s(record)
    is_gap[view.first] = False
    zero = float(starts[view.first])
    gaps = np.flatnonzero(is_gap[view.first : view.end]) + view.first
    marks = [
        HeatmapMark(
            float(starts[at]) - zero, int(at), f"gap of {_duration(starts[at] - before[at])}"
        )
        for at in gaps.tolist()
    ]
    marks += [HeatmapMark(float(starts[at]) - zero, at, text) for at, text in _changes(view)]
    marks.sort(key=lambda mark: (mark.window, mark.text))
    part = slice(view.first, view.end)
    return Timeline(starts[part] - zero, ends[part] - zero, marks, gaps)


def _changes(view: RecordView) -> Iterator[tuple[int, str]]:
    """Yield (window, description of a change) within a view, except gaps."""
    record = view.record
    for jump in find_jumps(record):
        if view.first < jump.window < view.end:
            yield jump.window, f"clock jump of {_duration(jump.wall_s - jump.monotonic_s)}"
    for old, new in itertools.pairwise(record.metadata.sessions):
        if view.first < new.first_window < view.end:
            changed = (old.tracker, old.table_format) != (new.tracker, new.table_format)
            what = f"by {new.tracker} ({new.table_format})" if changed else "recording resumed"
            yield new.first_window, what
    for layout in record.metadata.layouts[1:]:
        if view.first < layout.first_window < view.end:
            yield layout.first_window, "memslots changed"


def heatmap_of(view: RecordView, n_bins: int = 512, n_columns: int = 1200) -> Heatmap:
    """Reduce a view to drawable bins and columns.

    If there are more windows than columns, neighbouring windows are merged, but never
    across a gap.

    :param n_bins: maximum number of rows
    """
    level = next((v for v in (*LEVELS[::-1], *BIT_LEVELS) if view.n_bins(v) >= n_bins), 0)
    rows = bin_edges(view.n_bins(level), n_bins)
    edges = np.minimum(rows << level, view.n_pages)
    times = timeline_of(view)
    heatmap = Heatmap(view.gfn_start, view.n_pages, edges=edges, ranges=view.gfn_ranges())
    cuts = _cuts(view, times, n_columns)
    pending: dict[int, npt.NDArray[np.float64]] = {}
    for first, end in view.bands(view.n_bins(level)):
        counts = _added(view.counts(level, first, end), rows[:-1])
        groups = np.searchsorted(cuts, np.arange(first, end), side="right") - 1
        for group in np.unique(groups).tolist():
            total = counts[groups == group].sum(axis=0, dtype=np.float64)
            pending[group] = pending.get(group, 0.0) + total
    bounds = np.append(cuts, view.end)
    for group, total in sorted(pending.items()):
        since, until = int(bounds[group]), int(bounds[group + 1])
        shares = total / (np.diff(edges) * (until - since))
        heatmap.columns.append(shares.astype(np.float32))
        heatmap.windows_ns.append(
            (
                round(times.starts_s[since - view.first] * 1e9),
                round(times.ends_s[until - 1 - view.first] * 1e9),
            )
        )
    _check_times(view, heatmap.windows_ns)
    if view.record.has_residency()[view.first : view.end].any():
        heatmap.layers = _layers_of(view, level, rows, edges, cuts)
    return _described(heatmap, view, times, int(np.diff(bounds).max()))


def _layers_of(
    view: RecordView,
    level: int,
    rows: npt.NDArray[np.int64],
    edges: npt.NDArray[np.int64],
    cuts: npt.NDArray[np.int64],
) -> HeatmapLayers:
    """Return the layers of a heatmap, computed from bits."""
    sizes, bounds = np.diff(edges), np.append(cuts, view.end)
    arrays = (*STATES, *EVENTS)
    totals = {name: np.zeros((cuts.size, sizes.size)) for name in arrays}
    base = min(level, BIT_LEVELS[0])
    for first, end in view.bands(view.n_bins(base)):
        groups = np.searchsorted(cuts, np.arange(first, end), side="right") - 1
        for name in arrays:
            counts = view.bit_counts((base,), first, end, name=name)[base]
            np.add.at(totals[name], groups, _added(summed(counts, level - base), rows[:-1]))
    known = np.add.reduceat(
        view.record.has_residency()[view.first : view.end].astype(np.int64), cuts - view.first
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {name: totals[name] / (known[:, None] * sizes) for name in STATES}
    evictions = sum(totals[name] for name in EVICTIONS)
    return HeatmapLayers(
        resident=list(shares["resident"].astype(np.float32)),
        evicted=list(shares["evicted"].astype(np.float32)),
        moved={
            "evictions": list(np.asarray(evictions).astype(np.int64)),
            "refaults": list(totals["refaulted"].astype(np.int64)),
        },
        events={
            name: [
                int(view.record.column(f"n_{name}")[since:until].sum())
                for since, until in itertools.pairwise(bounds.tolist())
            ]
            for name in EVENTS
        },
    )


def _check_times(view: RecordView, windows_ns: list[tuple[int, int]]) -> None:
    """Refuse times that no axis can show.

    :raises RecordError: if a window ends before it begins, or begins before the one before
    """
    before = 0
    for number, (start, end) in enumerate(windows_ns):
        if not before <= start <= end < 1 << 62:
            problem = f"column {number} is from {start} to {end} ns, after {before} ns"
            raise RecordError(str(view.record.path), "window times", problem)
        before = start


def _described(heatmap: Heatmap, view: RecordView, times: Timeline, grouped: int) -> Heatmap:
    """Add title, caption, memslots and marks."""
    record = view.record
    sessions = [s for s in record.metadata.sessions if s.first_window < view.end]
    session = sessions[-1]
    image = session.facts.get("image", "").rsplit("/", 1)[-1]
    heatmap.title = f"VM {record.name or '(no name)'}" + (f" ({image})" if image else "")
    heatmap.title += ": pages touched"
    parts = [
        f"{view.n_windows:,} windows of {interval_s(record):g} s"
        + (f", {grouped} per column" if grouped > 1 else ""),
        f"tracker {session.tracker}, format {session.table_format}"
        + (f" ({len(sessions)} sessions)" if len(sessions) > 1 else ""),
    ]
    facts = [
        f"{key} {session.facts[key]}"
        for key in ("view", "engine", "kernel")
        if session.facts.get(key)
    ]
    heatmap.caption = "; ".join([*parts, *facts, *notes_of(view, heatmap.layers is not None)])
    heatmap.slots = [(s.slot, s.gfn, s.gfn + s.n_pages) for s in view.memslots()]
    heatmap.marks = times.marks
    return heatmap


def notes_of(view: RecordView, has_residency: bool) -> list[str]:
    """Return what a picture of a view does not show: for its caption."""
    record = view.record
    sessions = record.metadata.sessions
    limits = {
        s.facts.get("not_seen") or NOT_SEEN.get(s.tracker, "")
        for s in sessions
        if s.first_window < view.end
    }
    notes = [f"{what} are not seen" for what in sorted(limits - {""})]
    if not has_residency:
        notes.append("residency unknown")
    if view.n_left_out:
        size = size_text(view.n_left_out * PAGE_BYTES)
        notes.append(f"left out: {size} without a young page (--all shows them)")
    if (record.column("flags")[view.first : view.end] & EVENTS_LOST).any():
        notes.append("some evictions and refaults are missing")
    return [*notes, *filter(None, (coverage_of(record, view.first, view.end).text, record.loss))]


def _cuts(view: RecordView, times: Timeline, n_columns: int) -> npt.NDArray[np.int64]:
    """Return the first window of each column."""
    size = -(-view.n_windows // n_columns)
    runs = np.concatenate([[view.first], times.gaps, [view.end]])
    return np.concatenate(
        [np.arange(a, b, size) for a, b in itertools.pairwise(runs.tolist())]
    ).astype(np.int64)


def summed(counts: Counts, bits: int) -> Counts:
    """Sum ``2 ** bits`` neighbouring bins of ``(windows, bins)``."""
    if bits == 0:
        return counts
    return _added(counts, np.arange(0, counts.shape[1], 1 << bits))


def _added(counts: Counts, starts: npt.NDArray[np.int64]) -> Counts:
    found: Counts = np.zeros((counts.shape[0], starts.size), dtype=np.uint32)
    np.add.reduceat(counts, starts, axis=1, dtype=np.uint32, out=found)
    return found


def _counted(rows: npt.NDArray[np.uint64], level: int) -> Counts:
    """Count the bits of bitmaps by word, by byte or by bit."""
    if level == BIT_LEVELS[0]:
        return count_bits(rows)
    octets = np.ascontiguousarray(rows.astype("<u8", copy=False)).view(np.uint8)
    bits = np.unpackbits(octets, axis=1, bitorder="little")
    if level == 0:
        return bits
    counts: Counts = bits.reshape(*octets.shape, 8).sum(axis=2, dtype=np.uint8)
    return counts


def _duration(seconds: float) -> str:
    sign, seconds = ("-" if seconds < 0 else ""), abs(float(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{sign}{seconds / size:.3g} {unit}"
    return f"{sign}{seconds:.3g} s"
