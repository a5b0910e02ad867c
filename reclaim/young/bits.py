"""Bit matrices: pages by windows, sixty-four windows a word.

A record keeps the history of one page together: bit ``63 - j`` of a page's word is
window ``j`` of a block of 64 windows. So the bytes of a block, big-endian, are what
``numpy.packbits`` makes of booleans of shape ``(pages, windows)``. A bitmap is the
other way round, 64 pages a word; the turn between the two is a transposition of
64 by 64 bits, done for all of a block's pages at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, pack

__all__ = [
    "BLOCK_WINDOWS",
    "count_bits",
    "count_bits_plain",
    "plane",
    "runs",
    "to_history",
    "to_rows",
    "window_mask",
]

#: Windows a word of history holds.
BLOCK_WINDOWS = 64

_BYTE_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def count_bits(words: Words) -> npt.NDArray[np.uint8]:
    """Return how many bits of each word are set; same shape."""
    if not hasattr(np, "bitwise_count"):
        return count_bits_plain(words)
    counts: npt.NDArray[np.uint8] = np.bitwise_count(words)
    return counts


def count_bits_plain(words: Words) -> npt.NDArray[np.uint8]:
    """Do the same as :func:`count_bits` with what numpy had before version 2."""
    raw = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 8)
    counts: npt.NDArray[np.uint8] = _BYTE_COUNTS[raw].sum(axis=-1, dtype=np.uint8)
    return counts


def to_history(rows: Words) -> Words:
    """Turn bitmaps into histories.

    :param rows: shape ``(windows, words)``, at most 64 windows, in order
    :return: shape ``(64 * words,)``: one word a page, bit ``63 - j`` is window ``j``
    """
    matrix = np.zeros((BLOCK_WINDOWS, rows.shape[1]), dtype=np.uint64)
    matrix[BLOCK_WINDOWS - 1 - np.arange(rows.shape[0])] = rows
    _transpose(matrix)
    return np.ascontiguousarray(matrix.T).reshape(-1)


def to_rows(history: Words, n_windows: int = BLOCK_WINDOWS) -> Words:
    """Turn histories into bitmaps: the inverse of :func:`to_history`.

    :param history: a multiple of 64 words
    :return: shape ``(n_windows, words / 64)``
    """
    matrix = history.reshape(-1, BLOCK_WINDOWS).T.copy(order="C")
    _transpose(matrix)
    return np.ascontiguousarray(matrix[::-1][:n_windows])


def plane(history: Words, window: int) -> Words:
    """Return the bitmap of one window of a block, as words of 64 pages."""
    return pack((history & window_mask(window, window + 1)) != 0)


def window_mask(first: int, end: int) -> np.uint64:
    """Return the mask of windows ``[first, end)`` of a block."""
    ones = (1 << (end - first)) - 1
    return np.uint64(ones << (BLOCK_WINDOWS - end))


def runs(
    bits: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return starts and ends of the runs of True, ends exclusive."""
    padded = np.concatenate([[False], bits, [False]])
    change = np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int64)
    return change[::2], change[1::2]


def _transpose(matrix: Words) -> None:
    """Transpose each column of a ``(64, n)`` matrix as 64 by 64 bits, in place.

    Halves are swapped recursively, as in Hacker's Delight, 7-3.
    """
    half = 32
    while half:
        mask = np.uint64(sum(((1 << half) - 1) << at for at in range(0, 64, 2 * half)))
        shift = np.uint64(half)
        blocks = matrix.reshape(32 // half, 2, half, -1)
        low, high = blocks[:, 0], blocks[:, 1]
        swap = low >> shift
        swap ^= high
        swap &= mask
        high ^= swap
        swap <<= shift
        low ^= swap
        half //= 2
