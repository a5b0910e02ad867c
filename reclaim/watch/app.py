"""The live view in a terminal, on textual: map, working set, generations, pressure.

The view is drawn on each tick and each key, and at no other time. It measures its own
processor time and ticks less often when it exceeds its share.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.screen import ModalScreen
from textual.widgets import Static

from kvmhost.errors import CapabilityError, ControlError, InUseError, KvmHostError, VmGoneError
from kvmhost.printable import printable
from kvmhost.reclaim.draw.parts import PageParts
from kvmhost.reclaim.watch.data import RECENT, SHOWN_EVENTS, Mask, Sample, WatchSampler
from kvmhost.reclaim.watch.map import (
    EVENT_MARKS,
    Grid,
    bar,
    draw_changes,
    draw_density,
    sparkline,
)
from kvmhost.reclaim.watch.pace import LONGEST_S, MOST_SHARE, Pace
from kvmhost.units import PAGE_BYTES, size_text

__all__ = ["MOST_SHARE", "Pace", "WatchApp"]

_RETRY_S = 2.0
_KEYS = "arrows  + - zoom  space pause  m mark  v view  e events  u used  ? help  q quit"
_CAUSES = {
    "evicted_daemon": "daemon",
    "evicted_limit": "limit",
    "evicted_request": "request",
    "evicted_memory": "no memory",
}
_HELP = """\
Each cell is a range of guest pages, row by row. Its shade shows the
share of its pages that are young:
  ░ up to 8 %   ▒ up to 40 %   ▓ up to 90 %   █ nearly all
or, where none is young, what most pages are:
  · never touched   : resident   o evicted
or what happened there in this tick (e switches that off):
  D L R M evicted: by the daemon, at the limit, on request, no memory
  ^ refaulted   x both
arrows     move the cursor, and scroll at the edges
PgUp PgDn  scroll by a screen
+ - 0      zoom in at the cursor, down to single pages; out; all
space p    pause or resume; nothing is harvested while paused
v          young in this window, or in the last 10
m          mark the young pages, show changes since; m again ends it
             + became young  - no longer  ± both  = as before
u          the used parts of a mostly idle memory, or all of it
t T        the next tracker; T also while others read, until this ends
q Ctrl-C   quit

Each tick is a window of its own, whatever else reads the VM. Below:
a daemon's generations, or pages by ticks since they were young.
                                            any key closes this"""


class _Help(ModalScreen[None]):
    """The help screen."""

    CSS = """
    _Help { align: center middle; }
    #help { width: 74; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
            border: round $accent; background: $surface; }
    """

    def compose(self) -> ComposeResult:
        """Show the help text."""
        with VerticalScroll(id="help"):
            yield Static(Text(_HELP))

    def on_key(self) -> None:
        """Close on any key; keys typed ahead may still arrive here."""
        if self.is_current:
            self.dismiss()


class WatchApp(App[None]):
    """The view of one VM."""

    TITLE = "kvmhost young watch"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: ansi_default; }
    #head { height: 1; background: $primary-background; color: $text; }
    #map { height: 1fr; padding: 0 1; }
    #cell { height: 1; padding: 0 1; }
    #figures { height: 5; padding: 0 1; }
    #keys { height: 1; background: $primary-background; color: $text; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c,ctrl+q", "quit", "quit", priority=True),
        Binding("space,p", "pause", "pause"),
        Binding("plus,enter,equals_sign", "zoom(1)", "in"),
        Binding("minus,underscore", "zoom(-1)", "out"),
        Binding("0,home", "all", "all"),
        Binding("left", "move(-1, 0)", "left"),
        Binding("right", "move(1, 0)", "right"),
        Binding("up", "move(0, -1)", "up"),
        Binding("down", "move(0, 1)", "down"),
        Binding("pageup", "scroll(-1)", "screen up"),
        Binding("pagedown", "scroll(1)", "screen down"),
        Binding("m", "mark", "mark"),
        Binding("v", "view", "view"),
        Binding("e", "events", "events"),
        Binding("u", "used", "used"),
        Binding("t", "tracker", "tracker"),
        Binding("T", "tracker(True)", "force tracker"),
        Binding("question_mark,h,f1", "help", "help"),
    ]

    def __init__(self, sampler: WatchSampler, interval_s: float = 1.0) -> None:
        super().__init__()
        self.animation_level = "none"
        self.sampler, self.pace = sampler, Pace(interval_s)
        self.sample: Sample | None = None
        self.mark: npt.NDArray[np.bool_] | None = None
        self.mark_tick = 0
        self.paused = self.show_recent = self.show_all = False
        self.show_events = True
        self.parts = PageParts(((0, sampler.n_pages),))
        self.problem = ""
        self.zoom_steps = self.start_page = self.cursor_cell = 0
        self._wake = asyncio.Event()

    # -- life ------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """Arrange the widgets from top to bottom."""
        for name in ("head", "map", "cell", "figures", "keys"):
            yield Static(id=name)

    def on_mount(self) -> None:
        """Start ticking."""
        self.query_one("#keys", Static).update(Text(f" {_KEYS}", no_wrap=True))
        self.run_worker(self._tick_for_ever(), exclusive=True)

    def on_resize(self, _: Resize) -> None:
        """Fit the map to the terminal."""
        self.call_after_refresh(self.draw)

    async def _tick_for_ever(self) -> None:
        self.pace.begin()
        while True:
            wait_s = self.pace.next_s() if not self.paused else LONGEST_S
            if not self.paused and not await self._tick():
                wait_s = max(_RETRY_S, wait_s)
            self.draw()
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), wait_s)
            except TimeoutError:
                continue

    async def _tick(self) -> bool:
        """Take a sample of the VM; return whether it succeeded."""
        try:
            self.sample = await asyncio.to_thread(self.sampler.sample)
            if self.mark is not None and self.mark.size != self.sampler.n_pages:
                self.mark = None
            self._choose_parts()
            self.problem = ""
        except VmGoneError as error:
            waiting = "" if self.sampler.is_process else " waiting for it to return,"
            self.problem = f"{error};{waiting} q quits"
        except (CapabilityError, ControlError) as error:
            self.problem = f"{error}; press t for the next tracker"
        except InUseError as error:
            self.problem = f"{error}; T forces it and puts it back at the end"
        except KvmHostError as error:
            self.problem = str(error)
        return not self.problem

    # -- keys ------------------------------------------------------------------

    def action_pause(self) -> None:
        """Pause or resume."""
        self.paused = not self.paused
        self._wake.set()

    def action_zoom(self, steps: int) -> None:
        """Double or halve the pages per cell; the cursor stays on its page."""
        grid = self.grid()
        page = grid.range_of(self.cursor_cell)[0]
        if steps < 0 or grid.cell_pages > 1:
            self.zoom_steps = max(0, self.zoom_steps + 2 * steps)
        most = Grid.whole_bits(grid.columns * grid.rows, grid.n_pages)
        self.zoom_steps = min(self.zoom_steps, most)
        self._look_at(page)

    def action_all(self) -> None:
        """Show all of memory."""
        page = self.grid().range_of(self.cursor_cell)[0]
        self.zoom_steps = 0
        self._look_at(page)

    def action_move(self, dx: int, dy: int) -> None:
        """Move the cursor; at an edge, scroll the map."""
        grid = self.grid()
        cell = self.cursor_cell + dx + dy * grid.columns
        if not 0 <= cell < grid.columns * grid.rows:
            step = grid.columns * grid.cell_pages * (1 if cell > 0 else -1)
            self.start_page = Grid.fit(*self._room(), grid.n_pages, grid.start + step,
                                       self.zoom_steps).start  # fmt: skip
            cell -= (self.start_page - grid.start) // grid.cell_pages
        self.cursor_cell = min(max(cell, 0), self.grid().n_cells() - 1)
        self.draw()

    def action_scroll(self, screens: int) -> None:
        """Scroll the map by a screen."""
        grid = self.grid()
        self.start_page = grid.start + screens * (grid.end - grid.start)
        self.draw()

    def action_mark(self) -> None:
        """Store the young pages as a mark, or clear the mark."""
        if self.mark is None and self.sample is not None:
            self.mark, self.mark_tick = self.shown().copy(), self.sample.tick
        else:
            self.mark = None
        self.draw()

    def action_view(self) -> None:
        """Switch between the current window and the recent windows."""
        self.show_recent, self.mark = not self.show_recent, None
        self.draw()

    def action_events(self) -> None:
        """Show or hide evictions and refaults."""
        self.show_events = not self.show_events
        self.draw()

    def action_used(self) -> None:
        """Show the used parts of memory, or all of it."""
        self.show_all = not self.show_all
        self._choose_parts()
        self.draw()

    def action_tracker(self, force: bool = False) -> None:
        """Switch to the next tracker; with ``force`` also while others read by this one."""
        if self.sample is not None and self.sampler.tracker == "auto":
            self.sampler.tracker = self.sample.tracker
        self.sampler.next_tracker(force)
        self._wake.set()

    def action_help(self) -> None:
        """Show the help screen."""
        self.push_screen(_Help())

    # -- drawing ---------------------------------------------------------------

    def grid(self) -> Grid:
        """Return the grid of cells that is shown."""
        return Grid.fit(*self._room(), self.parts.n_pages, self.start_page, self.zoom_steps)

    def _choose_parts(self) -> None:
        """Choose the parts of memory that are shown; the cursor stays on its page."""
        before, whole = self.parts, PageParts(((0, self.sampler.n_pages),))
        after = whole if self.show_all else self.sampler.used_parts()
        if after == before:
            return
        page = before.page_at(self.grid().range_of(self.cursor_cell)[0])
        self.parts = after
        self._look_at(after.position_of(page))

    def _part(self, mask: Mask) -> Mask:
        """Return the pages of a mask that are shown, one part after the other."""
        if self.parts.ranges == ((0, mask.size),):
            return mask
        return np.concatenate([mask[low:high] for low, high in self.parts.ranges])

    def shown(self) -> npt.NDArray[np.bool_]:
        """Return the pages that are shown as young, of all of memory."""
        assert self.sample is not None
        young = self.sampler.recent() if self.show_recent else self.sample.young
        return np.resize(young, self.sampler.n_pages)

    def draw(self) -> None:
        """Draw all widgets."""
        if not self.screen_stack:
            return
        self._put("head", self._head())
        if self.sample is None:
            return
        grid = self.grid()
        self.start_page = grid.start
        self.cursor_cell = min(self.cursor_cell, max(grid.n_cells() - 1, 0))
        mapped, young = self._part(self.sampler.mapped), self.shown()
        gfn_at = self.parts.page_at
        if self.mark is not None:
            drawn = draw_changes(
                self._part(self.mark), self._part(young), mapped, grid, self.cursor_cell, gfn_at
            )
        else:
            sample = self.sample
            states = None
            if sample.resident is not None and sample.evicted is not None:
                states = self._part(sample.resident), self._part(sample.evicted)
            moved = {name: self._part(mask) for name, mask in sample.moved.items()}
            drawn = draw_density(
                self._part(young),
                mapped,
                grid,
                self.cursor_cell,
                states,
                moved=moved if self.show_events else None,
                gfn_at=gfn_at,
            )
        self._put("map", drawn)
        self._put("cell", self._cell(grid, young))
        self._put("figures", self._figures(self.sample))

    def _put(self, name: str, text: Text) -> None:
        self.screen_stack[0].query_one(f"#{name}", Static).update(text)

    def _room(self) -> tuple[int, int]:
        size = self.screen_stack[0].query_one("#map", Static).content_size
        return size.width, size.height

    def _look_at(self, page: int) -> None:
        """Centre the map on a page, and move the cursor to it."""
        grid = self.grid()
        rows = grid.columns * grid.cell_pages
        wanted = (page // rows - grid.rows // 2) * rows
        self.start_page = Grid.fit(
            *self._room(), grid.n_pages, wanted, self.zoom_steps
        ).start  # fmt: skip
        self.cursor_cell = max(0, (page - self.start_page) // grid.cell_pages)
        self.draw()

    def _head(self) -> Text:
        text = Text(" ", no_wrap=True, overflow="ellipsis")
        if self.problem:
            return text.append(printable(self.problem), "bold color(203)")
        if self.sample is None:
            return text.append("asking the VM ...")
        state, sample = self.sample.state, self.sample
        text.append(printable(state.name), "bold")
        if self.paused:
            text.append("  PAUSED", "bold color(226)")
        elif state.paused:
            text.append("  VM paused", "bold color(226)")
        text.append(f"  {printable(sample.tracker)} ({printable(sample.table_format)})")
        if sample.not_seen:
            text.append(f"  {sample.not_seen} not seen", "bold color(215)")
        if state.resident_bytes is None:
            text.append(f"  {size_text(state.mem_bytes)}, residency unknown")
        else:
            text.append(f"  {size_text(state.resident_bytes)} of {size_text(state.mem_bytes)}")
        if state.limit_bytes:
            text.append(f", limit {size_text(state.limit_bytes)}")
        if len(self.parts.ranges) > 1 or self.parts.n_pages < self.sampler.n_pages:
            left_out = size_text((self.sampler.n_pages - self.parts.n_pages) * PAGE_BYTES)
            text.append(f"  {left_out} unused left out (u)", "color(215)")
        image = state.image.rsplit("/", 1)[-1]
        engine = f", {printable(state.engine)}" if state.engine else ""
        return text.append(f"  {printable(image)}{engine}")

    def _cell(self, grid: Grid, young: npt.NDArray[np.bool_]) -> Text:
        first, end = grid.range_of(self.cursor_cell)
        n = max(end - first, 1)
        low, high = self.parts.page_at(first), self.parts.page_at(max(end - 1, 0)) + 1
        part = self._part(young)[first:end]
        slot = next(
            (f"slot {m.slot}" for m in self.sampler.memory.memslots
             if m.gfn_start <= low < m.gfn_start + m.n_pages), "no memory"
        )  # fmt: skip
        span = f"gfn {low:#x}" if n == 1 else f"gfns {low:#x}:{high:#x}"
        count = int(np.count_nonzero(part))
        what = f"young in the last {RECENT}" if self.show_recent else "young"
        text = Text(f"{span}  {slot}  ", "color(250)", no_wrap=True, overflow="ellipsis")
        text.append(f"{count} of {n} {what} ({100 * count / n:.0f} %)", "bold")
        if self.sample is not None:
            masks = {"resident": self.sample.resident, "evicted": self.sample.evicted}
            for name, mask in masks.items():
                if mask is not None:
                    found = int(np.count_nonzero(self._part(mask)[first:end]))
                    text.append(f", {found} {name}", "color(250)")
            text.append_text(self._events_of(self.sample, first, end))
        if self.mark is not None:
            before = self.mark
            came, went = int((young & ~before).sum()), int((before & ~young).sum())
            both = int((young & before).sum())
            alike = both / max(both + came + went, 1)
            text.append(f"  since tick {self.mark_tick}: ", "color(250)")
            text.append(f"+{came:,}", "color(82)").append(f" -{went:,}", "color(203)")
            text.append(f" alike {100 * alike:.0f} %", "color(250)")
        return text

    def _events_of(self, sample: Sample, first: int, end: int) -> Text:
        """Return what happened to the pages of a cell in this tick."""
        text = Text()
        for name in SHOWN_EVENTS if self.show_events else ():
            mask = sample.moved.get(name)
            count = 0 if mask is None else int(np.count_nonzero(self._part(mask)[first:end]))
            if count:
                what = f"evicted ({_CAUSES[name]})" if name in _CAUSES else "refaulted"
                text.append(f", {count} {what}", f"color({EVENT_MARKS[name][1]})")
        return text

    def _figures(self, sample: Sample) -> Text:
        width = max(self.size.width - 2, 40)
        text = Text(no_wrap=True, overflow="crop")
        head = f"wss of {RECENT} ticks {size_text(sample.wss_pages * PAGE_BYTES):>10}  "
        text.append(head)
        text.append(sparkline(list(self.sampler.history), width - len(head)), "color(37)")
        text.append("\n").append_text(self._generations(sample, width)).append("\n")
        stall = "-" if sample.pressure is None else f"{100 * sample.pressure:.1f} %"
        rates = [
            f"{name} {'-' if rate is None else f'{rate:,.0f}'}/s"
            for name, rate in (("evictions", sample.evictions), ("faults", sample.faults))
        ]
        causes = ", ".join(
            f"{cause} {sample.counts[name]:,}"
            for name, cause in _CAUSES.items()
            if sample.counts.get(name)
        )
        rates[0] += f" ({causes} in this tick)" if causes else ""
        evicted = size_text(sample.evicted_pages * PAGE_BYTES)
        text.append(f"{'  '.join(rates)}  evicted {evicted}  pressure {stall}\n")
        text.append(
            f"harvest {sample.harvest_ms:.2f} ms, re-arm {sample.rearm_ms:.2f} ms   "
            f"tick {sample.tick}, {self.pace.interval_s:.3g} s   "
            f"own cost {100 * self.pace.share:.1f} %",
            "color(245)",
        )
        return text

    def _generations(self, sample: Sample, width: int) -> Text:
        """Return two lines: the generations, and the number of pages of each."""
        shown = sample.generations
        most = max(width // 13, 2)
        if len(shown) > most:
            shown = [*shown[: most - 1], shown[-1]]
        total = max(sum(each.pages for each in sample.generations), 1)
        names = Text("daemon's seq " if sample.by_daemon else "age in ticks ", "color(245)")
        sizes = Text("             ")
        column = min(max((width - 13) // max(len(shown), 1), 7), 16)
        for each in shown:
            names.append(each.label.ljust(column)[:column], "color(250)")
            size = size_text(each.pages * PAGE_BYTES).replace(" ", "").replace("iB", "")
            blocks = bar(each.pages / total, max(column - 7, 0)).rstrip()
            sizes.append(blocks, "color(71)").append(size.rjust(6 if blocks else 1))
            sizes.append(" " * max(column - len(blocks) - (6 if blocks else len(size)), 0))
        return names.append("\n").append_text(sizes)
