"""``kvmhost young export``: convert a record to the formats of other programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.files import check_target
from kvmhost.reclaim.exchange.registry import EXPORTS, export
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import open_record, window_range, windows_of

__all__ = ["main", "parser"]


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
        gfns = export(args.format, record, args.out, first, end, min_share=args.share / 100)
    if args.json:
        shown = {"file": str(args.out), "format": args.format, "windows": end - first}
        print(json.dumps(shown if gfns is None else shown | {"gfns": gfns}))
    else:
        print(f"{args.out}: {f'{end - first} windows' if gfns is None else f'{gfns} gfns'}")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    width = max(map(len, EXPORTS))
    parser = CommandParser(
        prog="kvmhost young export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a record, or some of its windows, in a format of other programs:\n\n"
        + "\n".join(f"  {name:<{width}}  {known.about}" for name, known in EXPORTS.items()),
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a record of young record")
    parser.add_argument("--format", choices=EXPORTS, required=True, help="see above")
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
