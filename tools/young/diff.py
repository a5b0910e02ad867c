"""``kvmhost young diff``: the similarity of two windows, two ranges of windows, or two runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvmhost.errors import LayoutError
from kvmhost.tools.outputs.young import DiffOutput, DiffRange
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    mib,
    open_record,
    show,
    windows_of,
)

__all__ = ["main", "parser"]

_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.patterns import similarity

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

    output = DiffOutput(
        page_bytes=page_bytes,
        first_pages=found.a_pages,
        second_pages=found.b_pages,
        both_pages=found.both_pages,
        jaccard_ratio=round(found.jaccard, 6),
        ranges=[
            *_ranges("first", found.only_a, found.gfn_start),
            *_ranges("second", found.only_b, found.gfn_start),
        ],
    )
    _show(output, args)
    return 0


def _ranges(
    side: Literal["first", "second"], bits: npt.NDArray[np.bool_], gfn_start: int
) -> Iterator[DiffRange]:
    from kvmhost.reclaim.young.bits import runs

    for a, b in zip(*runs(bits), strict=True):
        yield DiffRange(side=side, gfn_start=int(a) + gfn_start, n_pages=int(b - a))


def _show(output: DiffOutput, args: argparse.Namespace) -> None:
    only = (output.first_pages - output.both_pages, output.second_pages - output.both_pages)
    facts = {
        "first_pages": output.first_pages,
        "second_pages": output.second_pages,
        "both_pages": output.both_pages,
        "first_only_mib": round(mib(only[0], output.page_bytes), 3),
        "second_only_mib": round(mib(only[1], output.page_bytes), 3),
        "jaccard_ratio": output.jaccard_ratio,
    }
    shown = output.ranges
    if not (args.json or args.csv):
        shown = sorted(shown, key=lambda one: -one.n_pages)[:_SHOWN]
    rows = [[r.side, r.gfn_start, r.gfn_start + r.n_pages, r.n_pages] for r in shown]
    names = ["side", "gfn_start", "gfn_end", "n_pages"]
    formats = {"gfn_start": "hex", "gfn_end": "hex"}
    show(output, Table(names, rows, facts, formats=formats), args)
    if len(shown) < len(output.ranges):
        print(f"the largest {len(shown)} of {len(output.ranges)} ranges; --csv and --json have all")


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young diff",
        description="Compare which pages were young: in two records, or in two stretches of "
        "one. Jaccard is what is in both as a share of what is in either.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a record of young record")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another record")
    add_option(
        parser,
        "--windows",
        action="append",
        help="a stretch of windows; twice for the first and the second (default: all)",
    )
    add_output_arguments(parser)
    return parser
