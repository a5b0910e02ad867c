"""``kvmhost young hot``: list ranges of pages that are young most of the time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kvmhost.tools.args import count, pages, share
from kvmhost.tools.outputs.young import HotOutput, HotRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    add_record_arguments,
    coverage_facts,
    mib,
    show,
    windows_of,
)
from kvmhost.tools.young.source import add_windows_source, open_windows

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.patterns import hot_ranges

    with open_windows(args) as record:
        first, end = windows_of(record, args.windows)
        found = hot_ranges(record, first, end, min_share=args.min_share, max_gap_pages=args.gap)
        page_bytes = record.metadata.page_bytes
        covered, remarks = coverage_facts(record, first, end)
    if args.range is not None:
        low, high = args.range
        found = [r for r in found if r.gfn_start < high and low < r.gfn_end]
    found.sort(key=lambda r: (-r.hot_pages, r.gfn_start))
    output = HotOutput(
        **covered,
        page_bytes=page_bytes,
        n_windows=end - first,
        hot_pages=sum(r.hot_pages for r in found),
        ranges=[
            HotRow(
                gfn_start=r.gfn_start,
                n_pages=r.n_pages,
                hot_pages=r.hot_pages,
                young_share=round(r.density, 6),
            )
            for r in found
        ],
    )
    _show(output, covered, remarks, args)
    return 0


def _show(
    output: HotOutput, covered: dict[str, Any], remarks: list[str], args: argparse.Namespace
) -> None:
    facts = covered | {
        "windows": output.n_windows,
        "ranges": len(output.ranges),
        "hot_pages": output.hot_pages,
        "hot_mib": round(mib(output.hot_pages, output.page_bytes), 3),
    }
    shown = output.ranges if args.json or args.csv else output.ranges[: args.top]
    rows = [
        [r.gfn_start, r.gfn_start + r.n_pages, r.n_pages,
         round(mib(r.n_pages, output.page_bytes), 3), r.hot_pages, r.young_share]
        for r in shown
    ]  # fmt: skip
    names = ["gfn_start", "gfn_end", "n_pages", "mib", "hot_pages", "young_share"]
    formats = {"gfn_start": "hex", "gfn_end": "hex", "young_share": "%"}
    show(output, Table(names, rows, facts, notes=remarks, formats=formats), args)
    if len(shown) < len(output.ranges):
        left = len(output.ranges) - len(shown)
        print(f"and {left} more; --top N shows more, --gap N joins neighbours")


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young hot",
        description="Show ranges of pages that were young for at least a share of the time: "
        "start, end and young_share (the share of the time that its pages were young), largest "
        "first. A window counts with its length.",
    )
    add_windows_source(parser)
    add_record_arguments(parser)
    parser.add_argument(
        "--min-share", type=share, default="50%", metavar="SHARE",
        help="hot is what is young for at least this share of the time (default: 50%%)",
    )  # fmt: skip
    parser.add_argument(
        "--gap", type=pages, default=0, metavar="PAGES",
        help="join ranges with at most so many pages between them (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--top", type=count, default=20, metavar="N", help="ranges to show (default: 20)"
    )
    add_output_arguments(parser)
    return parser
