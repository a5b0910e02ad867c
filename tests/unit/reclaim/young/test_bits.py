"""Bit matrices against plain booleans, and against Zarr's own packbits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost.bitmap import pack, unpack
from kvmhost.reclaim.record.summary import last_window_of
from kvmhost.reclaim.young.bits import (
    count_bits,
    count_bits_plain,
    plane,
    runs,
    to_history,
    to_rows,
    window_mask,
)


def bits(seed, windows, pages, density=0.3):
    return np.random.default_rng(seed).random((windows, pages)) < density


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 64), st.integers(1, 5))
def test_turning_rows_into_histories_and_back(seed, windows, words):
    matrix = bits(seed, windows, 64 * words)
    rows = np.array([pack(row) for row in matrix], dtype=np.uint64).reshape(windows, words)
    history = to_history(rows)
    for page in (0, 63, 64 * words - 1):
        wanted = sum(1 << (63 - w) for w in range(windows) if matrix[w, page])
        assert int(history[page]) == wanted
    assert np.array_equal(to_rows(history, windows), rows)
    for window in range(windows):
        assert np.array_equal(plane(history, window), rows[window])
    last = last_window_of(history)
    for page in range(0, 64 * words, 17):
        young = np.flatnonzero(matrix[:, page])
        assert last[page] == (young[-1] if young.size else -1)


def test_histories_are_what_packbits_of_zarr_makes():
    numcodecs = pytest.importorskip("numcodecs")
    matrix = bits(7, 64, 128)
    encoded = bytes(numcodecs.PackBits().encode(np.ascontiguousarray(matrix.T)))
    rows = np.array([pack(row) for row in matrix], dtype=np.uint64)
    assert encoded == b"\0" + to_history(rows).astype(">u8").tobytes()


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_counting_bits(numbers):
    words = np.array(numbers, dtype=np.uint64)
    wanted = [bin(number).count("1") for number in numbers]
    assert count_bits(words).tolist() == wanted
    assert count_bits_plain(words).tolist() == wanted


def test_counting_bits_keeps_the_shape():
    words = np.full((3, 5), 3, dtype=np.uint64)
    assert count_bits_plain(words).shape == count_bits(words).shape == (3, 5)


@pytest.mark.parametrize(("first", "end"), [(0, 64), (0, 0), (5, 6), (63, 64), (10, 50)])
def test_window_mask(first, end):
    mask = int(window_mask(first, end))
    assert [w for w in range(64) if mask >> (63 - w) & 1] == list(range(first, end))


@given(st.lists(st.booleans(), max_size=60))
def test_runs(values):
    starts, ends = runs(np.array(values, dtype=bool))
    inside = [i for a, b in zip(starts, ends, strict=True) for i in range(a, b)]
    assert inside == [i for i, value in enumerate(values) if value]
    assert (starts[1:] > ends[:-1]).all()


def test_unpack_is_the_inverse_of_pack():
    row = bits(1, 1, 100)[0]
    assert np.array_equal(unpack(pack(row), 100), row)
