"""Select the leaf tables that an aging sweep visits.

As in the kernel (mm/vmscan.c), two filters alternate: the sweep of a generation visits
the tables that pass the filter of that generation, and adds tables that are dense in
young entries to the other filter, which the next sweep uses; the look-around of eviction
also adds tables. A table is dense if it has at least one young entry per cache line of
entries on average (``suitable_to_scan``: 64 bytes hold eight entries).

Departs from the kernel: the tables of a guest are numbered, so one bit per table replaces
the Bloom filter into which the kernel hashes pointers of many processes. It is smaller
and has no false positives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words, unpack

__all__ = [
    "TABLE_PAGES",
    "WINDOW_PAGES",
    "TableFilter",
    "expand_tables",
    "look_around_windows",
    "should_look_around",
    "suitable_to_scan",
    "young_a_table",
]

TABLE_PAGES = 512
#: Pages of a look-around; MIN_LRU_BATCH, the bits of a word.
WINDOW_PAGES = 64
_ENTRIES_A_CACHE_LINE = 8

Bits = npt.NDArray[np.bool_]


def suitable_to_scan(
    total: npt.NDArray[np.int64] | int, young: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.bool_] | bool:
    """Return whether there is at least one young entry per cache line on average."""
    return young * _ENTRIES_A_CACHE_LINE >= total


def should_look_around(spte_young: bool, spte_walk: bool) -> bool:
    """Return whether eviction looks at the pages around a victim.

    The rule of 2023: a victim that is young in the secondary MMU's tables only counts if those
    are tested in batches; page by page, a window would cost 64 locks. (There, a victim that
    is young in the host's own tables counts in any case; a guest leaves no trace in those.)
    """
    return spte_young and spte_walk


def look_around_windows(
    gfns: npt.NDArray[np.int64], area_start: int, area_end: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the windows ``[start, end)`` that look-around scans for young victims.

    As ``lru_gen_look_around()``: the part of the page's table that lies in its area; if that
    is longer than a window, 64 pages centred on the page, moved inwards at either end.
    An area of a single page gives an empty window: there is nothing around it.

    :param area_start: first page of the area (a VMA there, a memslot here) around the victims
    :param area_end: page after its last one
    """
    half = WINDOW_PAGES // 2
    first = np.maximum(gfns // TABLE_PAGES * TABLE_PAGES, area_start)
    last = np.minimum((gfns // TABLE_PAGES + 1) * TABLE_PAGES, area_end)
    start = np.clip(gfns - half, first, np.maximum(first, last - WINDOW_PAGES))
    end = np.minimum(start + WINDOW_PAGES, last)
    return start, np.where(last - first == 1, start, end)


class TableFilter:
    """The two filters over the leaf tables of ``[0, n_pages)``."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.n_tables = -(-n_pages // TABLE_PAGES)
        # None before the first sweep: every table passes.
        self._filters: list[Bits | None] = [None, None]
        sizes = np.full(self.n_tables, TABLE_PAGES, dtype=np.int64)
        sizes[-1] = n_pages - TABLE_PAGES * (self.n_tables - 1)
        self._sizes = sizes

    def tables(self, seq: int) -> Bits:
        """Return the tables that the sweep of a generation visits."""
        passing = self._filters[seq % 2]
        return np.ones(self.n_tables, dtype=bool) if passing is None else passing

    def learn(self, seq: int, swept: Bits, young: Words) -> None:
        """Record the result of a generation's sweep for the next sweep.

        Tables that were not visited do not pass the next time unless :meth:`admit` adds
        them.
        """
        counts = young_a_table(young, self.n_pages)
        self._filters[(seq + 1) % 2] = swept & suitable_to_scan(self._sizes, counts)

    def admit(self, seq: int, tables: npt.NDArray[np.int64]) -> None:
        """Add tables to the next sweep, because eviction found them dense."""
        waiting = self._filters[(seq + 1) % 2]
        if waiting is not None:
            waiting[tables] = True

    def n_pages_of(self, tables: Bits) -> int:
        """Return the number of pages of some tables."""
        return int(self._sizes[tables].sum())

    def pages(self, tables: Bits) -> Words:
        """Return the bitmap of all pages of some tables."""
        return expand_tables(tables, self.n_pages)


def young_a_table(young: Words, n_pages: int) -> npt.NDArray[np.int64]:
    """Return the number of young pages of each table."""
    n_tables = -(-n_pages // TABLE_PAGES)
    bits = np.zeros(n_tables * TABLE_PAGES, dtype=bool)
    bits[:n_pages] = unpack(young, n_pages)
    counts: npt.NDArray[np.int64] = bits.reshape(-1, TABLE_PAGES).sum(axis=1, dtype=np.int64)
    return counts


def expand_tables(tables: Bits, n_pages: int) -> Words:
    """Return the bitmap in which all pages of some tables are set."""
    words = np.repeat(np.where(tables, np.uint64(2**64 - 1), np.uint64(0)), TABLE_PAGES // 64)
    words = words[: n_words(n_pages)]
    if n_pages % 64 and words.size:
        words[-1] &= np.uint64((1 << n_pages % 64) - 1)
    return words
