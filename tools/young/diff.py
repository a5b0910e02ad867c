"""``kvmhost young diff``: the similarity of two windows, two ranges of windows, or two runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvmhost.errors import LayoutError
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    mib,
    open_record,
    show,
    window_range,
    windows_of,
)

__all__ = ["main", "parser"]

_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.patterns import similarity
    from kvmhost.reclaim.young.bits import runs

    given = list(args.windows or [])
    if args.other is None and len(given) != 2:
        raise LayoutError("diff of one record: name two stretches, --windows 0:60 --windows 60:120")
    if len(given) > 2:
        raise LayoutError("diff compares two: give --windows at most twice")
    sides = []
    for number, path in enumerate((args.file, args.other or args.file)):
        with open_record(path) as record:
            first, end = windows_of(record, given[min(number, len(given) - 1)] if given else None)
            sides.append(record.between(first, end, "or"))
            page_bytes = record.metadata.page_bytes
    found = similarity(*sides)

    def ranges(bits: npt.NDArray[np.bool_], where: str) -> list[list[object]]:
        starts, ends = runs(bits)
        return [
            [where, int(a) + found.gfn_start, int(b) + found.gfn_start, int(b - a)]
            for a, b in zip(starts, ends, strict=True)
        ]

    rows = ranges(found.only_a, "first only") + ranges(found.only_b, "second only")
    facts = {
        "first_pages": found.a_pages,
        "second_pages": found.b_pages,
        "both_pages": found.both_pages,
        "first_only_mib": round(mib(found.a_pages - found.both_pages, page_bytes), 3),
        "second_only_mib": round(mib(found.b_pages - found.both_pages, page_bytes), 3),
        "jaccard": round(found.jaccard, 6),
    }
    if not (args.json or args.csv):
        rows.sort(key=lambda row: -int(str(row[3])))
    names = ["where", "gfn_start", "gfn_end", "pages"]
    formats = {"gfn_start": "hex", "gfn_end": "hex"}
    shown = rows if args.json or args.csv else rows[:_SHOWN]
    show(Table(names, shown, facts, formats=formats), args)
    if len(shown) < len(rows):
        print(f"the largest {len(shown)} of {len(rows)} ranges; --csv and --json have all")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young diff",
        description="Compare which pages were young: in two records, or in two stretches of "
        "one. Jaccard is what is in both as a share of what is in either.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a record of young record")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another record")
    parser.add_argument(
        "--windows",
        type=window_range,
        action="append",
        metavar="A:B",
        help="a stretch of windows; twice for the first and the second (default: all)",
    )
    add_output_arguments(parser)
    return parser
