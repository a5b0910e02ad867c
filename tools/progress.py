"""Progress on a terminal and none in a pipe; tables that read well in both."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

__all__ = ["Progress", "show_table"]


class Progress:
    """Says what is being done now: on standard error, and only on a terminal.

    :param quiet: say nothing at all
    """

    def __init__(self, quiet: bool = False) -> None:
        self._on = not quiet and sys.stderr.isatty()
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Show one step, with the seconds since the start."""
        if self._on:
            print(f"[{time.monotonic() - self._start:5.1f} s] {text}", file=sys.stderr)


def show_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print two columns: boxed on a terminal, plain lines in a pipe."""
    if not sys.stdout.isatty():
        for name, value in rows:
            print(f"{name:28} {value}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
