"""``kvmhost lab list``: the emulated hosts."""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.lab.cache import chosen_pins
from kvmhost.lab.fetching import is_cached
from kvmhost.lab.hosts import HOSTS, LabHost
from kvmhost.lab.qemu import qemu_version
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.lab import LabHostOutput, LabListOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Print one line for each host, or one JSON object."""
    args = parser().parse_args(argv)
    found = [_host_output(host) for host in HOSTS.values()]
    if args.json:
        emit(LabListOutput(hosts=found))
        return 0
    for host in found:
        state = "cached" if host.cached else "not cached"
        qemu = f"{host.qemu} {host.qemu_version or 'missing'}"
        print(f"{host.name:<14} {host.kernel:<18} {state:<10} {qemu:<28} {host.about}")
    return 0


def _host_output(host: LabHost) -> LabHostOutput:
    return LabHostOutput(
        name=host.name,
        architecture=host.architecture,
        about=host.about,
        kernel=chosen_pins(host.kernel).version,
        root=host.root.value,
        cached=is_cached(host),
        qemu=host.qemu,
        qemu_version=qemu_version(host),
    )


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost lab list",
        description="List the emulated hosts: kernel version, whether it is in the cache, "
        "QEMU and its version here, processor and paging.",
    )
    add_option(parser, "--json")
    return parser
