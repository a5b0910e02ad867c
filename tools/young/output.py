"""Tables of the commands that read records: as text, JSON or CSV."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmhost.errors import LayoutError
from kvmhost.printable import printable
from kvmhost.tools.outputs.base import Output, emit
from kvmhost.tools.vocabulary import add_option

if TYPE_CHECKING:
    from kvmhost.reclaim.record.reader import YoungRecord

__all__ = [
    "Table",
    "add_output_arguments",
    "add_record_arguments",
    "coverage_facts",
    "mib",
    "number",
    "open_record",
    "share",
    "show",
    "show_text",
    "spans",
    "windows_of",
]


@dataclasses.dataclass
class Table:
    """Rows of plain values. Text output right-aligns columns and rounds floats.

    :param facts: shown above the rows in text output
    :param shown_rows: number of evenly selected rows in text output; CSV has all
    :param closer_first: select more of the first rows than of the last
    :param notes: lines below the rows in text output
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shown_rows: int | None = None
    closer_first: bool = False
    notes: Sequence[str] = ()
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --windows and --range."""
    add_option(parser, "--windows")
    add_option(parser, "--range")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --json and --csv."""
    group = parser.add_mutually_exclusive_group()
    add_option(group, "--json")
    group.add_argument("--csv", action="store_true", help="print CSV, with a head line")


def open_record(path: Path) -> YoungRecord:
    """Open a record, and report on standard error if its end is missing."""
    from kvmhost.reclaim.record.reader import YoungRecord

    record = YoungRecord.open(path)
    if record.loss:
        print(f"warning: {printable(record.loss)}", file=sys.stderr)
    return record


def coverage_facts(record: YoungRecord, first: int, end: int) -> tuple[dict[str, Any], list[str]]:
    """Return how much of the time windows ``[first, end)`` cover, as facts and as notes."""
    from kvmhost.reclaim.record.clock import coverage_of

    found = coverage_of(record, first, end)
    facts = {
        "covered_s": round(found.covered_s, 6),
        "covered_share": round(found.share, 6),
        "n_gaps": found.n_gaps,
    }
    return facts, [found.text + ": nothing is known about the rest"] if found.n_gaps else []


def windows_of(record: YoungRecord, given: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """Return the selected windows ``[first, end)`` of a record.

    :raises LayoutError: if the record has no such windows, or the selection is empty
    """
    first, end = given or (None, None)
    n = len(record)
    low = 0 if first is None else first + n * (first < 0)
    high = n if end is None else end + n * (end < 0)
    if not 0 <= low <= high <= n or (low == high and n):
        raise LayoutError(f"--windows {first}:{end}: {record.path} has windows 0 to {n - 1}")
    return low, high


def spans(text: str) -> list[tuple[float, str]]:
    """Parse ``1,60s,10m``: numbers of windows, or times in s, m or h.

    :return: pairs (number, unit); the unit is empty for a number of windows
    :raises argparse.ArgumentTypeError: for anything else
    """
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", word.strip())
        if match is None or float(match[1]) <= 0:
            raise argparse.ArgumentTypeError(f"{word!r}: write windows (60) or a time (60s, 5m)")
        found.append((float(match[1]), match[2]))
    return found


def show(output: Output, table: Table, args: argparse.Namespace) -> None:
    """Print an output as JSON, or its table as text or CSV."""
    if args.json:
        emit(output)
    elif args.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    else:
        show_text(table)


def show_text(table: Table) -> None:
    """Print a table as text."""
    for name, value in table.facts.items():
        if not isinstance(value, list | dict):
            print(f"{printable(name.replace('_', ' ')):24} {_cell(value, '')}")
    if table.rows:
        _show_rows(table)
    for note in table.notes:
        print(printable(note))


def _show_rows(table: Table) -> None:
    picked = _picked(table.rows, table.shown_rows, table.closer_first)
    cells = [[printable(name) for name in table.columns]]
    for row in picked:
        cells.append(
            [
                _cell(value, table.formats.get(name, ""))
                for name, value in zip(table.columns, row, strict=True)
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(table.columns))]
    for line in cells:
        print("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())
    if len(picked) < len(table.rows):
        print(f"{len(picked)} of {len(table.rows)} rows; --csv and --json have all")


def _picked(
    rows: Sequence[Sequence[Any]], most: int | None, closer_first: bool
) -> Sequence[Sequence[Any]]:
    if most is None or len(rows) <= most:
        return rows
    last = len(rows) - 1
    shares = (i / (most - 1) for i in range(most))
    if closer_first:
        places = {round(len(rows) ** part) - 1 for part in shares}
    else:
        places = {round(last * part) for part in shares}
    return [rows[place] for place in sorted(places)]


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if form == "hex":
        return f"{value:#x}"
    if form == "%":
        return f"{100 * value:.2f} %"
    if isinstance(value, float):
        return f"{value:.{3 if abs(value) < 10 else 1}f}"
    return f"{value:,}" if isinstance(value, int) and form != "plain" else printable(value)


def mib(pages: float, page_bytes: int) -> float:
    """Return the size of pages in MiB."""
    return float(pages) * page_bytes / 2**20


def number(value: Any) -> int:
    """Convert a numpy number to a Python number, for JSON."""
    return int(value)


def share(part: float, whole: float) -> float:
    """Return ``part / whole``, or 0 if ``whole`` is 0."""
    return float(part) / float(whole) if whole else 0.0
