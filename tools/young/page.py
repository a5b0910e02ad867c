"""``kvmhost young page``: the history of one guest page, from a record or a running VM."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmhost.control.client import Client
from kvmhost.errors import LayoutError
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import Table, add_output_arguments, open_record, show

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.pagehistory import GfnHistory

__all__ = ["main", "parser"]

_SHOWN = 30


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    if not _is_file(args.source):
        return _show_live(args)
    from kvmhost.reclaim.analyse.pagehistory import history_of

    with open_record(Path(args.source)) as record:
        _show_history(history_of(record, args.gfn), args)
    return 0


def _is_file(source: str) -> bool:
    """Return whether a source is a record; a VM is given by its name or its socket's path."""
    path = Path(source)
    return path.is_dir() or ("/" in source and not path.is_socket())


def _show_history(found: GfnHistory, args: argparse.Namespace) -> None:
    facts: dict[str, Any] = {
        name: value
        for name, value in dataclasses.asdict(found).items()
        if name not in ("stretches", "place", "gfn")
    }
    facts = {"gfn": f"{found.gfn:#x}", **_place_facts(found), **facts}
    rows = [
        ["young" if s.young else "idle", s.first, s.end, s.end - s.first,
         round(s.since_s, 3), round(s.until_s, 3)]
        for s in found.stretches
    ]  # fmt: skip
    people = not (args.json or args.csv)
    shown = rows[-_SHOWN:] if people else rows
    notes = [f"the last {len(shown)} of {len(rows)} stretches"] if len(shown) < len(rows) else []
    names = ["state", "window", "end", "windows", "since_s", "until_s"]
    formats = {"window": "plain", "end": "plain"}
    show(Table(names, shown, facts, notes=notes, formats=formats), args)


def _place_facts(found: GfnHistory) -> dict[str, Any]:
    place = found.place
    if place is None:
        return {"slot": None}
    return {
        "gpa": f"{place.gpa:#x}",
        "slot": place.slot,
        "slot_offset_bytes": place.slot_offset_bytes,
        "hva": None if place.hva is None else f"{place.hva:#x}",
    }


def _show_live(args: argparse.Namespace) -> int:
    """Show the current state of the page in a VM, without changing it."""
    with Client(args.source) as vm:
        page = vm.page(args.gfn)
        bitmap = vm.harvest(args.gfn, 1, clear=False).young
    facts = {
        **dataclasses_of(page),
        "young": bool(bitmap.count()),
        "coarse": bool(bitmap.coarse_as_bool().any()),
        "tracker": bitmap.provenance.tracker,
        "table_format": bitmap.provenance.table_format,
        "window_start_ns": bitmap.provenance.window_start_ns,
    }
    if args.csv:
        raise LayoutError("--csv is for records; a VM's page has --json")
    if args.json:
        print(json.dumps(facts))
        return 0
    for name in ("gfn", "gpa", "hva"):
        facts[name] = f"{facts[name]:#x}"
    show(Table([], [], facts), args)
    print("since the view default was cleared last; kvmhost young record keeps a history")
    return 0


def dataclasses_of(page: Any) -> dict[str, Any]:
    """Return the fields of a response of the control socket."""
    import msgspec

    found: dict[str, Any] = msgspec.structs.asdict(page)
    return found


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young page",
        description="Show in which windows of a record a page was young, and where it lies; "
        "of a running VM: what it knows of the page now.",
    )
    parser.add_argument("source", metavar="FILE|VM", help="a record, or a VM's name or socket")
    parser.add_argument(
        "gfn", type=lambda text: int(text, 0), metavar="GFN", help="0x for hex; young gfn finds it"
    )
    add_output_arguments(parser)
    return parser
