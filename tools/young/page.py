"""``kvmhost young page``: the history of one guest page, from a record or a running VM."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvmhost.control.client import Client
from kvmhost.errors import LayoutError
from kvmhost.tools.args import gfn
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.young import (
    HistoryRow,
    PageNow,
    PlaceOutput,
    StretchRow,
    YoungPageOutput,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import Table, add_output_arguments, open_record, show, show_text

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.pagehistory import GfnHistory, Place

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
    output = YoungPageOutput(gfn=found.gfn, history=_history(found), now=None)
    people = not (args.json or args.csv)
    rows = [
        ["young" if s.young else "idle", s.first, s.end - s.first, round(s.since_s, 3),
         round(s.until_s, 3)]
        for s in found.stretches
    ]  # fmt: skip
    shown = rows[-_SHOWN:] if people else rows
    notes = [f"the last {len(shown)} of {len(rows)} stretches"] if len(shown) < len(rows) else []
    names = ["state", "window", "n_windows", "start_s", "end_s"]
    facts = {"gfn": f"{found.gfn:#x}", **_place_facts(found.place), **_history_facts(found)}
    show(output, Table(names, shown, facts, notes=notes, formats={"window": "plain"}), args)


def _history(found: GfnHistory) -> HistoryRow:
    place = found.place
    return HistoryRow(
        place=None if place is None else PlaceOutput(**dataclasses.asdict(place)),
        n_windows=found.windows,
        young_windows=found.young_windows,
        coarse_windows=found.coarse_windows,
        first_young_window=found.first_young,
        last_young_window=found.last_young,
        age_windows=found.age_windows,
        longest_idle_windows=found.longest_idle,
        stretches=[
            StretchRow(
                young=s.young,
                first_window=s.first,
                n_windows=s.end - s.first,
                start_s=round(s.since_s, 3),
                end_s=round(s.until_s, 3),
            )
            for s in found.stretches
        ],
    )


def _history_facts(found: GfnHistory) -> dict[str, Any]:
    names = ("windows", "young_windows", "coarse_windows", "first_young", "last_young",
             "age_windows", "longest_idle")  # fmt: skip
    return {name: getattr(found, name) for name in names}


def _place_facts(place: Place | None) -> dict[str, Any]:
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
    if args.csv:
        raise LayoutError("--csv is for records; a VM's page has --json")
    with Client(args.source) as vm:
        page = vm.page(args.gfn)
        bitmap = vm.harvest(args.gfn, 1, clear=False).young
    source = bitmap.provenance
    now = PageNow(
        page=page,
        young=bool(bitmap.count()),
        coarse=bool(bitmap.coarse_as_bool().any()),
        tracker=source.tracker,
        table_format=source.table_format,
        window_start_ns=source.window_start_ns,
    )
    if args.json:
        emit(YoungPageOutput(gfn=args.gfn, history=None, now=now))
        return 0
    facts = {**msgspec.structs.asdict(page), **msgspec.structs.asdict(now)}
    del facts["page"]
    for name in ("gfn", "gpa", "hva"):
        facts[name] = f"{facts[name]:#x}"
    show_text(Table([], [], facts))
    print("since the view default was cleared last; kvmhost young record keeps a history")
    return 0


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young page",
        description="Show in which windows of a record a page was young, and where it lies; "
        "of a running VM: what it knows of the page now.",
    )
    parser.add_argument("source", metavar="FILE|VM", help="a record, or a VM's name or socket")
    parser.add_argument("gfn", type=gfn, metavar="GFN", help="0x for hex; young gfn finds it")
    add_output_arguments(parser)
    return parser
