"""Cutting and placing ranges of bits, against booleans."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.bitmap import (
    Provenance,
    YoungBitmap,
    clear_words,
    n_words,
    pack,
    place_words,
    sub_words,
    unpack,
)


@given(st.integers(1, 400), st.data())
def test_a_cut_is_the_range_of_the_booleans(n_pages: int, data: st.DataObject) -> None:
    bits = np.random.default_rng(data.draw(st.integers(0, 99))).random(n_pages) < 0.5
    first = data.draw(st.integers(0, n_pages - 1))
    count = data.draw(st.integers(1, n_pages - first))
    cut = sub_words(pack(bits), n_pages, first, count)
    assert cut.size == n_words(count)
    assert np.array_equal(cut, pack(bits[first : first + count]))


@given(st.integers(1, 400), st.data())
def test_placing_ors_into_the_range(n_pages: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    before = rng.random(n_pages) < 0.3
    first = data.draw(st.integers(0, n_pages - 1))
    part = rng.random(data.draw(st.integers(1, n_pages - first))) < 0.5
    words = pack(before)
    place_words(words, first, pack(part))
    expected = before.copy()
    expected[first : first + part.size] |= part
    assert np.array_equal(unpack(words, n_pages), expected)
    assert np.array_equal(words, pack(expected))


@given(st.integers(1, 400), st.data())
def test_clearing_takes_those_of_the_range(n_pages: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    before = rng.random(n_pages) < 0.7
    first = data.draw(st.integers(0, n_pages - 1))
    part = rng.random(data.draw(st.integers(1, n_pages - first))) < 0.5
    words = pack(before)
    clear_words(words, first, pack(part))
    expected = before.copy()
    expected[first : first + part.size] &= ~part
    assert np.array_equal(words, pack(expected))


def test_a_bitmap_is_an_array_of_its_pages_and_shows_itself() -> None:
    source = Provenance("guestpt", "npt", 1_000_000, 3_500_000)
    young = YoungBitmap.from_gfns(0x100, 70, [0x100, 0x145], provenance=source)
    pages = np.asarray(young)
    assert pages.dtype == bool
    assert pages.shape == (70,)
    assert np.flatnonzero(pages).tolist() == [0, 69]
    assert np.asarray(young, dtype=np.uint8).sum() == 2
    assert repr(young) == "YoungBitmap([0x100, 0x146), 2 young, guestpt/npt)"
    page = young._repr_html_()
    assert "<th>young</th><td>2 of 70 pages</td>" in page
    assert "<th>window</th><td>2.5 ms</td>" in page
