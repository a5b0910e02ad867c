"""``kvmhost young import``: make a record from files of other programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.files import check_target, os_errors
from kvmhost.printable import printable
from kvmhost.reclaim.exchange.registry import IMPORTS, read
from kvmhost.tools.args import seconds
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.common import gfn_range

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise LayoutError(f"{args.out}: there already; remove it, or take another name")
    check_target(args.out)
    if "target" not in IMPORTS[args.format].takes and (
        args.range is not None or args.target is not None
    ):
        raise LayoutError(f"{args.format}: takes no --range and no --target")
    from kvmhost.reclaim.exchange.common import write_record

    origin = f"{args.format} {args.files[0].name}"
    found = read(
        args.format,
        args.files,
        gfn_start=args.gfn_start,
        n_pages=args.pages,
        interval_s=args.interval,
        target=args.target,
        gfn_range=args.range,
    )
    if found.remark:
        remark = printable(f"{args.files[0]}: {found.remark}")
        print(f"kvmhost young import: {remark}", file=sys.stderr)
    with os_errors(args.out):
        windows = write_record(found, args.out, origin)
    if args.json:
        shown = {"file": str(args.out), "format": args.format, "windows": windows}
        print(json.dumps(shown | {"n_pages": found.n_pages, "remark": found.remark}))
    else:
        print(f"{printable(args.out)}: {windows} windows")
    return 0


def _number(text: str) -> int:
    value = int(text, 0)
    if not 0 <= value < 1 << 52:
        raise argparse.ArgumentTypeError(f"{text}: need 0 or more, below 2**52")
    return value


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    width = max(map(len, IMPORTS))
    parser = CommandParser(
        prog="kvmhost young import",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make a record out of what other programs wrote:\n\n"
        + "\n".join(f"  {name:<{width}}  {known.about}" for name, known in IMPORTS.items()),
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="to read")
    parser.add_argument("--format", choices=IMPORTS, required=True, help="see above")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the record")
    parser.add_argument(
        "--gfn-start", type=_number, default=0, metavar="GFN", help="dirty files: of bit 0"
    )
    parser.add_argument(
        "--pages", type=_number, metavar="N", help="dirty files: how many (default: all bits)"
    )
    parser.add_argument(
        "--range", type=gfn_range, metavar="A:B", help="damon: only these pages, [A, B)"
    )
    parser.add_argument(
        "--target",
        type=_number,
        metavar="ID",
        help="damon: which target_id, where there are several",
    )
    parser.add_argument(
        "--interval", type=seconds, default=1.0, metavar="SECONDS", help="dirty files: a window"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
