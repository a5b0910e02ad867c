"""``kvmhost young stat``: the contents of a record, and its main statistics."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
        facts = _facts(record) | covered
        found = histograms(record)
        if len(record):
            alike = jaccard_of_neighbours(record) if args.full else np.zeros(0)
            if alike.size:
                facts["alike_next_window"] = round(float(alike.mean()), 4)
            saving = predict_saving(found)
            if saving is not None:
                facts["saved_at_0.2_percent_mib"] = round(
                    mib(saving.saved_pages, record.metadata.page_bytes), 3
                )
            sizes, ratios = miss_ratio_curve(found)
            facts["reuse"] = [
                {"pages": round(float(size), 1), "miss_ratio": round(float(ratio), 6)}
                for size, ratio in zip(sizes, ratios, strict=True)
            ]
        phases = find_phases(record)
        seconds = found.seconds
    rows = [
        [p.first, p.end, round(float(seconds[p.end - 1]), 3), round(p.change, 4),
         round(p.young_pages, 1)]
        for p in phases
    ]  # fmt: skip
    names = ["window", "end", "until_seconds", "change", "young_mean"]
    notes = ["these are phases; change: how much differs from the phase before, from 0 to 1"]
    notes = [*(notes if rows else []), *remarks, *_reuse_notes(facts), *_history_notes(facts)]
    formats = {"window": "plain", "end": "plain"}
    show(Table(names, rows, facts, notes=notes, formats=formats), args)
    return 0


def _facts(record: YoungRecord) -> dict[str, Any]:
    from kvmhost.reclaim.record.clock import (
        elapsed_s,
        find_jumps,
        interval_s,
        lengths_s,
        weighted_mean,
    )

    meta, n = record.metadata, len(record)
    stored = sum(f.stat().st_size for f in record.path.rglob("*") if f.is_file())
    young = record.column("n_young")
    flat = int(record.column("n_pages").sum()) // 8
    seconds = elapsed_s(record)
    last = record.session(-1) if n else meta.sessions[-1]
    facts: dict[str, Any] = {
        "vm": meta.name,
        "created": datetime.datetime.fromtimestamp(meta.created_ns / 1e9, datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "windows": n,
        "interval_s": round(interval_s(record), 6),
        "seconds": round(float(seconds[-1]), 3) if n else 0.0,
        "gfn_start": f"{record.gfn_start:#x}",
        "pages": record.n_pages,
        "mib": mib(record.n_pages, meta.page_bytes),
        "tracker": last.tracker,
        "table_format": last.table_format,
        "stored_mib": round(stored / 2**20, 3),
        "stored_bytes_a_window": stored // n if n else 0,
        "smaller_than_bits": round(flat / stored, 1) if stored else 0.0,
        "being_written": record.is_being_written(),
        "loss": record.loss or None,
        "young_mean": round(float(weighted_mean(young, lengths_s(record))), 1) if n else 0.0,
        "young_max": int(young.max()) if n else 0,
        "clock_jumps": [vars(jump) for jump in find_jumps(record)],
        "sessions": [
            {"first_window": s.first_window, "tracker": s.tracker, "format": s.table_format,
             **s.facts}
            for s in meta.sessions
        ],
        "layouts": [
            {"first_window": part.first_window,
             "memslots": [{"slot": m.slot, "gfn": m.gfn, "pages": m.n_pages, "hva": m.hva}
                          for m in part.memslots]}
            for part in meta.layouts
        ],
    }  # fmt: skip
    return facts


def _history_notes(facts: dict[str, Any]) -> Iterator[str]:
    """Yield notes on the sessions, memory layouts and clock jumps in a record."""
    for session in facts["sessions"]:
        said = ", ".join(f"{k} {v}" for k, v in session.items() if k != "first_window" and v)
        yield f"from window {session['first_window']}: {said}"
    for layout in facts["layouts"]:
        slots = ", ".join(
            f"slot {m['slot']} [{m['gfn']:#x}, {m['gfn'] + m['pages']:#x})"
            for m in layout["memslots"]
        )
        yield f"from window {layout['first_window']}: {slots}"
    for jump in facts["clock_jumps"]:
        yield (
            f"clocks disagree before window {jump['window']}: monotonic "
            f"{jump['monotonic_s']:+.3f} s, wall {jump['wall_s']:+.3f} s"
        )


def _reuse_notes(facts: dict[str, Any]) -> Iterator[str]:
    points = facts.get("reuse", [])
    picked = points[1 :: max(len(points) // 6, 1)][:6]
    if picked:
        said = ", ".join(f"{p['pages']:,.0f}: {100 * p['miss_ratio']:.1f} %" for p in picked)
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
