"""``kvmhost young hot``: list ranges of pages that are young most of the time."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.errors import LayoutError
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
    if args.gap < 0 or args.top < 1 or not 0 < args.share <= 100:
        raise LayoutError("hot: need --share above 0 and up to 100, --gap from 0, --top from 1")
    from kvmhost.reclaim.analyse.patterns import hot_ranges

    with open_windows(args) as record:
        first, end = windows_of(record, args.windows)
        found = hot_ranges(record, first, end, min_share=args.share / 100, max_gap_pages=args.gap)
        page_bytes = record.metadata.page_bytes
        covered, remarks = coverage_facts(record, first, end)
    if args.range is not None:
        low, high = args.range
        found = [r for r in found if r.gfn_start < high and low < r.gfn_end]
    found.sort(key=lambda r: (-r.hot_pages, r.gfn_start))
    hot = sum(r.hot_pages for r in found)
    rows = [
        [r.gfn_start, r.gfn_end, r.n_pages, round(mib(r.n_pages, page_bytes), 3), r.hot_pages,
         round(r.density, 6)]
        for r in found
    ]  # fmt: skip
    facts = covered | {
        "windows": end - first,
        "ranges": len(found),
        "hot_pages": hot,
        "hot_mib": round(mib(hot, page_bytes), 3),
    }
    if not (args.json or args.csv):
        rows = rows[: args.top]
    names = ["gfn_start", "gfn_end", "pages", "mib", "hot_pages", "density"]
    formats = {"gfn_start": "hex", "gfn_end": "hex", "density": "%"}
    show(Table(names, rows, facts, notes=remarks, formats=formats), args)
    if len(rows) < len(found):
        print(f"and {len(found) - len(rows)} more; --top N shows more, --gap N joins neighbours")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young hot",
        description="Show ranges of pages that were young for at least a share of the time: "
        "start, end and density (the share of the time that its pages were young), largest first. "
        "A window counts with its length.",
    )
    add_windows_source(parser)
    add_record_arguments(parser)
    parser.add_argument(
        "--share", type=float, default=50.0, metavar="PERCENT",
        help="hot is what is young for at least so much of the time (default: 50)",
    )  # fmt: skip
    parser.add_argument(
        "--gap", type=int, default=0, metavar="PAGES",
        help="join ranges with at most so many pages between them (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="ranges to show (default: 20)"
    )
    add_output_arguments(parser)
    return parser
