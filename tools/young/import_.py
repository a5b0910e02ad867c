"""``kvmhost young import``: make a record from files of other programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmhost.errors import LayoutError
from kvmhost.files import check_target, os_errors
from kvmhost.printable import printable
from kvmhost.reclaim.exchange.registry import IMPORTS, read
from kvmhost.tools.args import number
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.young import ImportOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, one_of

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise LayoutError(f"{args.out}: there already; remove it, or take another name")
    check_target(args.out)
    options = _options(args)
    from kvmhost.reclaim.exchange.common import write_record

    origin = f"{args.format} {args.files[0].name}"
    found = read(args.format, args.files, **options)
    if found.remark:
        remark = printable(f"{args.files[0]}: {found.remark}")
        print(f"kvmhost young import: {remark}", file=sys.stderr)
    with os_errors(args.out):
        windows = write_record(found, args.out, origin)
    if args.json:
        emit(
            ImportOutput(
                file=str(args.out),
                format=args.format,
                n_windows=windows,
                n_pages=found.n_pages,
                remark=found.remark,
            )
        )
    else:
        print(f"{printable(args.out)}: {windows} windows")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the reader of the format takes.

    :raises LayoutError: for an option that it does not take
    """
    takes = IMPORTS[args.format].takes
    options: dict[str, Any] = {}
    if args.range is not None and "gfn_start" in takes:
        start, end = args.range
        if not 0 <= start < end:
            raise LayoutError(f"--range {start:#x}:{end:#x}: is empty")
        options |= {"gfn_start": start, "n_pages": end - start}
    elif args.range is not None:
        options["gfn_range"] = args.range
    given = {"target_id": args.target_id, "interval_s": args.interval}
    options |= {name: value for name, value in given.items() if value is not None}
    flags = {"gfn_range": "--range", "target_id": "--target-id", "interval_s": "--interval"}
    for name in options:
        if name not in takes:
            raise LayoutError(f"--format {args.format} takes no {flags[name]}")
    return options


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
    add_option(
        parser, "--format", type=one_of("format", tuple(IMPORTS)), required=True, help="see above"
    )
    add_option(parser, "--out", required=True, metavar="OUT", help="the record")
    add_option(
        parser,
        "--range",
        help="damon: only the gfns from A up to before B; dirty: the gfns that the bits of each "
        "file stand for, 0x for hex (default: all; dirty: from gfn 0)",
    )
    parser.add_argument(
        "--target-id",
        type=number,
        metavar="ID",
        help="damon: which target_id, where there are several",
    )
    add_option(parser, "--interval", default=None, help="dirty: length of a window (default: 1s)")
    add_option(parser, "--json")
    return parser
