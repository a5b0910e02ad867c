"""Counts that are updated as windows are appended, so that they need no pass over the bits.

The last young window of each page gives, for the pages young in the current window, the
time since their previous touch: the reuse histogram. The number of pages last young in
each earlier window changes by only those pages: the age histogram, from which the working
set over any number of windows is a sum. The cost of both is proportional to the number of
young pages, not to the number of pages.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words
from kvmhost.reclaim.record.meta import N_BUCKETS, UPPER
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS, count_bits

__all__ = ["RunningAges", "bucket_of", "bucket_sums", "last_window_of", "level_sums"]

Counts = npt.NDArray[np.int64]


def bucket_of(windows: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return the bucket of a number of windows; the last bucket counts all larger numbers."""
    found = np.searchsorted(UPPER, np.asarray(windows), side="left")
    return np.minimum(found, N_BUCKETS - 1).astype(np.int64)


def bucket_sums(counts: Counts) -> Counts:
    """Sum ``counts[k]``, pages of ``k + 1`` windows, into buckets; bucket 0 stays 0."""
    sums = np.zeros(N_BUCKETS, dtype=np.int64)
    starts = UPPER[:-1][UPPER[:-1] < counts.size]
    if starts.size:
        sums[1 : 1 + starts.size] = np.add.reduceat(counts, starts)
    return sums


def last_window_of(history: Words) -> npt.NDArray[np.int64]:
    """Return the last window in which each page of a block was young, -1 for none."""
    lowest = history & (~history + np.uint64(1))
    # A power of two is exact as a float, and its exponent is the number of the bit.
    bit = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1
    return np.where(history != 0, BLOCK_WINDOWS - 1 - bit, -1)


def level_sums(rows: Words, level: int) -> npt.NDArray[np.uint32]:
    """Return the young pages in bins of ``2 ** level`` pages.

    :param rows: shape ``(windows, words)``, a whole number of bins
    """
    per_word = count_bits(rows).astype(np.uint32)
    bins = per_word.reshape(rows.shape[0], -1, 1 << (level - 6))
    sums: npt.NDArray[np.uint32] = bins.sum(axis=2, dtype=np.uint32)
    return sums


class RunningAges:
    """The ages of pages while a record is written.

    :param chunk_pages: pages per chunk; chunks that were never young use no memory
    """

    def __init__(self, chunk_pages: int) -> None:
        self._chunk_pages = chunk_pages
        #: By chunk: last young window plus 1; 0: never.
        self._last: dict[int, npt.NDArray[np.uint32]] = {}
        #: Number of pages last young in each window.
        self._by_window: Counts = np.zeros(1024, dtype=np.int64)
        self._n_windows = 0

    def restore(self, n_windows: int, last: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Continue after ``n_windows`` with the last young windows by chunk, -1 for never."""
        self._reserve(n_windows)
        self._n_windows = n_windows
        for chunk, windows in last.items():
            self._last[chunk] = (windows + 1).astype(np.uint32)
            counts = np.bincount(windows[windows >= 0], minlength=n_windows)
            self._by_window[:n_windows] += counts

    def push(self, chunks: Mapping[int, Words], n_pages: int) -> tuple[Counts, Counts]:
        """Add one window; return its rows of ``reuse`` and ``ages``.

        :param chunks: bitmap of each chunk with a young page
        :param n_pages: pages that were harvested
        """
        now = self._n_windows
        before = [self._touch(chunk, words, now) for chunk, words in chunks.items()]
        windows = np.concatenate(before) if before else np.zeros(0, dtype=np.uint32)
        counts = np.bincount(windows, minlength=now + 1).astype(np.int64)
        self._reserve(now + 1)
        self._by_window[:now] -= counts[1:]
        self._by_window[now] = windows.size
        self._n_windows = now + 1
        reuse = bucket_sums(counts[:0:-1])
        reuse[0] = counts[0]
        ages = bucket_sums(self._by_window[now::-1])
        ages[0] = max(n_pages - int(ages.sum()), 0)
        return reuse, ages

    def _touch(self, chunk: int, words: Words, now: int) -> npt.NDArray[np.uint32]:
        last = self._last.get(chunk)
        if last is None:
            last = self._last[chunk] = np.zeros(self._chunk_pages, dtype=np.uint32)
        bits = np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little")
        pages = np.flatnonzero(bits.view(bool))
        before = last[pages]
        last[pages] = now + 1
        return before

    def _reserve(self, n_windows: int) -> None:
        if n_windows > self._by_window.size:
            grown = np.zeros(max(n_windows, 2 * self._by_window.size), dtype=np.int64)
            grown[: self._by_window.size] = self._by_window
            self._by_window = grown
