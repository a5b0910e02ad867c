"""The table of ``kvmhost top``, on textual."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Static

from kvmhost.control.client import Client
from kvmhost.control.listing import ListedVm, ask_all, find_sockets
from kvmhost.errors import KvmHostError
from kvmhost.printable import printable
from kvmhost.timescale import scaled
from kvmhost.tools.vmtable import COLUMNS, row_of

__all__ = ["RATES", "Rates", "TopApp"]

#: Titles of the columns with counts per second, and the counter of each.
RATES = ("EXITS/S", "EVICT/S", "FAULTS/S")
#: How long one VM may take to answer.
_ANSWER_S = scaled(5.0)


class Rates:
    """Computes counts per second from the counters of two updates."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Time and counts of the last update, by socket and process.
        self._before: dict[tuple[str, int], tuple[float, tuple[int, ...]]] = {}

    def of(self, vms: Sequence[ListedVm]) -> list[tuple[float, ...]]:
        """Return the rates of each VM, as :data:`RATES`; empty at a VM's first update."""
        now_s, before, self._before = self._clock(), self._before, {}
        return [self._rates(vm, now_s, before) for vm in vms]

    def _rates(
        self,
        vm: ListedVm,
        now_s: float,
        before: dict[tuple[str, int], tuple[float, tuple[int, ...]]],
    ) -> tuple[float, ...]:
        if vm.state is None or vm.counters is None:
            return ()
        pager = vm.counters.pager or {}
        counts = (
            vm.counters.machine.exits, pager.get("evictions", 0), pager.get("fault_ins", 0),
        )  # fmt: skip
        key = vm.socket, vm.state.pid
        self._before[key] = now_s, counts
        then_s, old = before.get(key, (now_s, counts))
        if now_s <= then_s:
            return ()
        return tuple((new - last) / (now_s - then_s) for new, last in zip(counts, old, strict=True))


class TopApp(App[None]):
    """The live table.

    :param everyone: show VMs of other users too
    """

    TITLE = "kvmhost top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: ansi_default; }
    #head { height: 1; background: $primary-background; color: $text; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit", priority=True),
        Binding("ctrl+c,ctrl+q", "quit", "quit", priority=True, show=False),
        Binding("s", "sort", "sort by the next column"),
        Binding("r", "reverse", "reverse"),
        Binding("p", "pause", "pause or resume"),
    ]

    def __init__(self, interval_s: float, *, everyone: bool = False) -> None:
        super().__init__()
        self.animation_level = "none"
        self.interval_s, self.everyone = interval_s, everyone
        self.vms: list[ListedVm] = []
        self.problem = ""
        self._rates, self._sorted_by, self._reversed = Rates(), 0, False
        #: Pauses that this view made, by VM.
        self._pauses: dict[str, int | None] = {}
        self._wake = asyncio.Event()

    def compose(self) -> ComposeResult:
        """Arrange the widgets from top to bottom."""
        yield Static(id="head")
        yield DataTable[Text](cursor_type="row", zebra_stripes=True)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Start updating."""
        self._table.add_columns(*COLUMNS, *RATES)
        self.run_worker(self._update_for_ever(), exclusive=True)

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one(DataTable)

    async def _update_for_ever(self) -> None:
        while True:
            try:
                self.vms = await asyncio.to_thread(self._ask)
                self.problem = ""
            except (KvmHostError, OSError) as error:
                self.vms, self.problem = [], str(error)
            self._draw()
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), self.interval_s)
            except TimeoutError:
                continue

    def _ask(self) -> list[ListedVm]:
        return ask_all(find_sockets(everyone=self.everyone), timeout_s=_ANSWER_S)

    # -- keys ------------------------------------------------------------------

    def action_sort(self) -> None:
        """Sort by the next column."""
        self._sorted_by = (self._sorted_by + 1) % (len(COLUMNS) + len(RATES))
        self._wake.set()

    def action_reverse(self) -> None:
        """Reverse the order."""
        self._reversed = not self._reversed
        self._wake.set()

    async def action_pause(self) -> None:
        """Pause the VM under the cursor, or undo this view's pause of it."""
        table = self._table
        if not table.row_count:
            return
        vm = str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)
        try:
            await asyncio.to_thread(self._toggle, vm)
        except KvmHostError as error:
            self.notify(printable(error), severity="error")
        self._wake.set()

    def _toggle(self, vm: str) -> None:
        with Client(vm, timeout_s=_ANSWER_S) as client:
            if client.state().paused:
                client.resume(self._pauses.pop(vm, None))
            else:
                self._pauses[vm] = client.pause(for_s=0).pause

    # -- drawing ---------------------------------------------------------------

    def _draw(self) -> None:
        """Draw the table again; the cursor stays on its VM."""
        table = self._table
        at = None
        if table.row_count:
            at = table.coordinate_to_cell_key(table.cursor_coordinate).row_key
        rows = [
            (vm, row_of(vm), rates)
            for vm, rates in zip(self.vms, self._rates.of(self.vms), strict=True)
        ]
        rows.sort(key=lambda row: self._key(*row), reverse=self._reversed)
        table.clear()
        for vm, texts, rates in rows:
            shown = [f"{rate:,.0f}" for rate in rates] or ["-"] * len(RATES)
            table.add_row(*map(Text, texts), *(Text(t, justify="right") for t in shown), key=vm.vm)
        if at is not None and at in table.rows:
            table.move_cursor(row=table.get_row_index(at))
        self.query_one("#head", Static).update(self._head())

    def _key(self, vm: ListedVm, texts: Sequence[str], rates: Sequence[float]) -> tuple[float, str]:
        """Return the sort key: numbers before texts, the VM's name last."""
        if self._sorted_by >= len(COLUMNS):
            return (rates[self._sorted_by - len(COLUMNS)] if rates else -1.0), vm.vm
        number = _NUMBERS.get(COLUMNS[self._sorted_by])
        if number is None or vm.state is None:
            return (0.0, texts[self._sorted_by])
        return float(number(vm)), vm.vm

    def _head(self) -> Text:
        text = Text(" ", no_wrap=True, overflow="ellipsis")
        if self.problem:
            return text.append(printable(self.problem), "bold color(203)")
        names = (*COLUMNS, *RATES)
        n = len(self.vms)
        text.append(f"{n} VM{'' if n == 1 else 's'}", "bold")
        text.append(
            f"   sorted by {names[self._sorted_by]}{', reversed' if self._reversed else ''}"
        )
        return text.append(f"   every {self.interval_s:g} s")


def _state_number(name: str) -> Callable[[ListedVm], float]:
    return lambda vm: float(getattr(vm.state, name))


#: Columns that are sorted as numbers.
_NUMBERS: dict[str, Callable[[ListedVm], float]] = {
    "VCPUS": lambda vm: 0.0 if vm.state is None else len(vm.state.vcpus),
    "MEM": _state_number("mem_bytes"),
    "RESIDENT": _state_number("resident_bytes"),
    "LIMIT": _state_number("resident_max_bytes"),
    "UP": _state_number("uptime_s"),
}
