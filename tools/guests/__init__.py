"""``kvmhost guests``: list and show guests, built-in or from an image file, and build guests."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.tools.dispatch import dispatch
from kvmhost.tools.guests.show import parser, show

__all__ = ["SUBCOMMANDS", "main", "parser"]

#: Subcommands, which are not names of guests, and their modules in this package.
SUBCOMMANDS = {"build": "compile a guest from a C file"}


def main(argv: Sequence[str] | None = None) -> int:
    """List guests, show one, or build one."""
    if argv and argv[0] in SUBCOMMANDS:
        return dispatch("kvmhost guests", "", __name__, SUBCOMMANDS, argv)
    return show(argv)
