"""``kvmhost guests``: the built-in guests, images of others, and building one's own."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.tools.dispatch import dispatch
from kvmhost.tools.guests.show import parser, show

__all__ = ["SUBCOMMANDS", "main", "parser"]

#: What is not the name of a guest, and its module here.
SUBCOMMANDS = {"build": "compile a guest from a C file"}


def main(argv: Sequence[str] | None = None) -> int:
    """List guests, show one, or build one."""
    if argv and argv[0] in SUBCOMMANDS:
        return dispatch("kvmhost guests", "", __name__, SUBCOMMANDS, argv)
    return show(argv)
