"""``kvmhost top``: a live table of the VMs that run here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.installing import install_hint
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise LayoutError("top needs a terminal; for pipes there is kvmhost list --json")
    try:
        from kvmhost.tools.topview import TopApp
    except ImportError as error:
        raise CapabilityError("top", "textual", str(error), install_hint("watch")) from error
    app = TopApp(args.interval, everyone=os.geteuid() == 0)
    app.run()
    return app.return_code or 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost top",
        description="Show the VMs that run here in a live table, with exits, evictions and "
        "fault-ins per second: yours, and as root those of every user. s sorts by the next "
        "column, r reverses the order, p pauses or resumes the VM under the cursor, q quits.",
    )
    add_option(parser, "--interval", help="time between two updates")
    return parser
