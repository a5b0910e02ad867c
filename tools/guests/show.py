"""Show built-in guests and guest image files, with parameters and contracts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from kvmhost.boot.image import read_image
from kvmhost.guests import image_names, image_path
from kvmhost.tools.args import find_image
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.host import GuestRow, GuestsOutput, ParamRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option

__all__ = ["contract", "parser", "show"]

_DESCRIPTION = """\
Without NAME: list the built-in guests with their parameters, defaults and
meanings. With NAME: show that guest's parameters and the contract at the head of
its source. With PATH: the same of an image file, as far as the file, and a source
beside it, say. Parameters are given as: kvmhost run NAME --param name=value, a
number in the parameter's unit; one in pages also takes a size (64M), one in
permille or percent a share (1/4, 25%).

kvmhost guests build FILE.c compiles a guest of your own.

exit status: 0, or 2 if there is no guest of that name, or the file is no image
"""


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost guests",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", metavar="NAME|PATH", nargs="?", help="show this guest or image file only"
    )
    add_option(parser, "--json")
    return parser


def show(argv: Sequence[str] | None = None) -> int:
    """List guests, or show one.

    :raises ImageError: if no guest has that name, or the file is not an image
    """
    arguments = parser().parse_args(argv)
    if arguments.name is not None:
        shown = [_describe(find_image(arguments.name))]
    else:
        shown = [_describe(image_path(name)) for name in image_names()]
    if arguments.json:
        emit(GuestsOutput(guests=shown))
    else:
        print("\n\n".join(_as_text(guest, arguments.name is not None) for guest in shown))
    return 0


def contract(image: Path) -> str:
    """Return the first comment of the source next to an image; empty if there is none."""
    try:
        source = image.with_suffix(".c").read_text(errors="replace")
    except OSError:
        return ""
    head = re.match(r"\s*/\*(.*?)\*/", source, re.DOTALL)
    if head is None:
        return ""
    lines = [re.sub(r"^\s*\* ?", "", line).rstrip() for line in head[1].splitlines()]
    return "\n".join(lines).strip()


def _describe(path: Path) -> GuestRow:
    params = [
        ParamRow(name=param.name, default=param.default, unit=param.unit, help=param.help)
        for param in read_image(path).params
    ]
    return GuestRow(name=path.stem, path=str(path), params=params, contract=contract(path))


def _as_text(guest: GuestRow, whole: bool) -> str:
    summary = guest.contract.split("\n\n")[0].removeprefix(f"{guest.name}: ")
    short = f"{guest.name}: {' '.join(summary.split()) or guest.path}"
    lines = [guest.contract if whole and guest.contract else short, ""]
    if whole and not guest.params:
        lines.append("  no parameters")
    given = [f"{p.name}={p.default} {p.unit}".rstrip() for p in guest.params]
    width = max(map(len, given), default=0)
    lines += [f"  {text:<{width}}  {p.help}" for text, p in zip(given, guest.params, strict=True)]
    return "\n".join(lines).rstrip()
