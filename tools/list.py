"""``kvmhost list``: the VMs that run here, and what each of them does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kvmhost.control.listing import ListedVm, ask_all, find_sockets
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.vms import ListOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import show_columns
from kvmhost.tools.vmtable import COLUMNS, output_of, row_of
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 also if no VM runs, 1 if one of them does not answer."""
    args = parser().parse_args(argv)
    vms = ask_all(find_sockets(everyone=os.geteuid() == 0), timeout_s=args.timeout)
    if args.json:
        emit(ListOutput(vms=[output_of(vm) for vm in vms]))
    else:
        _show(vms)
    for vm in vms:
        if vm.problem:
            print(f"kvmhost list: {vm.vm}: {vm.problem}", file=sys.stderr)
    return 1 if any(vm.problem for vm in vms) else 0


def _show(vms: Sequence[ListedVm]) -> None:
    if not vms:
        print("no VM runs here; kvmhost run IMAGE --name NAME starts one", file=sys.stderr)
        return
    several = len({vm.uid for vm in vms}) > 1
    shown = [i for i, title in enumerate(COLUMNS) if title != "USER" or several]
    rows = [row_of(vm) for vm in vms]
    show_columns([COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in rows])


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost list",
        description="List the VMs that run here: yours, and as root those of every user. "
        "The first column is what other commands take as VM.",
        epilog="Exit code 1 if a VM does not answer.",
    )
    add_option(
        parser, "--timeout", default="10s", help="give up on a VM that does not answer in this time"
    )
    add_option(parser, "--json")
    return parser
