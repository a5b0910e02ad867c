from __future__ import annotations

import numpy as np
import pytest

from kvmhost.bitmap import pack, unpack


class Pages:
    """Makes masks and bitmaps of a fixed number of pages."""

    def mask(self, n, gfns=()):
        bits = np.zeros(n, bool)
        bits[list(gfns)] = True
        return bits

    def words(self, n, gfns=()):
        return pack(self.mask(n, gfns))

    def everything(self, n):
        return np.ones(n, bool)

    def array(self, gfns):
        return np.array(sorted(gfns), dtype=np.int64)


class Bits:
    """A probe over a set of young gfns; notes what was asked."""

    def __init__(self, n_pages, young=()):
        self.n_pages, self.young, self.asked, self.single = n_pages, set(young), [], []

    def clear_young(self, pages):
        asked = set(np.flatnonzero(unpack(pages, self.n_pages)).tolist())
        self.asked.append(asked)
        found = self.young & asked
        self.young -= found
        return Pages().words(self.n_pages, found)

    def clear_flush_young(self, gfn):
        self.single.append(gfn)
        found = gfn in self.young
        self.young.discard(gfn)
        return found


@pytest.fixture
def pages():
    return Pages()


@pytest.fixture
def bits():
    return Bits
