"""``kvmhost lab NAME``: emulated hosts with a KVM of their own."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.tools.dispatch import dispatch
from kvmhost.tools.parser import CommandParser

__all__ = ["SUBCOMMANDS", "main", "parser"]

#: One-line description by name, which is also the name of the module in this package.
SUBCOMMANDS = {
    "list": "the hosts: processor, kernel, what they need, what is cached",
    "fetch": "download the kernels of hosts from the distribution's packages",
    "run": "boot a host, run a command in it, pass its output and status on",
    "shell": "boot a host and start a shell in it",
    "young": "harvest the tables that a host's KVM built for a guest, from outside",
}

_ABOUT = "Unmodified kernels under QEMU's emulation, as hosts that run guests."


def main(argv: Sequence[str]) -> int:
    """Run one of the subcommands."""
    return dispatch("kvmhost lab", _ABOUT, __name__, SUBCOMMANDS, argv)


def parser() -> CommandParser:
    """Return a parser without the subcommands; :mod:`kvmhost.tools.tree` adds them."""
    return CommandParser(prog="kvmhost lab", description=_ABOUT)
