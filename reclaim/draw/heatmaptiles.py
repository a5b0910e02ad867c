"""A pyramid of counts over a record, by powers of eight of pages and of windows.

A cell of level ``L`` and step ``K`` counts the young pages of ``2 ** L`` pages over
``2 ** K`` windows. It is the sum of its 8 children of the next finer step, and also of
its 8 children of the next finer level. Cells are stored in tiles of 1,024 bins by 64
columns, deflated; tiles that are all zeros are omitted. Levels are built from coarse to
fine until the budget is used up.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib

import numpy as np
import numpy.typing as npt

from kvmhost.reclaim.draw.heatmapdata import BIT_LEVELS, RecordView, summed
from kvmhost.reclaim.record.meta import LEVELS
from kvmhost.reclaim.young.bits import BLOCK_WINDOWS

__all__ = [
    "FACTOR_BITS",
    "TILE_BINS",
    "TILE_COLUMNS",
    "Pyramid",
    "PyramidLevel",
    "build_layer",
    "build_pyramid",
    "cell_bits",
    "pack_tile",
    "shuffled",
]

TILE_BINS, TILE_COLUMNS = 1024, 64
#: Levels and steps differ by a factor of eight.
FACTOR_BITS = 3
_FACTOR = 1 << FACTOR_BITS
#: Maximum number of bins and columns of the coarsest level and step.
_TOP_CELLS = 512
#: Pages whose bits are decompressed together.
_STRIPE_PAGES = 1 << 18
#: Maximum size of the bits of an array to decompress.
_MOST_UNPACKED_BYTES = 1 << 34
#: The coarsest level that is computed from bits: a stripe of pages.
_TOP_BIT_LEVEL = 18
#: Maximum ratio of the compressed bits in the record to the budget.
_MOST_STORED = 2

Cells = npt.NDArray[np.integer]


@dataclasses.dataclass
class PyramidLevel:
    """All cells of one level and step.

    :param tiles: by number: ``bin tile * tiles a row + column tile``
    """

    level: int
    step: int
    n_bins: int
    n_columns: int
    tiles: dict[int, bytes] = dataclasses.field(default_factory=dict)

    @property
    def bits(self) -> int:
        """Bits per cell."""
        return cell_bits(self.level, self.step)

    @property
    def n_bytes(self) -> int:
        """Size of all tiles."""
        return sum(len(tile) for tile in self.tiles.values())


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Levels from coarse to fine, each with its steps from fine to coarse.

    :param left_out: levels that exceeded the budget, from coarse to fine
    """

    levels: dict[int, list[PyramidLevel]]
    left_out: list[int]

    @property
    def n_bytes(self) -> int:
        """Size of all tiles."""
        return sum(step.n_bytes for steps in self.levels.values() for step in steps)


def cell_bits(level: int, step: int) -> int:
    """Return the bits that the largest count of a cell needs: 1, 8, 16, 32 or 64 (float)."""
    most = level + step
    return next(bits for top, bits in ((1, 1), (8, 8), (16, 16), (32, 32), (99, 64)) if most < top)


def shuffled(values: npt.NDArray[np.generic]) -> bytes:
    """Return little-endian numbers grouped by byte position, which compresses better."""
    octets = np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8)
    return octets.T.tobytes()


def pack_tile(cells: Cells, bits: int) -> bytes:
    """Return a tile of ``(bins, columns)``: by bin, bytes shuffled, deflated."""
    if bits == 1:
        raw = np.packbits(cells.astype(bool)).tobytes()
    else:
        kind = {8: "<u1", 16: "<u2", 32: "<u4", 64: "<f8"}[bits]
        raw = shuffled(cells.astype(kind))
    return zlib.compress(raw, 6)


def build_pyramid(view: RecordView, budget_bytes: int) -> Pyramid:
    """Build the levels that fit a budget of deflated bytes, at least the coarsest."""
    levels: dict[int, list[PyramidLevel]] = {}
    every = _levels(view)
    left_bytes = budget_bytes
    for level in (each for each in every if each > BIT_LEVELS[0]):
        steps = _steps(view, level)
        # All levels of small or unaligned views are computed from bits, which are few.
        if not _from_counts(view, level, steps, left_bytes if levels else None):
            break
        levels[level] = steps
        left_bytes -= sum(step.n_bytes for step in steps)
    else:
        fine = [level for level in every if level <= BIT_LEVELS[0]]
        levels |= _from_bits(view, fine, left_bytes, n_least=0 if levels else 1)
    return Pyramid(levels, [level for level in every if level not in levels])


def build_layer(view: RecordView, name: str, budget_bytes: int) -> Pyramid | None:
    """Build the levels of another array of bits, at least the coarsest; it has no stored sums.

    :param name: one of :data:`~kvmhost.reclaim.record.meta.BITS`
    :return: None: there are too many bits to count
    """
    if _bits_on_disk(view, name)[1] > _MOST_UNPACKED_BYTES:
        return None
    every = [level for level in _levels(view) if level <= _TOP_BIT_LEVEL]
    coarse = [level for level in every if level > BIT_LEVELS[0]]
    levels = _from_words(view, name, coarse)
    left_bytes = budget_bytes - sum(step.n_bytes for steps in levels.values() for step in steps)
    while left_bytes < 0 and len(levels) > 1:
        left_bytes += sum(step.n_bytes for step in levels.pop(min(levels)))
    if len(levels) == len(coarse):
        fine = [level for level in every if level <= BIT_LEVELS[0]]
        levels |= _from_bits(view, fine, left_bytes, n_least=0 if levels else 1, name=name)
    return Pyramid(levels, [level for level in every if level not in levels])


def _from_words(view: RecordView, name: str, levels: list[int]) -> dict[int, list[PyramidLevel]]:
    """Return levels above those in :data:`BIT_LEVELS`, from the counts of words."""
    if not levels:
        return {}
    found = {level: _steps(view, level) for level in levels}
    whole = {level: _Stripe(steps, 0, view.n_bins(level)) for level, steps in found.items()}
    base, finest = BIT_LEVELS[0], min(levels)
    for first, end in view.bands(view.n_bins(finest)):
        columns = np.zeros((end - first, view.n_bins(finest)), dtype=np.uint32)
        for low in range(0, view.n_pages, _STRIPE_PAGES):
            pages = low, min(low + _STRIPE_PAGES, view.n_pages)
            counts = summed(view.bit_counts((base,), first, end, pages, name)[base], finest - base)
            columns[:, low >> finest :][:, : counts.shape[1]] = counts
        for level, stripe in whole.items():
            stripe.push(summed(columns, level - finest))
    for stripe in whole.values():
        stripe.flush()
    return found


class _Stripe:
    """Collects the columns of one range of bins until tiles are full, step by step."""

    def __init__(self, steps: list[PyramidLevel], first_tile: int, n_bins: int) -> None:
        self._steps, self._first_tile = steps, first_tile
        self._parts: list[list[Cells]] = [[] for _ in steps]
        self._emitted = [0] * len(steps)
        self._n_bins = n_bins
        self.n_bytes = 0

    def push(self, columns: Cells) -> None:
        """Append the next windows, shape ``(windows, bins)``."""
        self._push(0, columns)

    def flush(self) -> None:
        """Write tiles of the remaining columns."""
        for at in range(len(self._steps)):
            if self._parts[at]:
                self._emit(at, np.concatenate(self._parts[at]))
                self._parts[at] = []

    def _push(self, at: int, columns: Cells) -> None:
        if at == len(self._steps):
            return
        parts = self._parts[at]
        parts.append(columns)
        if sum(len(part) for part in parts) < TILE_COLUMNS:
            return
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        full = len(whole) - len(whole) % TILE_COLUMNS
        self._parts[at] = [whole[full:]] if full < len(whole) else []
        for first in range(0, full, TILE_COLUMNS):
            self._emit(at, whole[first : first + TILE_COLUMNS])

    def _emit(self, at: int, columns: Cells) -> None:
        """Write tiles of up to 64 columns, and pass their sums to the next step."""
        step, column_tile = self._steps[at], self._emitted[at]
        self._emitted[at] += 1
        row_tiles = -(-step.n_columns // TILE_COLUMNS)
        for first in range(0, self._n_bins, TILE_BINS):
            part = columns[:, first : first + TILE_BINS]
            if part.any():
                cells = np.zeros((TILE_BINS, TILE_COLUMNS), dtype=part.dtype)
                cells[: part.shape[1], : part.shape[0]] = part.T
                tile = pack_tile(cells, step.bits)
                number = (self._first_tile + first // TILE_BINS) * row_tiles + column_tile
                step.tiles[number] = tile
                self.n_bytes += len(tile)
        if at + 1 < len(self._steps):
            starts = np.arange(0, len(columns), _FACTOR)
            self._push(at + 1, np.add.reduceat(columns, starts, axis=0, dtype=np.uint64))


def _levels(view: RecordView) -> list[int]:
    """Return all levels, from coarse to fine."""
    endless = itertools.count(0, FACTOR_BITS)
    top = next(level for level in endless if view.n_bins(level) <= _TOP_CELLS)
    return list(range(top, -1, -FACTOR_BITS))


def _steps(view: RecordView, level: int) -> list[PyramidLevel]:
    found = []
    for step in itertools.count(0, FACTOR_BITS):
        n_columns = -(-view.n_windows // (1 << step))
        found.append(PyramidLevel(level, step, view.n_bins(level), n_columns))
        if n_columns <= _TOP_CELLS:
            break
    return found


def _from_counts(
    view: RecordView, level: int, steps: list[PyramidLevel], most_bytes: int | None
) -> bool:
    """Fill a level from the record's sums; return whether it fits."""
    bins = view.n_bins(min(level, LEVELS[-1]))
    stripe = _Stripe(steps, 0, view.n_bins(level))
    for first, end in view.bands(bins):
        stripe.push(view.counts(level, first, end))
        if most_bytes is not None and stripe.n_bytes > most_bytes:
            return False
    stripe.flush()
    return most_bytes is None or stripe.n_bytes <= most_bytes


def _from_bits(
    view: RecordView, levels: list[int], most_bytes: int, n_least: int, name: str = "young"
) -> dict[int, list[PyramidLevel]]:
    """Return the finest levels that fit, from one pass over the bits.

    :param n_least: number of coarsest levels to build even if they do not fit
    """
    found = {level: _steps(view, level) for level in levels}
    stored_bytes, unpacked_bytes = _bits_on_disk(view, name)
    # Bits compress about as well here as in the record: skip levels that cannot fit.
    if stored_bytes > _MOST_STORED * most_bytes or unpacked_bytes > _MOST_UNPACKED_BYTES:
        found = {level: found[level] for level in levels[:n_least]}
    sizes = dict.fromkeys(levels, 0)
    for low in range(0, view.n_pages, _STRIPE_PAGES):
        high = min(low + _STRIPE_PAGES, view.n_pages)
        stripes = {
            level: _Stripe(steps, (low >> level) // TILE_BINS, -(-(high - low) >> level))
            for level, steps in found.items()
        }
        for first, end in view.bands(high - low):
            counted = view.bit_counts(tuple(found), first, end, (low, high), name)
            for level, counts in counted.items():
                stripes[level].push(counts)
        for level, stripe in stripes.items():
            stripe.flush()
            sizes[level] += stripe.n_bytes
        while len(found) > n_least and sum(sizes[level] for level in found) > most_bytes:
            del found[min(found)]
        if not found:
            break
    return found


def _bits_on_disk(view: RecordView, name: str) -> tuple[int, int]:
    """Return the size of a view's chunks of an array of bits, stored and decompressed."""
    size, stored, n_chunks = view.record.metadata.chunk_pages, 0, 0
    folder = view.record.path / name
    for file in folder.iterdir() if folder.is_dir() else ():
        chunk, _, block = file.name.partition(".")
        if not (chunk.isdigit() and block.isdigit()):
            continue
        first_page, first_window = int(chunk) * size, int(block) * BLOCK_WINDOWS
        if (
            any(first_page < high and first_page + size > low for low, high in view.parts.ranges)
            and first_window < view.end
            and first_window + BLOCK_WINDOWS > view.first
        ):
            stored += file.stat().st_size
            n_chunks += 1
    return stored, n_chunks * size * 8
