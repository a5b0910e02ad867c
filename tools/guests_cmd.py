"""``kvmhost guests``: the built-in guests, their parameters, and their contracts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from kvmhost.boot.image import read_image
from kvmhost.guests import image_names, image_path
from kvmhost.tools.parser import CommandParser

__all__ = ["contract", "main", "parser"]

EXIT_USAGE = 2

_DESCRIPTION = """\
Without NAME: list the built-in guests with their parameters, defaults and
meanings. With NAME: show that guest's parameters and the contract at the head of
its source. Parameters are given as: kvmhost run NAME --param name=value

exit status: 0, or 2 if there is no guest of that name
"""


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost guests",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this guest only")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """List guests, or show one."""
    arguments = parser().parse_args(argv)
    names = image_names()
    if arguments.name is not None and arguments.name not in names:
        known = ", ".join(names) or "none are built: run make guests"
        print(f"kvmhost guests: no guest {arguments.name!r}; there are: {known}", file=sys.stderr)
        return EXIT_USAGE
    shown = [_describe(name) for name in names if arguments.name in (None, name)]
    if arguments.json:
        print(json.dumps(shown if arguments.name is None else shown[0], indent=2))
    else:
        print("\n\n".join(_as_text(guest, arguments.name is not None) for guest in shown))
    return 0


def contract(name: str) -> str:
    """Return the comment at the head of a guest's source; empty if there is none."""
    source = image_path(name).with_suffix(".c")
    try:
        head = re.match(r"\s*/\*(.*?)\*/", source.read_text(), re.DOTALL)
    except FileNotFoundError:
        return ""
    if head is None:
        return ""
    lines = [re.sub(r"^\s*\* ?", "", line).rstrip() for line in head[1].splitlines()]
    return "\n".join(lines).strip()


def _describe(name: str) -> dict[str, Any]:
    path = image_path(name)
    params = [dataclasses.asdict(param) for param in read_image(path).params]
    return {"name": name, "path": str(path), "params": params, "contract": contract(name)}


def _as_text(guest: dict[str, Any], whole: bool) -> str:
    summary = guest["contract"].split("\n\n")[0].removeprefix(f"{guest['name']}: ")
    lines = [guest["contract"] if whole else f"{guest['name']}: {' '.join(summary.split())}", ""]
    width = max((len(f"{p['name']}={p['default']}") for p in guest["params"]), default=0)
    for param in guest["params"]:
        given = f"{param['name']}={param['default']}"
        lines.append(f"  {given:<{width}}  {param['help']}")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
