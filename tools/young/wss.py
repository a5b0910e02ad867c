"""``kvmhost young wss``: working-set size over time, for windows of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    add_record_arguments,
    mib,
    open_record,
    show,
    spans,
    windows_of,
)

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.analysis import Histograms

__all__ = ["main", "parser"]

_SHOWN = 20
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.analysis import histograms, working_set

    with open_record(args.file) as record:
        first, end = windows_of(record, args.windows)
        found = histograms(record, first, end, args.range)
        page_bytes = record.metadata.page_bytes
    lengths = [_windows(found, *span) for span in args.over]
    columns = [working_set(found, length) for length in lengths]
    rows = [
        [first + i, round(float(found.seconds[i]), 3), *(int(column[i]) for column in columns)]
        for i in range(len(found))
    ]
    facts = {
        f"over_{length}_windows_mib": {
            "mean": mib(column.mean(), page_bytes),
            "max": mib(column.max(), page_bytes),
        }
        for length, column in zip(lengths, columns, strict=True)
        if column.size
    }
    notes = ["wss_N: pages young in the last N windows; of all windows, also those not shown:"]
    notes += [
        f"  over {length:>5} windows: mean {mib(column.mean(), page_bytes):.1f} MiB, "
        f"max {mib(column.max(), page_bytes):.1f} MiB"
        for length, column in zip(lengths, columns, strict=True)
        if column.size
    ]
    names = ["window", "seconds", *(f"wss_{length}" for length in lengths)]
    formats = {"window": "plain"}
    show(Table(names, rows, facts, _SHOWN, False, notes, formats), args)
    return 0


def _windows(found: Histograms, value: float, unit: str) -> int:
    """Return the number of windows of a span, rounded to a number with exact counts."""
    from kvmhost.reclaim.analyse.analysis import nearest_window

    windows = value * _SECONDS[unit] / found.interval_s if unit else value
    return nearest_window(max(windows, 1.0))


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young wss",
        description="Show how many pages were young in the last so many windows, window by "
        "window: the working set over several lengths of time.",
    )
    add_record_arguments(parser)
    parser.add_argument(
        "--over",
        type=spans,
        default=spans("1,10,60"),
        metavar="N,N,...",
        help="lengths: in windows, or with s, m, h; above 64 windows the nearest of eight "
        "steps an octave (default: 1,10,60)",
    )
    add_output_arguments(parser)
    return parser
