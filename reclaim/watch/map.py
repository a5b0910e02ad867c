"""Memory as cells of a terminal: the pages of each cell, and its shade.

Cells run from left to right and from top to bottom. Each covers the same power of two of
pages, so that gfns at the left are round. Shades are distinct without colour; colours are
from the palette of 256 that nearly every terminal supports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from rich.style import Style
from rich.text import Text

__all__ = [
    "EVENT_MARKS",
    "Grid",
    "bar",
    "counts_of",
    "draw_changes",
    "draw_density",
    "event_mark",
    "sparkline",
]

#: The number of columns is a multiple of this.
_COLUMN_STEP = 16
_LABEL = 12
_SPARKS = "▁▂▃▄▅▆▇█"
#: Upper bound of the share of young pages: shade, colour.
_SHADES = (
    (0.02, "░", 24),
    (0.08, "░", 31),
    (0.2, "▒", 37),
    (0.4, "▒", 71),
    (0.65, "▓", 149),
    (0.9, "▓", 185),
    (1.0, "█", 226),
)
#: Cells with events: letter of the cause, or sign of a refault; colour.
EVENT_MARKS = {
    "evicted_daemon": ("D", 208),
    "evicted_limit": ("L", 220),
    "evicted_request": ("R", 48),
    "evicted_memory": ("M", 15),
    "refaulted": ("^", 207),
}
_BOTH = "x"
#: Cells without a young page, by what most of their pages are; else never touched.
_RESIDENT, _EVICTED = (":", 246), ("o", 172)
_CURSOR = Style(reverse=True)

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The cells of a map that begins at page ``start``."""

    start: int
    n_pages: int
    columns: int
    rows: int
    cell_pages: int

    @classmethod
    def fit(cls, width: int, height: int, n_pages: int, start: int = 0, zoom: int = 0) -> Grid:
        """Return a grid that fills a terminal; each zoom step halves the pages per cell.

        :param start: adjusted so that the cells cover as much memory as possible
        """
        columns = max((width - _LABEL) // _COLUMN_STEP * _COLUMN_STEP, _COLUMN_STEP)
        rows = max(height, 1)
        whole = cls.whole_bits(columns * rows, n_pages)
        pages = 1 << max(whole - zoom, 0)
        shown = columns * rows * pages
        row_pages = columns * pages
        last = max(-(-(n_pages - shown) // row_pages) * row_pages, 0)
        return cls(min(max(start, 0) // pages * pages, last), n_pages, columns, rows, pages)

    @staticmethod
    def whole_bits(cells: int, n_pages: int) -> int:
        """Return the zoom step at which a cell is one page."""
        return max(-(-n_pages // cells) - 1, 0).bit_length()

    @property
    def end(self) -> int:
        """One more than the last page that is shown."""
        return min(self.start + self.columns * self.rows * self.cell_pages, self.n_pages)

    def range_of(self, cell: int) -> tuple[int, int]:
        """Return the pages of a cell; empty beyond the end of memory."""
        first = min(self.start + cell * self.cell_pages, self.n_pages)
        return first, min(first + self.cell_pages, self.n_pages)

    def n_cells(self) -> int:
        """Return the number of cells that contain pages."""
        return -(-(self.end - self.start) // self.cell_pages)


def counts_of(mask: Mask, grid: Grid) -> Numbers:
    """Return the number of set pages in each cell."""
    part = mask[grid.start : grid.end]
    if not part.size:
        return np.zeros(0, dtype=np.int64)
    starts = np.arange(0, part.size, grid.cell_pages)
    return np.add.reduceat(part, starts, dtype=np.int64)


def draw_density(
    young: Mask,
    mapped: Mask,
    grid: Grid,
    cursor: int,
    states: tuple[Mask, Mask] | None = None,
    *,
    moved: Mapping[str, Mask] | None = None,
    gfn_at: Callable[[int], int] = int,
) -> Text:
    """Draw the share of young pages in each cell; holes in memory are blank.

    :param states: pages that are resident and that are evicted: a cell without a young page
        shows what most of its pages are
    :param moved: pages by event of :data:`EVENT_MARKS`: a cell with events shows them instead
    :param gfn_at: returns the gfn of a page of the map
    """
    counts, room = counts_of(young, grid), counts_of(mapped, grid)
    resident, evicted = (counts_of(mask, grid) for mask in states or (young, young))
    shares = counts / np.maximum(room, 1)
    events = {name: counts_of(mask, grid) for name, mask in (moved or {}).items()}

    def cell(at: int) -> tuple[str, int]:
        if not room[at]:
            return " ", 0
        if mark := event_mark({name: int(count[at]) for name, count in events.items()}):
            return mark
        if not counts[at]:
            most = max(
                int(resident[at]), int(evicted[at]), int(room[at] - resident[at] - evicted[at])
            )
            if states is not None and most == evicted[at]:
                return _EVICTED
            return _RESIDENT if states is not None and most == resident[at] else ("·", 238)
        share = float(shares[at])
        return next((shade, colour) for top, shade, colour in _SHADES if share <= top + 1e-9)

    return _draw([cell(at) for at in range(room.size)], grid, cursor, gfn_at)


def event_mark(counts: Mapping[str, int]) -> tuple[str, int] | None:
    """Return the mark of a cell with events: the most frequent cause, a refault, or both."""
    there = {name: count for name, count in counts.items() if count}
    causes = [name for name in there if name != "refaulted"]
    if not there:
        return None
    if causes and "refaulted" in there:
        return _BOTH, EVENT_MARKS["refaulted"][1]
    return EVENT_MARKS[max(causes or ["refaulted"], key=lambda name: there[name])]


def draw_changes(
    before: Mask,
    now: Mask,
    mapped: Mask,
    grid: Grid,
    cursor: int,
    gfn_at: Callable[[int], int] = int,
) -> Text:
    """Draw the cells with pages that became young (+) or are no longer young (-)."""
    came, went = counts_of(now & ~before, grid), counts_of(before & ~now, grid)
    same, room = counts_of(now & before, grid), counts_of(mapped, grid)

    def cell(at: int) -> tuple[str, int]:
        if not room[at]:
            return " ", 0
        if came[at] and went[at]:
            return "±", 185
        if came[at] or went[at]:
            strong = 4 * max(came[at], went[at]) >= room[at]
            return ("+", 82 if strong else 34) if came[at] else ("-", 203 if strong else 131)
        return ("=", 244) if same[at] else ("·", 238)

    return _draw([cell(at) for at in range(room.size)], grid, cursor, gfn_at)


def sparkline(values: list[int], width: int) -> str:
    """Return the last values as small bars, scaled from 0 to the largest."""
    shown = values[-width:]
    top = max(shown, default=0)
    if not top:
        return _SPARKS[0] * len(shown)
    return "".join(_SPARKS[min(int(value * 8 / top), 7)] for value in shown)


def bar(share: float, width: int) -> str:
    """Return a bar of whole and partial blocks."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    partial = " ▏▎▍▌▋▊▉"[eighths % 8]
    return ("█" * (eighths // 8) + partial)[:width].ljust(width)


def _draw(
    cells: list[tuple[str, int]], grid: Grid, cursor: int, gfn_at: Callable[[int], int]
) -> Text:
    """Arrange cells in rows, with runs of one colour merged."""
    text = Text(no_wrap=True, end="")
    for row in range(grid.rows):
        first = row * grid.columns
        part = cells[first : first + grid.columns]
        if not part:
            break
        gfn = gfn_at(grid.start + first * grid.cell_pages)
        text.append(f"{gfn:#{_LABEL - 2}x}  ", "color(245)")
        at = 0
        while at < len(part):
            end = at
            while end < len(part) and part[end][1] == part[at][1]:
                end += 1
            text.append("".join(shade for shade, _ in part[at:end]), f"color({part[at][1]})")
            at = end
        if first <= cursor < first + len(part):
            place = len(text.plain) - len(part) + cursor - first
            text.stylize(_CURSOR, place, place + 1)
        text.append("\n")
    return text
