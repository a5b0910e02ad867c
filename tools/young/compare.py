"""``kvmhost young compare``: compare trackers and table formats on the same windows.

Records are compared with the first one given. With ``--guest`` the command makes the
records: the guest runs once for each tracker and stops at the doorbell after each epoch,
and each epoch is one window; the guest does the same in each run, so the windows are the
same. With ``--format`` the young pages of the first record are accessed in tables of
other formats and harvested from them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvmhost.bitmap import YoungBitmap, n_words
from kvmhost.errors import LayoutError
from kvmhost.files import own_directory
from kvmhost.temporary import temporary_folder
from kvmhost.tools.args import find_image, parse_params
from kvmhost.tools.machineargs import add_machine_arguments
from kvmhost.tools.outputs.records import CompareOutput, ViewRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, listing, one_of
from kvmhost.tools.young.output import Table, add_output_arguments, open_record, show
from kvmhost.trackers import NAMES

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.compare import Difference, TrackerView
    from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["FORMATS", "main", "parser", "record_guest", "through_table"]

#: Table format and level of the leaves, by name.
FORMATS = {
    "npt": ("npt", 1),
    "npt-2m": ("npt", 2),
    "ept": ("ept", 1),
    "ept-2m": ("ept", 2),
    "stage2": ("stage2", 1),
    "stage2-2m": ("stage2", 2),
    "radix": ("radix", 1),
    "radix-2m": ("radix", 2),
}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    _check(args)
    from kvmhost.reclaim.analyse.compare import compare_views, total

    with contextlib.ExitStack() as stack:
        paths = list(args.files)
        tables: list[tuple[int, int]] = []
        if args.guest:
            place = args.out or stack.enter_context(temporary_folder("kvmhost-young-"))
            paths, tables = record_guest(args, place)
        records = [stack.enter_context(open_record(path)) for path in paths]
        first = records[0]
        others = [(path.name, record) for path, record in zip(paths[1:], records[1:], strict=True)]
        reports: list[tuple[str, Difference]] = []
        for name, record in others:
            parts = compare_views(_view(paths[0].name, first), _view(name, record), tables)
            reports.append((_label(name, record), total(parts)))
        for name in args.format or []:
            view = _format_view(name, first)
            reports.append((f"format {name}", total(compare_views(_view("", first), view))))
        _show(_label(paths[0].name, first), reports, args)
    return 0


def _check(args: argparse.Namespace) -> None:
    if bool(args.guest) == bool(args.files):
        raise LayoutError("compare: give records, or --guest to make them")
    if args.files and len(args.files) + len(args.format or []) < 2:
        raise LayoutError("compare: one record has nothing to be compared with; add --format")


def _label(name: str, record: YoungRecord) -> str:
    sessions = record.metadata.sessions
    return f"{name} ({sessions[0].tracker}, {sessions[0].table_format})"


def _view(name: str, record: YoungRecord) -> TrackerView:
    from kvmhost.reclaim.analyse.compare import TrackerView
    from kvmhost.trackers import NAMES, describe

    tracker = record.metadata.sessions[0].tracker
    only_writes = tracker in NAMES and "reads" not in describe(tracker).sees
    return TrackerView(name, record.bitmaps(), only_writes)


def _show(
    reference: str, reports: Sequence[tuple[str, Difference]], args: argparse.Namespace
) -> None:
    views = [
        ViewRow(
            view=name,
            n_windows=d.windows,
            reference_pages=d.reference_pages,
            young_pages=d.pages,
            precision_ratio=round(d.precision, 6),
            recall_ratio=round(d.recall, 6),
            jaccard_ratio=round(d.jaccard, 6),
            extra_pages=d.extra,
            missing_pages=d.missing,
        )
        for name, d in reports
    ]
    rows = [
        [v.view, v.n_windows, v.reference_pages, v.young_pages, v.precision_ratio,
         v.recall_ratio, v.jaccard_ratio, _causes(v.extra_pages), _causes(v.missing_pages)]
        for v in views
    ]  # fmt: skip
    names = [
        "view", "n_windows", "reference", "young", "precision", "recall", "jaccard", "extra",
        "missing",
    ]  # fmt: skip
    notes = [
        "page-windows; extra: young there and not in the reference; missing: the other way round;",
        "by what explains them: outside (not looked at), coarse (a larger leaf), tables (the",
        "guest's page tables), reads (it sees writes only), early and late (in the window beside),",
        "around (in 64 KiB with a young page)",
    ]
    formats = {"precision": "%", "recall": "%", "jaccard": "%"}
    output = CompareOutput(reference=reference, views=views)
    table = Table(names, rows, {"reference": reference}, notes=notes, formats=formats)
    show(output, table, args)


def _causes(pages: dict[str, int]) -> str:
    said = ", ".join(f"{cause} {n}" for cause, n in pages.items() if n)
    return said or "none"


def record_guest(args: argparse.Namespace, place: Path) -> tuple[list[Path], list[tuple[int, int]]]:
    """Run the guest once for each tracker; return one record of its epochs per tracker.

    :return: the records, and the gfns of the guest's page tables and parameters
    """
    from kvmhost.machine import Machine
    from kvmhost.reclaim.record.meta import RecordSession
    from kvmhost.reclaim.record.writer import RecordWriter
    from kvmhost.trackers import probe_all

    names = args.tracker or [n for n, s in probe_all(args.engine).items() if s.works]
    params: dict[str, int | str] = {"epochs": 0, **parse_params(args.param)}
    own_directory(place)
    paths, tables = [], set()
    for name in names:
        machine = Machine(
            find_image(args.guest),
            mem_bytes=args.mem,
            engine=args.engine,
            n_vcpus=args.vcpus,
            params=params,
        )
        with machine:
            machine.step_by_doorbell()
            tracker = machine.use_tracker(name)
            n_pages = machine.memory.gfn_end
            tables |= {(a >> 12, (a + n + 4095) >> 12) for a, n in machine.layout.pinned_ranges}
            session = RecordSession(0, name, tracker.table_format)
            with RecordWriter.create(place / name, n_pages, name=name, session=session) as writer:
                for _ in range(args.epochs):
                    machine.run_epoch()
                    young = tracker.harvest(0, n_pages)
                    tracker.rearm(0, n_pages, young)
                    writer.append(young)
        paths.append(place / name)
    return paths, sorted(tables)


def _format_view(name: str, record: YoungRecord) -> TrackerView:
    from kvmhost.reclaim.analyse.compare import TrackerView

    return TrackerView(name, through_table(name, record))


def through_table(name: str, record: YoungRecord) -> Iterator[YoungBitmap]:
    """Yield the windows of a record as reported by a table of another format.

    Every page is mapped, by leaves at the level of the format; for each window, its pages
    are made young and the table is harvested.
    """
    from kvmhost.mmu.memslots import MemSlot, MemSlots
    from kvmhost.mmu.table import Mmu

    table_format, level = FORMATS[name]
    with Mmu(table_format, arena_bytes=64 << 20) as table:
        leaf = table.level_pages(level)
        # Gfns of the model start at 0, so that large leaves are aligned as in the guest.
        shift = record.gfn_start % leaf
        n_leaves = max(-(-(shift + record.n_pages) // leaf), 1)
        n_pages = n_leaves * leaf
        table.set_slots(MemSlots([MemSlot(0, 0, n_pages, 1 << 40)]))
        table.map(0, 0, level, n=n_leaves)
        table.harvest(0, n_pages)
        for bitmap in record.bitmaps():
            words = np.zeros(n_words(n_pages), dtype=np.uint64)
            young = bitmap.gfns() - bitmap.gfn_start + shift
            np.bitwise_or.at(words, young // 64, np.uint64(1) << (young % 64).astype(np.uint64))
            table.mark_young(0, n_pages, words)
            found = table.harvest(0, n_pages)
            yield _cut(found, shift, bitmap)


def _cut(found: YoungBitmap, shift: int, source: YoungBitmap) -> YoungBitmap:
    part = slice(shift, shift + source.n_pages)
    young = np.flatnonzero(found.as_bool()[part]) + source.gfn_start
    coarse = None
    if found.coarse is not None:
        rough = np.flatnonzero(found.coarse_as_bool()[part]) + source.gfn_start
        coarse = YoungBitmap.from_gfns(source.gfn_start, source.n_pages, rough).words
    return YoungBitmap.from_gfns(
        source.gfn_start, source.n_pages, young, coarse=coarse, provenance=found.provenance
    )


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young compare",
        description="Hold records of the same windows against the first of them, page by page, "
        "and tell what explains the differences. --guest makes the records: one run of a guest "
        "for each tracker, an epoch a window.",
    )
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="records")
    parser.add_argument("--guest", metavar="IMAGE", help="a guest to run, for example hotcold")
    add_option(
        parser,
        "--tracker",
        help="with --guest: the first is the reference (default: all that work here)",
        **listing(one_of("tracker", NAMES)),
    )
    add_option(
        parser,
        "--format",
        help=f"table formats to put the first record's bits through: {', '.join(FORMATS)}",
        **listing(one_of("format", tuple(FORMATS))),
    )
    add_option(parser, "--epochs", default=16, help="windows of --guest")
    add_option(parser, "--out", metavar="DIR", help="keep the records of --guest there")
    add_machine_arguments(parser)
    add_output_arguments(parser)
    return parser
