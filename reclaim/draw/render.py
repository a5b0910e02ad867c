"""Draw a heatmap to a PNG, SVG or PDF file. matplotlib is imported only to draw."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.files import replacing
from kvmhost.installing import install_hint
from kvmhost.reclaim.draw.heatmap import Heatmap
from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of
from kvmhost.units import PAGE_BYTES

__all__ = ["PICTURE_KINDS", "draw_record", "need_plotting", "render_heatmap"]

#: A gamma below 1 makes a page that was touched once distinct from an untouched page.
_GAMMA = 0.45
#: Suffixes of files that can be drawn.
PICTURE_KINDS = (".png", ".svg", ".pdf")
_GAP_COLOUR = "0.88"
#: Limits on marks per picture and characters per line; the first character that not
#: every font has.
_MOST_MARKS, _MOST_TEXT, _FIRST_UNSUPPORTED = 200, 400, 0x250


def need_plotting() -> None:
    """Check that pictures can be drawn.

    :raises CapabilityError: without matplotlib
    """
    _matplotlib()


def draw_record(view: RecordView, path: Path, n_bins: int = 512) -> str:
    """Draw a view of a record; return a line about the picture.

    :param n_bins: maximum number of rows
    :raises CapabilityError: without matplotlib
    :raises HostError: if the file cannot be written
    """
    render_heatmap(heatmap_of(view, n_bins), path)
    return f"{view.n_windows} windows of {view.record.name or view.record.path}"


def render_heatmap(heatmap: Heatmap, path: Path) -> None:
    """Draw to a file; its suffix says which kind (``.png``, ``.svg``, ``.pdf``).

    :raises LayoutError: if there is no window, or no such kind of file
    :raises CapabilityError: without matplotlib
    :raises HostError: if the file cannot be written
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
        1.0, functions=(lambda gfn: gfn * PAGE_BYTES / size, lambda m: m * size / PAGE_BYTES)
    )
    other.set_ylabel(f"guest physical address ({unit})")
    bar = picture.colorbar(mesh, ax=axes, pad=0.02, extend="min")
    pages = int(np.diff(heatmap.edges).max())
    bins = f"bins of {pages:,} pages" if pages > 1 else "page by page"
    bar.set_label(f"share of pages young in the window, {bins} (white: none)")
    bar.set_ticks([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0])
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    with replacing(path) as file:
        picture.savefig(file, format=kind[1:])


def _matplotlib() -> tuple[Any, Any, Any, Any]:
    try:
        import matplotlib
        from matplotlib import colors, figure, ticker
    except ImportError as error:
        raise CapabilityError(
            "plot",
            "matplotlib",
            str(error),
            install_hint("plot"),
        ) from error
    return matplotlib, colors, figure, ticker


def _draw_mesh(axes: Any, heatmap: Heatmap, colormaps: Any, colors: Any) -> Any:
    """Draw each window with a width proportional to its length; gaps are grey."""
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
    """Label the time axis in seconds, minutes or hours, depending on its length."""
    # Times of a damaged record may go backwards: there has to be an axis all the same.
    length_s = max((heatmap.windows_ns[-1][1] - heatmap.windows_ns[0][0]) / 1e9, 1e-9)
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
    """Label round gfns in hexadecimal."""
    step = 1
    while heatmap.n_pages / step > 12:
        step *= 2
    axes.yaxis.set_major_locator(ticker.MultipleLocator(step))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda gfn, _: f"{int(gfn):#x}"))
    axes.set_ylim(heatmap.gfn_start, heatmap.gfn_start + heatmap.n_pages)


def _outline_slots(axes: Any, heatmap: Heatmap) -> None:
    """Draw the edges of memslots, and their names where there is room."""
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
    """Draw gaps, clock jumps and changes as lines, with labels where there is room."""
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
    """Return text limited in length, without control characters or missing glyphs."""
    shown = "".join(c if c.isprintable() and ord(c) < _FIRST_UNSUPPORTED else "?" for c in text)
    return shown if len(shown) <= _MOST_TEXT else shown[: _MOST_TEXT - 3] + "..."
