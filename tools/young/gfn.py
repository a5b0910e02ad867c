"""``kvmhost young gfn``: convert a guest address between all its forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kvmhost.control.client import Client
from kvmhost.tools.args import number
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.young import PlaceOutput
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option
from kvmhost.tools.young.output import Table, open_record, show_text

__all__ = ["main", "parser"]

_KINDS = ("gpa", "gfn", "hva", "offset")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.pagehistory import find_place
    from kvmhost.reclaim.record.meta import Memslot

    source = Path(args.source)
    if source.is_dir() or ("/" in args.source and not source.is_socket()):
        with open_record(source) as record:
            memslots, page_bytes = record.memslots(), record.metadata.page_bytes
    else:
        with Client(args.source) as vm:
            memory = vm.memory_map()
        memslots = [Memslot(m.slot, m.gfn_start, m.n_pages, m.hva) for m in memory.memslots]
        page_bytes = memory.page_bytes
    place = find_place(args.address, args.kind, memslots, page_bytes, args.slot)
    if args.json:
        emit(PlaceOutput(**dataclasses.asdict(place)))
        return 0
    facts = {
        "gfn": f"{place.gfn:#x}",
        "gpa": f"{place.gpa:#x}",
        "slot": place.slot,
        "slot_offset_bytes": f"{place.slot_offset_bytes:#x}",
        "hva": None if place.hva is None else f"{place.hva:#x}",
    }
    show_text(Table([], [], facts))
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young gfn",
        description="Convert between guest physical address, gfn, the VM process's virtual "
        "address and the offset in a memslot, by the memslots of a VM or of a record's end.",
    )
    parser.add_argument(
        "address", type=lambda text: int(text, 0), metavar="ADDR", help="0x for hex"
    )
    parser.add_argument("source", metavar="FILE|VM", help="a record, or a VM's name or socket")
    parser.add_argument(
        "--kind", choices=_KINDS, default="gpa", help="what ADDR is (default: gpa, in bytes)"
    )
    parser.add_argument(
        "--slot",
        type=number,
        default=0,
        metavar="N",
        help="of which memslot an offset is (default: 0)",
    )
    add_option(parser, "--json")
    return parser
