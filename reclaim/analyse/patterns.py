"""Access patterns: hot ranges, phases, and the similarity of two sets of pages."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, YoungBitmap, n_words, unpack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.record import meta as recordmeta
from kvmhost.reclaim.record.clock import interval_s, lengths_s, weighted_mean
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS, count_bits, runs, to_rows

__all__ = [
    "HotRange",
    "Phase",
    "Similarity",
    "common_with_next",
    "find_phases",
    "hot_ranges",
    "jaccard_of_neighbours",
    "similarity",
]

#: Maximum number of bins in the search for phases.
_PHASE_BINS = 4096
#: Lengths of windows are rounded to this part of the planned length, a power of two: windows
#: of about that length then cost one pass over the bits. The longest counts so many of them.
_UNITS, _MOST_UNITS = 256, (1 << 16) - 1


@dataclasses.dataclass(frozen=True)
class HotRange:
    """Pages ``[gfn_start, gfn_end)``.

    :param density: share of (page, time) pairs that were young
    :param hot_pages: pages of the range that are themselves hot
    """

    gfn_start: int
    gfn_end: int
    hot_pages: int
    density: float

    @property
    def n_pages(self) -> int:
        """Pages."""
        return self.gfn_end - self.gfn_start


def hot_ranges(
    record: YoungRecord,
    first: int = 0,
    end: int | None = None,
    *,
    min_share: float = 0.5,
    max_gap_pages: int = 0,
) -> list[HotRange]:
    """Return ranges of pages that were young in at least a share of the time.

    A window counts with its length, in 256ths of the planned one.

    :param max_gap_pages: merge ranges with at most this many colder pages between them
    """
    end = len(record) if end is None else end
    if not 0 < min_share <= 1:
        raise LayoutError(f"hot ranges: invalid share {min_share:g}: need more than 0, at most 1")
    weights = _weights(record, first, end)
    counts = record.weighted_counts(first, weights)
    n_units = max(int(weights.sum()), 1)
    starts, ends = runs(counts >= max(min_share * n_units, 1))
    if starts.size:
        split = np.flatnonzero(starts[1:] - ends[:-1] > max_gap_pages)
        hot = np.cumsum(np.concatenate([[0], ends - starts]))
        firsts = np.concatenate([[0], split + 1])
        lasts = np.concatenate([split, [starts.size - 1]])
        hot_pages = hot[lasts + 1] - hot[firsts]
        starts, ends = starts[firsts], ends[lasts]
        below = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        density = (below[ends] - below[starts]) / ((ends - starts) * n_units)
        return [
            HotRange(record.gfn_start + int(a), record.gfn_start + int(b), int(h), float(d))
            for a, b, h, d in zip(starts, ends, hot_pages, density, strict=True)
        ]
    return []


def _weights(record: YoungRecord, first: int, end: int) -> npt.NDArray[np.int64]:
    """Return the length of each window in units; 0 only for a window of no length."""
    lengths = lengths_s(record)[first:end]
    units = lengths / max(interval_s(record), 1e-9) * _UNITS
    longest = units.max(initial=0.0)
    if longest > _MOST_UNITS:
        units *= _MOST_UNITS / longest
    rounded = np.rint(units).astype(np.int64)
    return np.where(units > 0, np.maximum(rounded, 1), 0)


@dataclasses.dataclass(frozen=True)
class Phase:
    """Windows ``[first, end)`` with a similar access pattern.

    :param change: difference from the previous phase, 0 (none) to 1 (complete)
    :param young_pages: mean of the windows, weighed by their lengths
    """

    first: int
    end: int
    change: float
    young_pages: float


def find_phases(record: YoungRecord, *, span: int = 8, threshold: float = 0.5) -> list[Phase]:
    """Split a record into phases where the access pattern changes.

    At each window, the mean counts per bin of the ``span`` windows before and after it are
    compared: the sum of absolute differences as a share of the sum of the maxima. A phase
    begins where this is above the threshold and at its maximum within ``span``.
    """
    if span < 1 or not 0 < threshold <= 1:
        raise LayoutError(f"phases: invalid span {span} or threshold {threshold:g}")
    n = len(record)
    if not n:
        return []
    levels = [v for v in recordmeta.LEVELS if recordmeta.n_bins(record.n_pages, v) <= _PHASE_BINS]
    level = (levels or [recordmeta.LEVELS[-1]])[0]
    change = np.zeros(n)
    lengths = lengths_s(record)
    weights = np.maximum(lengths, 1e-9 * max(float(lengths.max(initial=0.0)), 1e-9))
    sums = record.sums(level) * weights[:, None]
    below = np.concatenate([np.zeros((1, sums.shape[1])), np.cumsum(sums, axis=0)])
    time = np.concatenate([[0.0], np.cumsum(weights)])
    for at in range(1, n):
        low, high = max(at - span, 0), min(at + span, n)
        before = (below[at] - below[low]) / (time[at] - time[low])
        after = (below[high] - below[at]) / (time[high] - time[at])
        larger = np.maximum(before, after).sum()
        change[at] = np.abs(before - after).sum() / larger if larger else 0.0
    # Closer to either end there are too few windows to distinguish a change from noise.
    margin = max(span // 2, 1)
    cuts = [
        at
        for at in range(margin, n - margin + 1)
        if change[at] >= threshold
        and change[at] == change[max(at - span, 0) : at + span + 1].max()
        and not (change[max(at - span, 0) : at] == change[at]).any()
    ]
    young = record.column("n_young")
    edges = [0, *cuts, n]
    return [
        Phase(a, b, float(change[a]), float(weighted_mean(young[a:b], lengths[a:b])))
        for a, b in itertools.pairwise(edges)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """The similarity of two sets of pages.

    :param jaccard: pages in both, as a share of pages in either; 1 for two empty sets
    """

    a_pages: int
    b_pages: int
    both_pages: int
    only_a: npt.NDArray[np.bool_]
    only_b: npt.NDArray[np.bool_]
    gfn_start: int

    @property
    def jaccard(self) -> float:
        """Pages in both as a share of pages in either."""
        either = self.a_pages + self.b_pages - self.both_pages
        return self.both_pages / either if either else 1.0


def similarity(a: YoungBitmap, b: YoungBitmap) -> Similarity:
    """Compare two bitmaps page by page; a page outside a bitmap counts as not young in it."""
    start = min(a.gfn_start, b.gfn_start)
    end = max(a.gfn_start + a.n_pages, b.gfn_start + b.n_pages)
    if end - start > recordmeta.MAX_PAGES:
        raise LayoutError(f"similarity: {a!r} and {b!r} are too far apart to compare")
    bits = np.zeros((2, end - start), dtype=bool)
    for row, bitmap in zip(bits, (a, b), strict=True):
        at = bitmap.gfn_start - start
        row[at : at + bitmap.n_pages] = unpack(
            bitmap.words[: n_words(bitmap.n_pages)], bitmap.n_pages
        )
    in_a, in_b = bits
    return Similarity(
        a_pages=int(in_a.sum()),
        b_pages=int(in_b.sum()),
        both_pages=int((in_a & in_b).sum()),
        only_a=in_a & ~in_b,
        only_b=in_b & ~in_a,
        gfn_start=start,
    )


def common_with_next(record: YoungRecord) -> npt.NDArray[np.int64]:
    """Return shape ``(windows - 1,)``: pages young in both a window and the next one."""
    n = len(record)
    blocks = -(-n // BLOCK_WINDOWS)
    found = np.zeros(blocks * BLOCK_WINDOWS, dtype=np.int64)
    before: tuple[int, int, Words] | None = None
    for gfn, base, words in record.blocks():
        size = -(-words.size // 64) * 64
        padded = np.zeros(size, dtype=np.uint64)
        padded[: words.size] = words
        # Bit 63 - j is window j: a left shift aligns each window with the previous one.
        common = padded & (padded << np.uint64(1))
        found[base : base + BLOCK_WINDOWS] += count_bits(to_rows(common)).sum(
            axis=1, dtype=np.int64
        )
        if before is not None and before[0] == gfn and before[1] + BLOCK_WINDOWS == base:
            last = (before[2] & np.uint64(1)) != 0
            found[base - 1] += int((last & (words >> np.uint64(63) != 0)).sum())
        before = gfn, base, words
    return found[: max(n - 1, 0)]


def jaccard_of_neighbours(record: YoungRecord) -> npt.NDArray[np.float64]:
    """Return shape ``(windows - 1,)``: the Jaccard index of each window and the next one."""
    both = common_with_next(record)
    young = record.column("n_young")
    either = young[1:] + young[:-1] - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
