"""Ranges of pages that a picture shows one after the other, and which parts of memory are used.

A picture of a mostly idle memory shows the part that is used. A *position* counts only the
pages that are shown, from the first one on; where everything is shown, positions are pages.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["PageParts", "joined_runs"]

#: A picture has at most this many parts; the nearest ones are joined.
_MAX_PARTS = 6
#: Memory of fewer bins is small enough to be shown as a whole.
_MIN_BINS = 64
#: Parts nearer to each other than this share of memory are joined.
_NEAR = 1 / 64


@dataclasses.dataclass(frozen=True)
class PageParts:
    """Ascending ranges ``[low, high)`` of pages that do not touch.

    >>> parts = PageParts(((0, 512), (4096, 4608)))
    >>> parts.n_pages, parts.page_at(600), parts.position_of(4184), parts.position_of(2000)
    (1024, 4184, 600, 512)
    """

    ranges: tuple[tuple[int, int], ...]

    @property
    def low(self) -> int:
        """The first page."""
        return self.ranges[0][0]

    @property
    def high(self) -> int:
        """One more than the last page."""
        return self.ranges[-1][1]

    @property
    def n_pages(self) -> int:
        """Number of pages that are shown."""
        return sum(high - low for low, high in self.ranges)

    @property
    def n_left_out(self) -> int:
        """Number of pages between the parts."""
        return self.high - self.low - self.n_pages

    def page_at(self, position: int) -> int:
        """Return the page at a position; the end of the last part for those behind it."""
        for low, high in self.ranges:
            if position < high - low:
                return low + position
            position -= high - low
        return self.high

    def position_of(self, page: int) -> int:
        """Return the number of shown pages before a page."""
        return sum(min(max(page - low, 0), high - low) for low, high in self.ranges)

    def between(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (low, high, position) of the pages at positions ``[start, end)``."""
        at = 0
        for low, high in self.ranges:
            first, last = max(start - at, 0), min(end - at, high - low)
            if first < last:
                yield low + first, low + last, at + first
            at += high - low

    def cuts(self) -> list[tuple[int, int]]:
        """Return (position, pages left out there), between the parts."""
        pairs = itertools.pairwise(self.ranges)
        return [(self.position_of(low), low - high) for (_, high), (low, _) in pairs]


def joined_runs(used: npt.NDArray[np.bool_]) -> list[tuple[int, int]] | None:
    """Return the runs of used bins, those near to each other joined.

    :return: ``[first, end)`` of bins, in order; None if they are more than half of all bins, no
        bin is used, or there are few bins
    """
    if used.size < _MIN_BINS:
        return None
    change = np.flatnonzero(np.diff(used.astype(np.int8), prepend=0, append=0))
    runs: list[tuple[int, int]] = [(int(a), int(b)) for a, b in change.reshape(-1, 2)]
    near = max(int(used.size * _NEAR), 1)
    while len(runs) > 1:
        at = min(range(len(runs) - 1), key=lambda i: runs[i + 1][0] - runs[i][1])
        if runs[at + 1][0] - runs[at][1] > near and len(runs) <= _MAX_PARTS:
            break
        runs[at : at + 2] = [(runs[at][0], runs[at + 1][1])]
    shown = sum(end - first for first, end in runs)
    return runs if 0 < shown <= used.size // 2 else None
