"""Where ``kvmhost reclaimd`` writes its events: lines, JSON lines, or a table on a terminal."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvmhost.errors import HostError, LayoutError
from kvmhost.files import open_log
from kvmhost.printable import printable
from kvmhost.reclaim.account.events import Dropped, Event, Notice, PassReport
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.settings.options import DaemonOptions
from kvmhost.tools.outputs.base import line_of
from kvmhost.tools.outputs.daemons import EventKind, EventOutput, PassRow
from kvmhost.tools.terminal import LineFormatter, unfiltered
from kvmhost.units import size_text

if typing.TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

__all__ = ["EventLog", "PageTotals", "VmTable", "open_event_log"]

_LOGGERS = ("reclaim", "kvmhost")
#: Messages under the table.
_N_MESSAGES = 5


@contextlib.contextmanager
def open_event_log(options: DaemonOptions) -> Iterator[EventLog]:
    """Open the log that the options ask for.

    Without ``json`` and with a terminal as standard output, a table is shown there and lines
    are written to ``log_file`` only.

    :raises ConfigError: if the file cannot be opened
    """
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        if options.log_file:
            stream = stack.enter_context(_open(options.log_file))
        table = None
        if not options.json and sys.stdout.isatty():
            table = stack.enter_context(VmTable().shown())
        log = EventLog(options.json, stream if options.log_file or table is None else None, table)
        stack.enter_context(log.receiving())
        yield log


def _open(path: str) -> typing.TextIO:
    try:
        fd = open_log(Path(path), keep=True)
    except (LayoutError, HostError) as error:
        raise ConfigError("flags", 0, "daemon.log_file", str(error)) from error
    return os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")


class EventLog:
    """Writes the daemon's events and the messages of its loggers.

    :param stream: receives a line for each; None: nothing does
    :param table: shows them too
    """

    def __init__(
        self, as_json: bool, stream: typing.TextIO | None, table: VmTable | None = None
    ) -> None:
        self._as_json, self._stream, self._table = as_json, stream, table
        self._lock = threading.Lock()

    def tell(self, event: Event) -> None:
        """Write one event."""
        if self._table is not None:
            self._table.tell(event)
        if self._as_json:
            self._write(line_of(_output(event)))
            return
        bad = isinstance(event, Notice) or (isinstance(event, Dropped) and event.failed)
        self._write(printable(event.line()), to_stderr=bad)

    def message(self, level: str, text: str) -> None:
        """Write a message of a logger."""
        if self._table is not None:
            self._table.message(text)
        if self._as_json:
            failed = level in ("error", "critical")
            self._write(line_of(_event("log", text=text, failed=failed, level=level)))
        else:
            self._write(f"reclaimd: {text}", to_stderr=True)

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Receive the messages of the loggers during the body."""
        handler = _Handler(self)
        handler.setFormatter(LineFormatter("%(message)s"))
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        before = [list(logger.handlers) for logger in loggers]
        for logger in loggers:
            logger.handlers = [handler]
        try:
            yield
        finally:
            for logger, handlers in zip(loggers, before, strict=True):
                logger.handlers = handlers

    def _stamp(self) -> str:
        """Return the time, for lines in a file; what reads standard output adds its own."""
        in_file = self._stream is not sys.stdout and not self._as_json
        return time.strftime("%Y-%m-%dT%H:%M:%S%z ") if in_file else ""

    def _write(self, line: str, *, to_stderr: bool = False) -> None:
        """Write one line. The daemon continues if the log can no longer be written."""
        with self._lock:
            if self._stream is None:
                return
            stream = sys.stderr if to_stderr and self._stream is sys.stdout else self._stream
            try:
                print(self._stamp() + line, file=stream, flush=True)
            except (OSError, ValueError):
                if self._stream is sys.stdout:
                    # Prevent another error of the interpreter at exit.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self._stream = None


def _output(event: Event) -> EventOutput:
    if isinstance(event, PassReport):
        return _event("pass", vm=event.vm, text=event.line(), report=_pass_row(event))
    if isinstance(event, Dropped):
        return _event("dropped", vm=event.vm, text=event.line(), failed=event.failed)
    return _event("notice", text=event.line(), failed=event.failed)


def _event(
    kind: EventKind,
    *,
    text: str,
    vm: str = "",
    failed: bool = False,
    level: str = "",
    report: PassRow | None = None,
) -> EventOutput:
    return EventOutput(
        event=kind,
        time_s=time.time(),
        vm=vm,
        text=text,
        failed=failed,
        level=level,
        report=report,
    )


def _pass_row(report: PassReport) -> PassRow:
    return PassRow(
        number=report.number,
        resident_bytes=report.resident_bytes,
        n_young=report.young_pages,
        generations=report.generations,
        wanted_pages=report.wanted_pages,
        outcomes=report.outcomes,
        why=report.why,
        forced_pages=report.forced_pages,
        refaulted_pages=report.refaulted_pages,
        harvest_ns_per_page=report.harvest_ns_per_page,
        duration_ms=report.duration_ms,
        busy_ms=report.busy_ms,
        holding=report.holding,
        dry_run=report.dry_run,
        notes=report.notes,
    )


class _Handler(logging.Handler):
    def __init__(self, log: EventLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.message(record.levelname.lower(), self.format(record))


@dataclasses.dataclass
class PageTotals:
    """Pages of one VM since the start of the daemon."""

    evicted_pages: int = 0
    refaulted_pages: int = 0


#: Titles of the columns, and the columns that a terminal must have for each to be shown.
_COLUMNS = {
    "VM": 0,
    "pass": 120,
    "resident": 0,
    "young": 0,
    "generations": 150,
    "evicted": 0,
    "why": 90,
    "refaulted": 0,
    "all evicted": 100,
    "all refaulted": 100,
    "loss": 110,
    "stale": 140,
    "pass ms": 130,
}
_TEXT_COLUMNS = ("VM", "generations", "why")


class VmTable:
    """The managed VMs and the last messages, redrawn in place at each event."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes: dict[str, PassReport] = {}
        self._totals: dict[str, PageTotals] = collections.defaultdict(PageTotals)
        self._messages: collections.deque[str] = collections.deque(maxlen=_N_MESSAGES)
        self._live: Live | None = None

    @property
    def totals(self) -> Mapping[str, PageTotals]:
        """By VM."""
        return self._totals

    @contextlib.contextmanager
    def shown(self) -> Iterator[VmTable]:
        """Show the table on standard output during the body; the last one stays there."""
        from rich.console import Console
        from rich.live import Live

        console = Console(file=unfiltered(sys.stdout))
        live = Live(
            self.drawn(console.width),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def tell(self, event: Event) -> None:
        """Show an event."""
        with self._lock:
            if isinstance(event, PassReport):
                totals = self._totals[event.vm]
                totals.evicted_pages += 0 if event.dry_run else event.evicted_pages
                totals.refaulted_pages += event.refaulted_pages
                self._passes[event.vm] = event
                self._messages.extend(f"{event.vm}: {note}" for note in event.notes)
            else:
                if isinstance(event, Dropped):
                    self._passes.pop(event.vm, None)
                    self._totals.pop(event.vm, None)
                self._messages.append(event.line())
        self._redraw()

    def message(self, text: str) -> None:
        """Show a message."""
        with self._lock:
            self._messages.append(text)
        self._redraw()

    def _redraw(self) -> None:
        live = self._live
        if live is not None:
            # A terminal that is gone does not end the daemon.
            with contextlib.suppress(OSError, ValueError):
                live.update(self.drawn(live.console.width), refresh=True)

    def drawn(self, width: int) -> Table:
        """Return the table, with the messages under it.

        :param width: columns of the terminal; a narrow one shows less
        """
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        shown = [i for i, needed in enumerate(_COLUMNS.values()) if width >= needed]
        titles = list(_COLUMNS)
        for i in shown:
            left = titles[i] in _TEXT_COLUMNS
            table.add_column(titles[i], justify="left" if left else "right", no_wrap=not left)
        with self._lock:
            for vm in sorted(self._passes):
                row = _row(self._passes[vm], self._totals[vm])
                table.add_row(*(Text(printable(row[i])) for i in shown))
            messages = [printable(text) for text in self._messages]
        waiting = [] if table.rows else ["waiting for the first pass ..."]
        table.caption = Text("\n".join(waiting + messages), justify="left")
        return table


def _row(last: PassReport, totals: PageTotals) -> list[str]:
    why = "holding back" if last.holding else last.why if last.wanted_pages else ""
    return [
        last.vm,
        f"{last.number}",
        size_text(last.resident_bytes),
        f"{last.young_pages:,}",
        " ".join(f"{seq}:{n:,}" for seq, n in last.generations),
        f"{last.evicted_pages:,}" + (" (dry run)" if last.dry_run else ""),
        why,
        f"{last.refaulted_pages:,}",
        f"{totals.evicted_pages:,}",
        f"{totals.refaulted_pages:,}",
        "" if last.loss is None else f"{100 * last.loss:.1f} %",
        f"{last.stale_s:.3g} s",
        f"{last.duration_ms:.1f}",
    ]
