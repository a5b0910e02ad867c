"""``kvmhost young export``: convert a record to the formats of other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.files import check_target
from kvmhost.reclaim.exchange.registry import EXPORTS, export
from kvmhost.tools.args import share
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.young import ExportOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, one_of
from kvmhost.tools.young.output import open_record, windows_of

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.out.exists():
        raise LayoutError(f"{args.out}: there already; remove it, or take another name")
    check_target(args.out)
    with open_record(args.file) as record:
        first, end = windows_of(record, args.windows)
        gfns = export(args.format, record, args.out, first, end, min_share=args.min_share or 0.0)
    if args.json:
        emit(
            ExportOutput(file=str(args.out), format=args.format, n_windows=end - first, n_gfns=gfns)
        )
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
    add_option(
        parser, "--format", type=one_of("format", tuple(EXPORTS)), required=True, help="see above"
    )
    add_option(parser, "--out", required=True, metavar="OUT", help="to write")
    add_option(parser, "--windows")
    parser.add_argument(
        "--min-share",
        type=share,
        metavar="SHARE",
        help="gfns: only what was young in this share of the windows (default: in any window)",
    )
    add_option(parser, "--json")
    return parser
