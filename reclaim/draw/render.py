"""Pictures of young bitmaps, gfn by time: harvested live here, or out of a record.

A bitmap is reduced to shares of young pages in equal bins of gfns as it comes in,
so that a long observation of a large guest takes little memory. matplotlib is
imported only to draw.
"""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvmhost.errors import CapabilityError, LayoutError, VmGoneError
from kvmhost.reclaim.young.bitmap import YoungBitmap

__all__ = [
    "PICTURE_KINDS",
    "Heatmap",
    "Mark",
    "Source",
    "bin_edges",
    "bin_shares",
    "need_plotting",
    "record_live",
    "render_heatmap",
]

_PAGE_BYTES = 4096
#: Low shares are what tells a cold page that was touched once from one that was not.
_GAMMA = 0.45
#: Suffixes of files that can be drawn.
PICTURE_KINDS = (".png", ".svg", ".pdf")
_GAP_COLOUR = "0.88"
#: Lines in a picture, letters in a line of it; letters above have no glyph everywhere.
_MOST_MARKS, _MOST_TEXT, _FIRST_ODD = 200, 400, 0x250
_NO_EDGES = np.zeros(0, dtype=np.int64)


def bin_edges(n_pages: int, n_bins: int) -> npt.NDArray[np.int64]:
    """Return the first page of each bin, and ``n_pages``: shape ``(bins + 1,)``.

    :param n_bins: at most so many; never more than pages
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
class Mark:
    """Something that happened before a window began, for the time axis."""

    time_s: float
    window: int
    text: str


@dataclasses.dataclass
class Heatmap:
    """Windows of one VM, reduced to bins, in the order in which they came.

    Times are ``CLOCK_MONOTONIC``.

    :param slots: (slot, first gfn, end) of the memslots, to be outlined
    :param marks: of the time axis, in seconds from the first window's start
    :param edges: the first page of each bin, and ``n_pages``; None: equal bins
    """

    gfn_start: int
    n_pages: int
    n_bins: int = 512
    title: str = "pages touched"
    caption: str = ""
    slots: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    marks: list[Mark] = dataclasses.field(default_factory=list)
    edges: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: _NO_EDGES)
    columns: list[npt.NDArray[np.float32]] = dataclasses.field(default_factory=list)
    windows_ns: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.edges.size:
            self.edges = bin_edges(self.n_pages, self.n_bins)

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

    def shares(self) -> npt.NDArray[np.float32]:
        """Return shape ``(bins, windows)``."""
        return np.stack(self.columns, axis=1)


class _State(Protocol):
    @property
    def image(self) -> str: ...


class Source(Protocol):
    """What is harvested: a VM's :class:`~kvmhost.control.client.Client`, or a process."""

    vm: str

    def state(self) -> _State:
        """Say which image or program it runs."""

    def harvest(
        self, gfn_start: int = 0, n_pages: int | None = None, *, tracker: str = "auto"
    ) -> YoungBitmap:
        """Return the young pages, and begin a new window for them."""


def record_live(
    client: Source,
    *,
    interval_s: float = 0.1,
    count: int = 120,
    tracker: str = "auto",
    gfn_start: int = 0,
    n_pages: int | None = None,
    n_bins: int = 512,
    on_window: Callable[[], None] = lambda: None,
) -> Heatmap:
    """Harvest a VM window by window; its end, or an interrupt, ends the recording too.

    The harvests clear, so that whoever else harvests the VM sees less meanwhile.

    :param n_pages: None: to the end of memory
    :param on_window: called after each window
    :raises VmGoneError: if the VM is gone before the first window has ended
    :raises ControlError: if the VM refuses to be harvested
    """
    image = Path(client.state().image).stem
    bitmap = client.harvest(gfn_start, n_pages, tracker=tracker)
    begin_ns = end_ns = time.monotonic_ns()
    source = bitmap.provenance
    heatmap = Heatmap(gfn_start, bitmap.n_pages, n_bins)
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(1, count + 1):
            # Measured from the start: a late window does not make all others late.
            time.sleep(max(0.0, begin_ns / 1e9 + number * interval_s - time.monotonic()))
            try:
                bitmap = client.harvest(gfn_start, bitmap.n_pages, tracker=source.tracker)
            except VmGoneError:
                break
            start_ns, end_ns = end_ns, time.monotonic_ns()
            heatmap.add(bitmap, start_ns, end_ns)
            on_window()
    if not heatmap.columns:
        raise VmGoneError(client.vm, "gone before the first window ended")
    heatmap.title = (
        f"VM {client.vm} ({image}): pages touched, by {source.tracker} "
        f"({source.table_format}), {len(heatmap.columns)} windows of {interval_s:g} s"
    )
    return heatmap


def need_plotting() -> None:
    """Do nothing where pictures can be drawn.

    :raises CapabilityError: without matplotlib
    """
    _matplotlib()


def render_heatmap(heatmap: Heatmap, path: Path) -> None:
    """Draw to a file; its suffix says which kind (``.png``, ``.svg``, ``.pdf``).

    :raises LayoutError: if there is no window, or no such kind of file
    :raises CapabilityError: without matplotlib
    :raises OSError: if the file cannot be written
    """
    if not heatmap.columns:
        raise LayoutError("heatmap: no window to draw")
    kind = path.suffix.lower()
    if kind not in PICTURE_KINDS:
        raise LayoutError(f"{path}: the name must end in {', '.join(PICTURE_KINDS)}")
    matplotlib, colors, figure, ticker = _matplotlib()
    picture = figure.Figure(figsize=(12, 7), dpi=120, layout="constrained")
    axes = picture.add_subplot()
    axes.set_facecolor("white")
    mesh = _draw_mesh(axes, heatmap, matplotlib.colormaps, colors)
    # Names come from guests and files: nothing in them is markup.
    axes.set_title(_plain(heatmap.title), parse_math=False, fontsize=13, loc="left", pad=14)
    if heatmap.caption:
        caption = textwrap.fill(_plain(heatmap.caption), 150)
        picture.supxlabel(caption, fontsize=8, color="0.35", parse_math=False)
    _label_times(axes, heatmap, ticker)
    axes.set_ylabel("guest frame number")
    _label_gfns(axes, heatmap, ticker)
    _outline_slots(axes, heatmap)
    _draw_marks(axes, heatmap)
    unit, size = ("GiB", 2**30) if heatmap.n_pages >= 1 << 21 else ("MiB", 2**20)
    other = axes.secondary_yaxis(
        1.0, functions=(lambda gfn: gfn * _PAGE_BYTES / size, lambda m: m * size / _PAGE_BYTES)
    )
    other.set_ylabel(f"guest physical address ({unit})")
    bar = picture.colorbar(mesh, ax=axes, pad=0.02, extend="min")
    pages = int(np.diff(heatmap.edges).max())
    bins = f"bins of {pages:,} pages" if pages > 1 else "page by page"
    bar.set_label(f"share of pages young in the window, {bins} (white: none)")
    bar.set_ticks([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0])
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    picture.savefig(path, format=kind[1:])


def _matplotlib() -> tuple[Any, Any, Any, Any]:
    try:
        import matplotlib
        from matplotlib import colors, figure, ticker
    except ImportError as error:
        raise CapabilityError(
            "plot",
            "matplotlib",
            str(error),
            'install the plot extra: pip install "kvmhost[plot]"',
        ) from error
    return matplotlib, colors, figure, ticker


def _draw_mesh(axes: Any, heatmap: Heatmap, colormaps: Any, colors: Any) -> Any:
    """Draw each window as wide as it lasted; gaps between windows stay grey."""
    zero = heatmap.windows_ns[0][0]
    times: list[float] = []
    columns: list[npt.NDArray[np.float32]] = []
    gap = np.full(heatmap.edges.size - 1, np.nan, dtype=np.float32)
    for (start, end), column in zip(heatmap.windows_ns, heatmap.columns, strict=True):
        if times and start > times[-1] * 1e9 + zero + 1:
            columns.append(gap)
            times.append((start - zero) / 1e9)
        elif not times:
            times.append((start - zero) / 1e9)
        columns.append(column)
        times.append((end - zero) / 1e9)
    shares = np.ma.masked_invalid(np.stack(columns, axis=1))
    colormap = colormaps["viridis_r"].with_extremes(bad=_GAP_COLOUR, under="white")
    norm = colors.PowerNorm(_GAMMA, vmin=0.0005, vmax=1.0)
    return axes.pcolormesh(
        np.array(times),
        heatmap.gfn_start + heatmap.edges,
        shares,
        cmap=colormap,
        norm=norm,
        shading="flat",
        rasterized=True,
    )


def _label_times(axes: Any, heatmap: Heatmap, ticker: Any) -> None:
    """Count in seconds, minutes or hours, whichever gives small numbers."""
    length_s = (heatmap.windows_ns[-1][1] - heatmap.windows_ns[0][0]) / 1e9
    unit, size = next(
        (unit, size)
        for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0))
        if length_s >= 3 * size or unit == "s"
    )
    axes.set_xlabel(f"time ({unit})")
    step = next(
        base * 10**power
        for power in range(-9, 12)
        for base in (1, 2, 5)
        if length_s / size <= 10 * base * 10**power
    )
    axes.xaxis.set_major_locator(ticker.MultipleLocator(step * size))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda s, _: f"{s / size:.6g}"))
    axes.set_xlim(0, length_s)


def _label_gfns(axes: Any, heatmap: Heatmap, ticker: Any) -> None:
    """Put hex labels at round gfns."""
    step = 1
    while heatmap.n_pages / step > 12:
        step *= 2
    axes.yaxis.set_major_locator(ticker.MultipleLocator(step))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda gfn, _: f"{int(gfn):#x}"))
    axes.set_ylim(heatmap.gfn_start, heatmap.gfn_start + heatmap.n_pages)


def _outline_slots(axes: Any, heatmap: Heatmap) -> None:
    """Draw where memslots begin and end, and name them where there is room."""
    low, high = heatmap.gfn_start, heatmap.gfn_start + heatmap.n_pages
    for slot, first, end in heatmap.slots:
        for gfn in (first, end):
            if low < gfn < high:
                axes.axhline(gfn, color="#c2410c", linewidth=0.8, alpha=0.8)
        if min(end, high) - max(first, low) > heatmap.n_pages / 40:
            axes.annotate(
                f"slot {slot}", (0, min(end, high)), xycoords=("axes fraction", "data"),
                xytext=(4, -3), textcoords="offset points", va="top", fontsize=8,
                color="#c2410c", bbox={"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none",
                                       "alpha": 0.75},
            )  # fmt: skip


def _draw_marks(axes: Any, heatmap: Heatmap) -> None:
    """Draw gaps, clock jumps and changes as lines, named above while they have room."""
    length_s = (heatmap.windows_ns[-1][1] - heatmap.windows_ns[0][0]) / 1e9
    free_from = 0.0
    for mark in heatmap.marks[:_MOST_MARKS]:
        axes.axvline(mark.time_s, color="0.3", linewidth=0.8, linestyle=(0, (4, 3)))
        if mark.time_s >= free_from:
            axes.annotate(
                _plain(mark.text), (mark.time_s, 1.0), xycoords=("data", "axes fraction"),
                xytext=(0, 3), textcoords="offset points", fontsize=7, color="0.3",
                ha="left", parse_math=False,
            )  # fmt: skip
            free_from = mark.time_s + length_s * (0.02 + 0.007 * len(mark.text))


def _plain(text: str) -> str:
    """Return text without what has no glyph, no end, or a meaning for the terminal."""
    shown = "".join(c if c.isprintable() and ord(c) < _FIRST_ODD else "?" for c in text)
    return shown if len(shown) <= _MOST_TEXT else shown[: _MOST_TEXT - 3] + "..."
