"""``kvmhost young export``: a record in the formats of other programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvmhost.errors import LayoutError
from kvmhost.files import check_target, replacing
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import open_record, window_range, windows_of

if TYPE_CHECKING:
    from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["FORMATS", "main", "parser"]

FORMATS = {
    "damon": "DAMON's record as damo writes it: damo report access --input OUT",
    "damon-json": "the same as plain JSON",
    "dirty": "a directory of KVM dirty bitmaps with an index",
    "ranges": "plain text: ranges of gfns by window",
    "gfns": "the working set as a list, what was young most often first: for prefetch",
    "gfns-bin": "the same as little-endian 64-bit numbers",
}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise LayoutError(f"{args.out}: there already; remove it, or take another name")
    check_target(args.out)
    if not 0 <= args.share <= 100:
        raise LayoutError(f"--share {args.share:g}: need 0 to 100")
    with open_record(args.file) as record:
        first, end = windows_of(record, args.windows)
        gfns = _write(args, record, first, end)
    if args.json:
        shown = {"file": str(args.out), "format": args.format, "windows": end - first}
        print(json.dumps(shown if gfns is None else shown | {"gfns": gfns}))
    else:
        print(f"{args.out}: {f'{end - first} windows' if gfns is None else f'{gfns} gfns'}")
    return 0


def _write(args: argparse.Namespace, record: YoungRecord, first: int, end: int) -> int | None:
    """Write the file; return how many gfns it lists, None for formats of windows."""
    from kvmhost.reclaim.exchange import damon, dirty, text

    if args.format == "dirty":
        dirty.export(record, args.out, first, end)
        return None
    with replacing(args.out) as file:
        if args.format in ("damon", "damon-json"):
            damon.export(record, file, first, end, compress=args.format == "damon")
        elif args.format == "ranges":
            text.export_ranges(record, file, first, end)
        else:
            gfns = text.working_set_gfns(record, first, end, args.share / 100)
            text.export_gfns(gfns, file, binary=args.format == "gfns-bin")
            return int(gfns.size)
    return None


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    width = max(map(len, FORMATS))
    parser = CommandParser(
        prog="kvmhost young export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a record, or some of its windows, in a format of other programs:\n\n"
        + "\n".join(f"  {name:<{width}}  {about}" for name, about in FORMATS.items()),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a record of young record")
    parser.add_argument("--format", choices=FORMATS, required=True, help="see above")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="to write")
    parser.add_argument(
        "--windows",
        type=window_range,
        metavar="A:B",
        help="from window A up to before B; --windows=-60: is the last 60 (default: all)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="gfns: only what was young in so many of the windows (default: any)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
