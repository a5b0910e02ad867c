"""``kvmhost young wss``: working-set size over time, for windows of several lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmhost.tools.outputs.young import LengthRow, WindowRow, WorkingSetOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    add_record_arguments,
    coverage_facts,
    mib,
    show,
    spans,
    windows_of,
)
from kvmhost.tools.young.source import add_windows_source, open_windows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvmhost.reclaim.analyse.analysis import Histograms

__all__ = ["main", "parser"]

_SHOWN = 20
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.analysis import histograms
    from kvmhost.reclaim.record.clock import weighted_mean

    with open_windows(args) as record:
        first, end = windows_of(record, args.windows)
        found = histograms(record, first, end, args.range)
        page_bytes = record.metadata.page_bytes
        covered, remarks = coverage_facts(record, first, end)
    lengths = [_windows(found, *span) for span in args.over]
    columns = [_working_set(found, *span) for span in args.over]
    means = [weighted_mean(c, found.lengths_s) if c.size else 0.0 for c in columns]
    output = WorkingSetOutput(
        **covered,
        page_bytes=page_bytes,
        lengths=[
            LengthRow(
                n_windows=length,
                mean_pages=round(float(mean), 3) if column.size else None,
                max_pages=int(column.max()) if column.size else None,
            )
            for length, column, mean in zip(lengths, columns, means, strict=True)
        ],
        windows=[
            WindowRow(
                window=first + i,
                elapsed_s=round(float(found.seconds[i]), 3),
                young_pages=[int(column[i]) for column in columns],
            )
            for i in range(len(found))
        ],
    )
    rows = [[row.window, row.elapsed_s, *row.young_pages] for row in output.windows]
    notes = ["wss_N: pages young in the last N windows; of all windows, also those not shown:"]
    notes += [
        f"  over {row.n_windows:>5} windows: mean {mib(row.mean_pages, page_bytes):.1f} MiB, "
        f"max {mib(row.max_pages, page_bytes):.1f} MiB"
        for row in output.lengths
        if row.mean_pages is not None and row.max_pages is not None
    ]
    notes += remarks
    names = ["window", "elapsed_s", *(f"wss_{length}" for length in lengths)]
    formats = {"window": "plain"}
    show(output, Table(names, rows, covered, _SHOWN, False, notes, formats), args)
    return 0


def _working_set(found: Histograms, value: float, unit: str) -> npt.NDArray[np.int64]:
    """Return the working set over a span; over a time, that of the windows in that time."""
    from kvmhost.reclaim.analyse.analysis import working_set, working_set_over

    if unit:
        return working_set_over(found, value * _SECONDS[unit])
    return working_set(found, max(value, 1.0))


def _windows(found: Histograms, value: float, unit: str) -> int:
    """Return the usual number of windows of a span, rounded to a number with exact counts."""
    from kvmhost.reclaim.analyse.analysis import nearest_window

    windows = value * _SECONDS[unit] / found.step_s if unit else value
    return nearest_window(max(windows, 1.0))


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young wss",
        description="Show how many pages were young in the last so many windows, window by "
        "window: the working set over several lengths of time.",
    )
    add_windows_source(parser)
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
