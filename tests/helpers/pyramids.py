"""The cells of a heatmap's pyramid, unpacked without its code."""

from __future__ import annotations

import zlib

import numpy as np

from kvmhost.reclaim.draw.heatmaptiles import TILE_BINS, TILE_COLUMNS


def cells_of(step):
    """Unpack all tiles of a step, as the page does, but not with its code."""
    kind = {8: "<u1", 16: "<u2", 32: "<u4", 64: "<f8"}.get(step.bits)
    row_tiles = -(-step.n_columns // TILE_COLUMNS)
    shape = (-(-step.n_bins // TILE_BINS) * TILE_BINS, row_tiles * TILE_COLUMNS)
    whole = np.zeros(shape, dtype=np.int64)
    for number, tile in step.tiles.items():
        raw = zlib.decompress(tile)
        if kind is None:
            cells = np.array([(raw[i // 8] >> (7 - i % 8)) & 1 for i in range(8 * len(raw))])
        else:
            size = np.dtype(kind).itemsize
            n = len(raw) // size
            cells = np.frombuffer(b"".join(raw[i::n] for i in range(n)), dtype=kind)
        row, column = divmod(number, row_tiles)
        part = cells.astype(np.int64).reshape(TILE_BINS, TILE_COLUMNS)
        whole[
            row * TILE_BINS : (row + 1) * TILE_BINS,
            column * TILE_COLUMNS : (column + 1) * TILE_COLUMNS,
        ] = part
    assert not whole[step.n_bins :].any()
    assert not whole[:, step.n_columns :].any()
    return whole[: step.n_bins, : step.n_columns]


def grouped(cells, rows, columns):
    """Add up blocks, with plain slices."""
    return np.array(
        [
            [cells[r : r + rows, c : c + columns].sum() for c in range(0, cells.shape[1], columns)]
            for r in range(0, cells.shape[0], rows)
        ]
    )
