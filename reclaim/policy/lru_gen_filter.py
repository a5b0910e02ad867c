"""Which leaf tables an aging sweep should look into.

As in the kernel (mm/vmscan.c), two filters take turns: the sweep of a generation looks
into the tables that the filter of that generation lets through, and notes the tables
that it finds dense in young entries in the other one, for the next sweep; so does the
look-around of eviction. A table is dense if it has one young entry for each cache line
of entries on average (``suitable_to_scan``: 64 bytes hold eight).

Departs from the kernel: a guest's tables are known by number, so that one bit a table
stands where the kernel hashes pointers of many processes into a Bloom filter. It is
smaller, and it never says yes for no.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words, unpack

__all__ = ["TABLE_PAGES", "TableFilter", "expand_tables", "suitable_to_scan", "young_a_table"]

TABLE_PAGES = 512
_ENTRIES_A_CACHE_LINE = 8

Bits = npt.NDArray[np.bool_]


def suitable_to_scan(
    total: npt.NDArray[np.int64] | int, young: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.bool_] | bool:
    """Return whether there is a young entry a cache line, on average."""
    return young * _ENTRIES_A_CACHE_LINE >= total


class TableFilter:
    """The two filters over the leaf tables of ``[0, n_pages)``."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        self.n_tables = -(-n_pages // TABLE_PAGES)
        # None until there was a sweep to learn from: then everything passes.
        self._filters: list[Bits | None] = [None, None]
        sizes = np.full(self.n_tables, TABLE_PAGES, dtype=np.int64)
        sizes[-1] = n_pages - TABLE_PAGES * (self.n_tables - 1)
        self._sizes = sizes

    def tables(self, seq: int) -> Bits:
        """Return which tables the sweep of a generation looks into."""
        passing = self._filters[seq % 2]
        return np.ones(self.n_tables, dtype=bool) if passing is None else passing

    def learn(self, seq: int, swept: Bits, young: Words) -> None:
        """Note what the sweep of a generation found, for the next one.

        Tables that it did not look into do not pass next time, unless
        :meth:`admit` lets them in.
        """
        counts = young_a_table(young, self.n_pages)
        self._filters[(seq + 1) % 2] = swept & suitable_to_scan(self._sizes, counts)

    def admit(self, seq: int, tables: npt.NDArray[np.int64]) -> None:
        """Let tables into the next sweep, because eviction found them dense."""
        waiting = self._filters[(seq + 1) % 2]
        if waiting is not None:
            waiting[tables] = True

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
