"""Progress output on terminals only, and tables for terminals and pipes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from kvmhost.printable import printable
from kvmhost.signals import start_threads
from kvmhost.tools.terminal import unfiltered

__all__ = ["Progress", "show_columns", "show_table", "working"]

#: Delay before the current step is shown on a terminal, and interval of its updates.
_SHOW_AFTER_S, _SHOW_EVERY_S = 1.0, 1.0
_CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Show the current step on standard error, if that is a terminal.

    :param quiet: show nothing
    """

    def __init__(self, quiet: bool = False) -> None:
        self._on = not quiet and sys.stderr.isatty()
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Show a step, with the seconds since the start."""
        if self._on:
            print(f"[{time.monotonic() - self._start:5.1f} s] {printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """Show ``text`` and the elapsed seconds while the body runs, on a terminal only.

    Nothing is shown if the body takes less than a second. The line is removed at the end.
    """
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_show_elapsed, args=(text, ended), daemon=True)
    start_threads(thread)
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show_elapsed(text: str, ended: threading.Event) -> None:
    start_s, terminal = time.monotonic(), unfiltered(sys.stderr)
    if ended.wait(_SHOW_AFTER_S):
        return
    while True:
        elapsed_s = time.monotonic() - start_s
        line = f"[{elapsed_s:5.1f} s] {printable(text)}"
        print(f"{_CLEAR_LINE}{line}", end="", file=terminal, flush=True)
        if ended.wait(_SHOW_EVERY_S):
            break
    print(_CLEAR_LINE, end="", file=terminal, flush=True)


def show_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a line of titles, one line a row, columns apart by two blanks.

    Lines are never cut, so that names can be copied and programs can split them.
    """
    lines = [list(titles), *([printable(text) for text in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def show_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print two columns: boxed on a terminal, plain lines in a pipe."""
    if not sys.stdout.isatty():
        for name, value in rows:
            print(f"{printable(name):28} {printable(value)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False)
    for name, value in rows:
        # Text instead of markup: a value may contain brackets.
        table.add_row(Text(printable(name)), Text(printable(value)))
    Console().print(table)
