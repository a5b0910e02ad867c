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
from kvmhost.reclaim.draw.heatmap import Heatmap, HeatmapLayers
from kvmhost.reclaim.draw.heatmapdata import RecordView, heatmap_of
from kvmhost.units import PAGE_BYTES, size_text

__all__ = ["PICTURE_KINDS", "draw_record", "need_plotting", "render_heatmap"]

#: A gamma below 1 makes a page that was touched once distinct from an untouched page.
_GAMMA = 0.45
#: Suffixes of files that can be drawn.
PICTURE_KINDS = (".png", ".svg", ".pdf")
_GAP_COLOUR = "0.55"
#: Backgrounds of bins by what most of their pages are, and the codes of other cells. Blue on grey
#: and orange is distinct for every kind of colour vision.
_STATE_COLOURS = {"never touched": "#ffffff", "resident": "#dadada", "evicted": "#fdc68a"}
_UNKNOWN_STATE, _GAP_STATE = 3, 4
#: Evictions and refaults on the map: marker, colour, shift in its cell.
_MARKS = {"evictions": ("v", "#8c3a00", -0.2), "refaults": ("^", "#d40f7d", 0.2)}
_MARK_COLUMNS, _MARK_ROWS = 96, 40
#: Lines of events: label, colour, style.
_EVENT_LINES = {
    "evicted_daemon": ("evicted by the daemon", "#8c3a00", "-"),
    "evicted_limit": ("at the limit", "#e08214", "--"),
    "evicted_request": ("on request", "#5aae61", "-."),
    "evicted_memory": ("no memory on the host", "#000000", ":"),
    "refaulted": ("refaulted", "#d40f7d", "-"),
}
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
    layered = heatmap.layers is not None
    picture = figure.Figure(figsize=(12, 8.5 if layered else 8), dpi=120, layout="constrained")
    heights = [1.1, 6, 1.3] if layered else [1.1, 6]
    curve, axes, *below = picture.subplots(
        len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    axes.set_facecolor("white")
    _draw_curve(curve, heatmap)
    mesh = _draw_mesh(axes, heatmap, matplotlib.colormaps, colors)
    # Names come from guests and files: nothing in them is markup.
    curve.set_title(_plain(heatmap.title), parse_math=False, fontsize=13, loc="left")
    if heatmap.caption:
        caption = textwrap.fill(_plain(heatmap.caption), 150)
        picture.supxlabel(caption, fontsize=8, color="0.35", parse_math=False)
    _label_times(below[0] if below else axes, heatmap, ticker)
    axes.set_ylabel("guest frame number")
    _label_gfns(axes, heatmap, ticker)
    _outline_slots(axes, heatmap)
    _draw_cuts(axes, heatmap)
    _draw_marks(axes, heatmap)
    if heatmap.layers is not None:
        _draw_events(below[0], heatmap, heatmap.layers)
        _draw_moved(axes, heatmap, heatmap.layers)
        _draw_legend(axes, heatmap.layers)
    _label_addresses(axes, heatmap, ticker)
    bar = picture.colorbar(mesh, ax=axes, pad=0.02, extend="min")
    pages = int(np.diff(heatmap.edges).max())
    bins = f"bins of {pages:,} pages" if pages > 1 else "page by page"
    none = "white: none" if heatmap.layers is None else "none: where most pages are"
    bar.set_label(f"share of pages young in the window, {bins} ({none})")
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
    """Draw each window with a width proportional to its length; gaps are hatched.

    Under the young pages, the background shows where most pages of a bin are.
    """
    times, shares = _with_gaps(heatmap, heatmap.columns)
    colormap = colormaps["viridis_r"].with_extremes(bad=_GAP_COLOUR, under="white")
    norm = colors.PowerNorm(_GAMMA, vmin=0.0005, vmax=1.0)
    if heatmap.layers is not None:
        _draw_states(axes, heatmap, heatmap.layers, colors)
        blues = colormaps["Blues"](np.linspace(0.45, 1.0, 256))
        colormap = colors.ListedColormap(blues).with_extremes(bad=(0, 0, 0, 0), under=(0, 0, 0, 0))
    return axes.pcolormesh(
        times,
        heatmap.gfn_start + heatmap.edges,
        np.ma.masked_invalid(shares),
        cmap=colormap,
        norm=norm,
        shading="flat",
        rasterized=True,
    )


def _with_gaps(
    heatmap: Heatmap, values: list[npt.NDArray[np.float32]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Return the edges of columns in seconds, and the columns with NaN for each gap."""
    zero = heatmap.windows_ns[0][0]
    times: list[float] = [0.0]
    columns: list[npt.NDArray[np.float32]] = []
    gap = np.full(heatmap.edges.size - 1, np.nan, dtype=np.float32)
    for (start, end), column in zip(heatmap.windows_ns, values, strict=True):
        if start > times[-1] * 1e9 + zero + 1:
            columns.append(gap)
            times.append((start - zero) / 1e9)
        columns.append(column)
        times.append((end - zero) / 1e9)
    return np.array(times), np.stack(columns, axis=1)


def _draw_states(axes: Any, heatmap: Heatmap, layers: HeatmapLayers, colors: Any) -> None:
    """Draw what most pages of each bin are: never touched, resident or evicted."""
    times, resident = _with_gaps(heatmap, layers.resident)
    _, evicted = _with_gaps(heatmap, layers.evicted)
    _, young = _with_gaps(heatmap, heatmap.columns)
    never = 1 - resident - evicted
    state = np.argmax(np.nan_to_num(np.stack([never, resident, evicted])), axis=0).astype(float)
    state[np.isnan(resident)] = _UNKNOWN_STATE
    state[np.isnan(young)] = _GAP_STATE
    palette = colors.ListedColormap([*_STATE_COLOURS.values(), "white", _GAP_COLOUR])
    axes.pcolormesh(
        times, heatmap.gfn_start + heatmap.edges, state, cmap=palette, vmin=-0.5,
        vmax=_GAP_STATE + 0.5, shading="flat", rasterized=True,
    )  # fmt: skip


def _draw_moved(axes: Any, heatmap: Heatmap, layers: HeatmapLayers) -> None:
    """Mark where pages were evicted and refaulted, on a grid of a few marks an inch."""
    zero, end = heatmap.windows_ns[0][0], heatmap.windows_ns[-1][1]
    middles = np.array([(a + b) / 2 - zero for a, b in heatmap.windows_ns]) / 1e9
    column = np.minimum(middles / max((end - zero) / 1e9, 1e-9) * _MARK_COLUMNS, _MARK_COLUMNS - 1)
    bins = (heatmap.edges[:-1] + heatmap.edges[1:]) / 2
    row = np.minimum(bins / heatmap.n_pages * _MARK_ROWS, _MARK_ROWS - 1)
    for name, (marker, colour, shift) in _MARKS.items():
        counts = np.zeros((_MARK_ROWS, _MARK_COLUMNS))
        for at, pages in zip(column.astype(int), layers.moved[name], strict=True):
            np.add.at(counts[:, at], row.astype(int), pages)
        rows, columns = np.nonzero(counts)
        if not rows.size:
            continue
        sizes = 3 + 22 * np.sqrt(counts[rows, columns] / counts.max())
        axes.scatter(
            (columns + 0.5 + shift) * (end - zero) / 1e9 / _MARK_COLUMNS,
            heatmap.gfn_start + (rows + 0.5) * heatmap.n_pages / _MARK_ROWS,
            s=sizes, marker=marker, color=colour, edgecolors="white", linewidths=0.3, zorder=3,
        )  # fmt: skip


def _draw_legend(axes: Any, layers: HeatmapLayers) -> None:
    from matplotlib import lines, patches

    handles: list[Any] = [
        patches.Patch(facecolor=colour, edgecolor="0.6", label=name)
        for name, colour in _STATE_COLOURS.items()
    ]
    handles += [
        lines.Line2D([], [], marker=marker, color=colour, linestyle="none", label=name)
        for name, (marker, colour, _) in _MARKS.items()
        if any(pages.any() for pages in layers.moved[name])
    ]
    axes.legend(handles=handles, loc="upper right", fontsize=7, ncols=len(handles), framealpha=0.9)


def _steps(heatmap: Heatmap, values: npt.NDArray[np.float64]) -> tuple[Any, Any]:
    """Return a curve of steps: NaN in gaps."""
    zero = heatmap.windows_ns[0][0]
    times: list[float] = []
    shown: list[float] = []
    for (start, end), value in zip(heatmap.windows_ns, values.tolist(), strict=True):
        if times and start > times[-1] * 1e9 + zero + 1:
            times.append(times[-1])
            shown.append(float("nan"))
        times += [(start - zero) / 1e9, (end - zero) / 1e9]
        shown += [value, value]
    return times, shown


def _draw_curve(axes: Any, heatmap: Heatmap) -> None:
    """Draw the working set, and what was resident, over time."""
    size = 2**20 / PAGE_BYTES
    axes.fill_between(
        *_steps(heatmap, heatmap.young_pages() / size), color="#2171b5", alpha=0.8, linewidth=0,
        label="young",
    )  # fmt: skip
    if heatmap.layers is not None:
        pages = np.array(
            [float((column * np.diff(heatmap.edges)).sum()) for column in heatmap.layers.resident]
        )
        axes.plot(*_steps(heatmap, pages / size), color="0.35", linewidth=1, label="resident")
        axes.legend(loc="upper right", fontsize=7, ncols=2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("working\nset (MiB)", fontsize=8)
    axes.tick_params(labelsize=8)


def _draw_events(axes: Any, heatmap: Heatmap, layers: HeatmapLayers) -> None:
    """Draw evictions by whose decision, and refaults, per second."""
    lengths = np.array([max(end - start, 1) / 1e9 for start, end in heatmap.windows_ns])
    for name, (label, colour, style) in _EVENT_LINES.items():
        counts = np.array(layers.events[name], dtype=np.float64)
        if counts.any():
            axes.plot(
                *_steps(heatmap, counts / lengths), color=colour, linestyle=style, linewidth=1.1,
                label=label,
            )  # fmt: skip
    if axes.lines:
        axes.legend(loc="upper right", fontsize=7, ncols=4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("pages\na second", fontsize=8)
    axes.tick_params(labelsize=8)


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
    axes.yaxis.set_major_locator(ticker.FixedLocator([y for y, _ in _ticks(heatmap)]))
    names = [f"{gfn:#x}" for _, gfn in _ticks(heatmap)]
    axes.yaxis.set_major_formatter(ticker.FixedFormatter(names))
    axes.set_ylim(heatmap.gfn_start, heatmap.gfn_start + heatmap.n_pages)


def _label_addresses(axes: Any, heatmap: Heatmap, ticker: Any) -> None:
    """Label the same places with addresses, on the right."""
    unit, size = ("GiB", 2**30) if heatmap.gfns.high >= 1 << 21 else ("MiB", 2**20)
    other = axes.secondary_yaxis(1.0)
    other.yaxis.set_major_locator(ticker.FixedLocator([y for y, _ in _ticks(heatmap)]))
    names = [f"{gfn * PAGE_BYTES / size:.6g}" for _, gfn in _ticks(heatmap)]
    other.yaxis.set_major_formatter(ticker.FixedFormatter(names))
    other.set_ylabel(f"guest physical address ({unit})")


def _ticks(heatmap: Heatmap) -> list[tuple[int, int]]:
    """Return (place on the axis, gfn) of round gfns, and of the first gfn behind each cut."""
    step = 1
    while heatmap.n_pages / step > 12:
        step *= 2
    found: list[tuple[int, int]] = []
    for low, high in heatmap.ranges:
        at = heatmap.gfn_start + heatmap.gfns.position_of(low)
        end = high + 1 if high == heatmap.gfns.high else high
        round_gfns = range(-(-low // step) * step, end, step)
        first = [] if low in round_gfns or len(heatmap.ranges) == 1 else [low]
        for gfn in (*first, *round_gfns):
            y = at + gfn - low
            # A label needs its room, also where parts are short.
            if not found or y - found[-1][0] >= 0.6 * step or len(heatmap.ranges) == 1:
                found.append((y, gfn))
    return found


def _y_of(heatmap: Heatmap, gfn: int) -> int:
    """Return the place of a gfn on the axis: the gfn itself if nothing is left out."""
    return heatmap.gfn_start + heatmap.gfns.position_of(gfn)


def _draw_cuts(axes: Any, heatmap: Heatmap) -> None:
    """Mark where pages are left out."""
    for position, n_pages in heatmap.gfns.cuts():
        y = heatmap.gfn_start + position
        axes.axhline(y, color="white", linewidth=5, zorder=4)
        axes.axhline(y, color="0.3", linewidth=1, linestyle=(0, (1, 2)), zorder=4)
        axes.annotate(
            f"{size_text(n_pages * PAGE_BYTES)} without a young page left out", (0.5, y),
            xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=7, color="0.3",
            bbox={"boxstyle": "square,pad=0.2", "fc": "white", "ec": "none"}, zorder=5,
        )  # fmt: skip


def _outline_slots(axes: Any, heatmap: Heatmap) -> None:
    """Draw the edges of memslots, and their names where there is room."""
    low, high = heatmap.gfn_start, heatmap.gfn_start + heatmap.n_pages
    for slot, start, stop in heatmap.slots:
        first, end = _y_of(heatmap, start), _y_of(heatmap, stop)
        for y in (first, end):
            if low < y < high:
                axes.axhline(y, color="#c2410c", linewidth=0.8, alpha=0.8)
        if end - first > heatmap.n_pages / 40:
            axes.annotate(
                f"slot {slot}", (0, end), xycoords=("axes fraction", "data"),
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
