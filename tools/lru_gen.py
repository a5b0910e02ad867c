"""``kvmhost lru_gen``: the text interface of the kernel's lru_gen, for the VMs of a daemon."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from kvmhost.errors import LayoutError
from kvmhost.reclaim.control.client import DaemonClient
from kvmhost.reclaim.control.paths import daemon_names
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.daemons import (
    EnabledOutput,
    EvictedOutput,
    GenerationRow,
    GenerationsOutput,
    VmGenerations,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, add_vm

__all__ = ["main", "parser"]

#: Header on a terminal; like the kernel's file, output to a pipe has no header.
_HEADER = f" {'seq':>10} {'age_ms':>10} {'anon_pages':>11} {'file_pages':>10}"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if args.what == "enabled":
        return _enabled(args.daemon, args.vm, args.value, args.json)
    if args.what == "show":
        if args.full and args.json:
            raise LayoutError("--full and --json: the statistics are shown as text only")
        with _daemon(args.daemon, args.vm) as daemon:
            text = daemon.show_lru_gen(args.vm, full=args.full)
        if args.json:
            emit(GenerationsOutput(vms=_vms(text)))
            return 0
        if sys.stdout.isatty():
            print(_HEADER)
        print(text, end="")
        return 0
    text = sys.stdin.read() if args.command == "-" else args.command
    with _daemon(args.daemon, _vm_of(text)) as daemon:
        n_pages = daemon.run_lru_gen(text)
    if args.json:
        emit(EvictedOutput(evicted_pages=n_pages))
    else:
        print(f"{n_pages} pages evicted")
    return 0


def _enabled(daemon_name: str | None, vm: str, value: str | None, json: bool) -> int:
    """Show the capabilities of a VM's policy, or set them first."""
    with _daemon(daemon_name, None if vm.isdigit() else vm) as daemon:
        text = daemon.lru_gen_enabled(vm, value)
    if json:
        emit(EnabledOutput(caps=int(text, 16)))
    else:
        print(text, end="")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost lru_gen",
        description="Show generations, age and evict, in the syntax of the kernel's "
        "/sys/kernel/debug/lru_gen. VM is its name, or the number that show prints.",
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="show|run|enabled")
    show = what.add_parser(
        "show",
        help="show generations with their ages in ms and pages",
        description="Show the generations of each VM: number, age in ms, anonymous pages and file "
        "pages, as the kernel's file does.",
    )
    add_vm(show, nargs="?", help="show only this VM (default: all VMs of the daemon)")
    show.add_argument(
        "--full", action="store_true", help="with the statistics of the kernel's lru_gen_full"
    )
    enabled = what.add_parser(
        "enabled",
        help="show or set capabilities",
        description="Show the mask of capabilities of a VM's policy, in the syntax of the kernel's "
        "/sys/kernel/mm/lru_gen/enabled: 0x1 core, 0x2 mm walk, 0x8 spte walk. With VALUE (y, n "
        "or a number), set it first; it holds until the daemon ends.",
    )
    add_vm(enabled)
    enabled.add_argument("value", metavar="VALUE", nargs="?", help="the new mask (default: show)")
    run = what.add_parser(
        "run",
        help="age or evict",
        description="Run '+ VM 0 SEQ [can_swap [full_scan]]' to age and "
        "'- VM 0 SEQ [swappiness [nr_pages]]' to evict; several are separated by commas or "
        "line ends, and '-' reads them from standard input.",
    )
    run.add_argument(
        "command", metavar="COMMAND", help="one or more commands, or - for standard input"
    )
    for one in (show, run, enabled):
        add_option(one, "--daemon")
        add_option(one, "--json")
    return parser


def _vms(text: str) -> list[VmGenerations]:
    """Parse the text of ``show`` into one entry per VM."""
    vms: list[VmGenerations] = []
    for line in text.splitlines():
        words = line.split()
        if words[0] == "memcg":
            vms.append(VmGenerations(number=int(words[1]), vm=words[2], generations=[]))
        elif words[0] != "node":
            seq, age_ms, anon_pages, file_pages = map(int, words)
            vms[-1].generations.append(
                GenerationRow(seq=seq, age_ms=age_ms, anon_pages=anon_pages, file_pages=file_pages)
            )
    return vms


def _vm_of(text: str) -> str | None:
    """Return the VM named by the first command; a number is meaningful to a daemon only."""
    match = re.match(r"\s*[+-]\s*(\S+)", text)
    return match[1] if match and not match[1].isdigit() else None


def _daemon(name: str | None, vm: str | None) -> DaemonClient:
    """Find the daemon to query.

    :raises LayoutError: if the daemon is ambiguous
    """
    if name:
        return DaemonClient(name)
    if vm is not None:
        return DaemonClient.of_vm(vm)
    there = daemon_names()
    if not there:
        raise LayoutError("no daemon runs: start kvmhost reclaimd, or name one with --daemon")
    if len(there) > 1:
        raise LayoutError(f"{len(there)} daemons run ({', '.join(there)}): name one with --daemon")
    return DaemonClient(there[0])
