"""``kvmhost young stat``: the contents of a record, and its main statistics."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmhost.tools.outputs.records import (
    JumpRow,
    LayoutRow,
    PhaseRow,
    ReuseRow,
    SessionRow,
    SlotRow,
    StatOutput,
)
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    coverage_facts,
    mib,
    show,
)
from kvmhost.tools.young.source import add_windows_source, open_windows

if TYPE_CHECKING:
    from kvmhost.reclaim.record.reader import YoungRecord

__all__ = ["main", "parser"]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.analysis import histograms, miss_ratio_curve, predict_saving
    from kvmhost.reclaim.analyse.patterns import find_phases, jaccard_of_neighbours

    with open_windows(args) as record:
        covered, remarks = coverage_facts(record, 0, len(record))
        found = histograms(record)
        alike = jaccard_of_neighbours(record) if args.full and len(record) else np.zeros(0)
        saving = predict_saving(found) if len(record) else None
        sizes, ratios = miss_ratio_curve(found) if len(record) else (np.zeros(0), np.zeros(0))
        output = StatOutput(
            **covered,
            **_contents(record),
            **_history(record),
            **_residency(record),
            next_window_jaccard_ratio=round(float(alike.mean()), 4) if alike.size else None,
            saved_pages=None if saving is None else round(saving.saved_pages, 1),
            reuse=[
                ReuseRow(mean_pages=round(float(size), 1), miss_ratio=round(float(ratio), 6))
                for size, ratio in zip(sizes, ratios, strict=True)
            ],
            phases=[
                PhaseRow(
                    first_window=p.first,
                    n_windows=p.end - p.first,
                    end_s=round(float(found.seconds[p.end - 1]), 3),
                    change_ratio=round(p.change, 4),
                    mean_pages=round(p.young_pages, 1),
                )
                for p in find_phases(record)
            ],
        )
    _show(output, remarks, args)
    return 0


def _contents(record: YoungRecord) -> dict[str, Any]:
    from kvmhost.reclaim.record.clock import elapsed_s, interval_s, lengths_s, weighted_mean

    meta, n = record.metadata, len(record)
    stored = sum(f.stat().st_size for f in record.path.rglob("*") if f.is_file())
    young = record.column("n_young")
    flat = int(record.column("n_pages").sum()) // 8
    last = record.session(-1) if n else meta.sessions[-1]
    created = datetime.datetime.fromtimestamp(meta.created_ns / 1e9, datetime.UTC)
    return {
        "vm": meta.name,
        "created": created.isoformat(timespec="seconds"),
        "n_windows": n,
        "interval_s": round(interval_s(record), 6),
        "duration_s": round(float(elapsed_s(record)[-1]), 3) if n else 0.0,
        "gfn_start": record.gfn_start,
        "n_pages": record.n_pages,
        "page_bytes": meta.page_bytes,
        "tracker": last.tracker,
        "table_format": last.table_format,
        "stored_bytes": stored,
        "bits_ratio": round(flat / stored, 1) if stored else None,
        "being_written": record.is_being_written(),
        "loss": record.loss,
        "mean_young_pages": round(float(weighted_mean(young, lengths_s(record))), 1) if n else None,
        "max_young_pages": int(young.max()) if n else None,
    }


def _residency(record: YoungRecord) -> dict[str, Any]:
    """Return what the record has of residency."""
    from kvmhost.reclaim.record.meta import EVENTS

    known = np.flatnonzero(record.has_residency())
    last = int(known[-1]) if known.size else None
    return {
        "n_residency_windows": int(known.size),
        "resident_pages": None if last is None else int(record.column("n_resident")[last]),
        "evicted_pages": None if last is None else int(record.column("n_evicted")[last]),
        "event_pages": {name: int(record.column(f"n_{name}").sum()) for name in EVENTS},
    }


def _history(record: YoungRecord) -> dict[str, Any]:
    from kvmhost.reclaim.record.clock import find_jumps

    meta = record.metadata
    return {
        "clock_jumps": [JumpRow(**vars(jump)) for jump in find_jumps(record)],
        "sessions": [
            SessionRow(
                first_window=s.first_window,
                tracker=s.tracker,
                table_format=s.table_format,
                facts=dict(s.facts),
            )
            for s in meta.sessions
        ],
        "layouts": [
            LayoutRow(
                first_window=part.first_window,
                memslots=[
                    SlotRow(slot=m.slot, gfn_start=m.gfn, n_pages=m.n_pages, hva=m.hva)
                    for m in part.memslots
                ],
            )
            for part in meta.layouts
        ],
    }


def _show(output: StatOutput, remarks: list[str], args: argparse.Namespace) -> None:
    rows = [
        [p.first_window, p.n_windows, p.end_s, p.change_ratio, p.mean_pages] for p in output.phases
    ]
    names = ["window", "n_windows", "end_s", "change_ratio", "mean_pages"]
    notes = ["these are phases; change_ratio: difference from the phase before, 0 to 1"]
    notes = [*(notes if rows else []), *remarks, *_event_notes(output), *_reuse_notes(output)]
    notes += _history_notes(output)
    table = Table(names, rows, _facts(output), notes=notes, formats={"window": "plain"})
    show(output, table, args)


def _event_notes(output: StatOutput) -> Iterator[str]:
    """Yield what happened to pages, or that it is not known."""
    if not output.n_residency_windows:
        yield "residency unknown: no pager was asked"
    elif any(output.event_pages.values()):
        said = ", ".join(f"{name} {count:,}" for name, count in output.event_pages.items() if count)
        yield f"events of pages: {said}"


def _facts(output: StatOutput) -> dict[str, Any]:
    """Return the lines above the phases."""
    facts = {
        name: getattr(output, name)
        for name in StatOutput.__struct_fields__
        if name not in ("page_bytes", "saved_pages", "next_window_jaccard_ratio")
    }
    facts["gfn_start"] = f"{output.gfn_start:#x}"
    facts["loss"] = output.loss or None
    facts["mib"] = mib(output.n_pages, output.page_bytes)
    if output.next_window_jaccard_ratio is not None:
        facts["next_window_jaccard_ratio"] = output.next_window_jaccard_ratio
    if output.saved_pages is not None:
        facts["saved_mib_at_0.2_%"] = round(mib(output.saved_pages, output.page_bytes), 3)
    return facts


def _history_notes(output: StatOutput) -> Iterator[str]:
    """Yield notes on the sessions, memory layouts and clock jumps in a record."""
    for session in output.sessions:
        sources = {"tracker": session.tracker, "format": session.table_format, **session.facts}
        said = ", ".join(f"{name} {value}" for name, value in sources.items() if value)
        yield f"from window {session.first_window}: {said}"
    for layout in output.layouts:
        slots = ", ".join(
            f"slot {m.slot} [{m.gfn_start:#x}, {m.gfn_start + m.n_pages:#x})"
            for m in layout.memslots
        )
        yield f"from window {layout.first_window}: {slots}"
    for jump in output.clock_jumps:
        yield (
            f"clocks disagree before window {jump.window}: monotonic {jump.monotonic_s:+.3f} s, "
            f"wall {jump.wall_s:+.3f} s"
        )


def _reuse_notes(output: StatOutput) -> Iterator[str]:
    points = output.reuse
    picked = points[1 :: max(len(points) // 6, 1)][:6]
    if picked:
        said = ", ".join(f"{p.mean_pages:,.0f}: {100 * p.miss_ratio:.1f} %" for p in picked)
        yield f"misses an LRU memory of so many pages would have (estimated): {said}"


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young stat",
        description="Show what a record holds and where it comes from, its size, its main "
        "figures, and the phases of the guest.",
    )
    add_windows_source(parser)
    parser.add_argument(
        "--full", action="store_true", help="also what needs all bits: likeness of neighbours"
    )
    add_output_arguments(parser)
    return parser
