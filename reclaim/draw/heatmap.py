"""Heatmaps of young bitmaps, gfn by time: the shares of young pages in bins of gfns.

A bitmap is reduced to equal bins of gfns when it is added, so that a long observation
of a large guest takes little memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import LayoutError
from kvmhost.reclaim.draw.parts import PageParts

__all__ = ["Heatmap", "HeatmapLayers", "HeatmapMark", "bin_edges", "bin_shares"]

_NO_EDGES = np.zeros(0, dtype=np.int64)


def bin_edges(n_pages: int, n_bins: int) -> npt.NDArray[np.int64]:
    """Return the first page of each bin, and ``n_pages``: shape ``(bins + 1,)``.

    :param n_bins: maximum number of bins, limited to the number of pages
    :raises LayoutError: unless both are 1 or more
    """
    if n_pages < 1 or n_bins < 1:
        raise LayoutError(f"{n_bins} bins of {n_pages} pages: need one or more of both")
    bins = min(n_bins, n_pages)
    return np.arange(bins + 1, dtype=np.int64) * n_pages // bins


def bin_shares(
    young: npt.NDArray[np.bool_], edges: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return the share of young pages in each bin, from 0 to 1."""
    counts = np.add.reduceat(young, edges[:-1], dtype=np.int64)
    return (counts / np.diff(edges)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class HeatmapMark:
    """An event before the start of a window, to mark on the time axis."""

    time_s: float
    window: int
    text: str


@dataclasses.dataclass
class HeatmapLayers:
    """Where pages were and what happened to them, column by column of a heatmap.

    Shares are per bin, from 0 to 1; NaN where residency was not recorded.

    :param resident: share of pages resident at the end of the windows
    :param evicted: share of pages evicted at the end of the windows
    :param moved: by ``evictions`` and ``refaults``: pages per bin that had the event
    :param events: by event: how often it happened in each column
    """

    resident: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)
    evicted: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)
    moved: dict[str, list[npt.NDArray[np.int64]]] = dataclasses.field(default_factory=dict)
    events: dict[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Heatmap:
    """Windows of one VM in time order, reduced to bins.

    Times are ``CLOCK_MONOTONIC``.

    :param slots: (slot, first gfn, end) of the memslots to outline
    :param marks: marks on the time axis, in seconds from the start of the first window
    :param edges: the first page of each bin, and ``n_pages``; None: equal bins
    :param layers: None: residency is unknown
    :param ranges: ``[start, end)`` of gfns that are shown one after the other; none: all from
        ``gfn_start`` on
    """

    gfn_start: int
    n_pages: int
    n_bins: int = 512
    title: str = "pages touched"
    caption: str = ""
    slots: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    marks: list[HeatmapMark] = dataclasses.field(default_factory=list)
    edges: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: _NO_EDGES)
    columns: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)
    windows_ns: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    layers: HeatmapLayers | None = None
    ranges: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        end = self.gfn_start + self.n_pages
        return (
            f"Heatmap({self.title!r}, {len(self.columns)} windows, "
            f"gfns [{self.gfn_start:#x}, {end:#x}) in {len(self.edges) - 1} bins)"
        )

    def __post_init__(self) -> None:
        if not self.edges.size:
            self.edges = bin_edges(self.n_pages, self.n_bins)
        if not self.ranges:
            self.ranges = [(self.gfn_start, self.gfn_start + self.n_pages)]

    @property
    def gfns(self) -> PageParts:
        """Gfns and their positions in the picture."""
        return PageParts(tuple(self.ranges))

    def add(self, bitmap: YoungBitmap, start_ns: int, end_ns: int) -> None:
        """Add one window.

        :raises LayoutError: if the bitmap has another range, or the window is empty or
            begins before the last one ended
        """
        if (bitmap.gfn_start, bitmap.n_pages) != (self.gfn_start, self.n_pages):
            raise LayoutError(f"heatmap: {bitmap!r} has another range")
        if end_ns <= start_ns or (self.windows_ns and start_ns < self.windows_ns[-1][1]):
            raise LayoutError(f"heatmap: window [{start_ns}, {end_ns}) ns is out of order")
        self.columns.append(bin_shares(bitmap.as_bool(), self.edges))
        self.windows_ns.append((start_ns, end_ns))

    def young_pages(self) -> npt.NDArray[np.float64]:
        """Return shape ``(windows,)``: the working set of each column, its young pages."""
        sizes = np.diff(self.edges)
        return np.array([float((column * sizes).sum()) for column in self.columns])

    def shares(self) -> npt.NDArray[np.float32]:
        """Return shape ``(bins, windows)``."""
        return np.stack(self.columns, axis=1)
