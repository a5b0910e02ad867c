"""``kvmhost young ages``: the ages of pages, and the refaults that evicting them would cause."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kvmhost.tools.args import share as share_of
from kvmhost.tools.outputs.young import AgeRow, AgesOutput, SavingRow
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.young.output import (
    Table,
    add_output_arguments,
    add_record_arguments,
    coverage_facts,
    mib,
    share,
    show,
    windows_of,
)
from kvmhost.tools.young.source import add_windows_source, open_windows

if TYPE_CHECKING:
    from kvmhost.reclaim.analyse.analysis import Saving

__all__ = ["main", "parser"]

_SHOWN = 24
_NOTES = (
    "n_pages: that were last young so long ago, at the end; colder_pages: older than that;",
    "promotions_per_minute: pages that come back after having been cold for that long;",
    "promotion_share_per_minute: the same as a share of the working set",
)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from kvmhost.reclaim.analyse.analysis import (
        age_s,
        age_table,
        histograms,
        predict_saving,
        promotion_curve,
    )
    from kvmhost.reclaim.record.meta import UPPER

    with open_windows(args) as record:
        first, end = windows_of(record, args.windows)
        found = histograms(record, first, end, args.range)
        page_bytes = record.metadata.page_bytes
        covered, remarks = coverage_facts(record, first, end)
    curve = {threshold.windows: threshold for threshold in promotion_curve(found)}
    ages = age_table(found)
    total = int(ages.sum())
    cold, rows = total, []
    for bucket in range(1, UPPER.size):
        windows = int(UPPER[bucket])
        if windows > len(found) + first:
            break
        cold -= int(ages[bucket])
        at = curve.get(windows)
        rows.append(
            AgeRow(
                n_windows=windows,
                age_s=round(age_s(found, windows), 3),
                n_pages=int(ages[bucket]),
                colder_pages=cold,
                colder_share=round(share(cold, total), 6),
                promotions_per_minute=None if at is None else round(at.promotions_per_min, 3),
                promotion_share_per_minute=None if at is None else round(at.promotion_rate, 6),
            )
        )
    output = AgesOutput(
        **covered,
        page_bytes=page_bytes,
        n_pages=total,
        never_young_pages=int(ages[0]),
        target_share_per_minute=float(args.target),
        saving=_saving(predict_saving(found, args.target) if len(found) else None),
        ages=rows,
    )
    _show(output, covered, remarks, args)
    return 0


def _saving(found: Saving | None) -> SavingRow | None:
    if found is None:
        return None
    return SavingRow(
        cold_after_windows=found.threshold.windows,
        saved_pages=round(found.saved_pages, 3),
        saved_share=round(found.saved_share, 6),
        promotions_per_minute=round(found.threshold.promotions_per_min, 3),
    )


def _show(
    output: AgesOutput, covered: dict[str, Any], remarks: list[str], args: argparse.Namespace
) -> None:
    target = f"{100 * output.target_share_per_minute:g} %"
    facts = covered | {
        "pages": output.n_pages,
        "never_young": output.never_young_pages,
        "target_per_minute": target,
    }
    notes, saving = [*_NOTES, *remarks], output.saving
    if saving is None:
        notes.append(f"no threshold keeps to {target} of the working set per minute")
    else:
        facts |= {
            "cold_after_windows": saving.cold_after_windows,
            "saved_mib": round(mib(saving.saved_pages, output.page_bytes), 3),
            "saved_share": saving.saved_share,
            "promotions_per_minute": saving.promotions_per_minute,
        }
    rows = [msgspec.structs.astuple(row) for row in output.ages]
    formats = {"colder_share": "%", "promotion_share_per_minute": "%"}
    names = list(AgeRow.__struct_fields__)
    show(output, Table(names, rows, facts, _SHOWN, True, notes, formats), args)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost young ages",
        description="Show the histogram of cold ages at the end of the windows, what each age "
        "would mean as a threshold (cold memory against promotions, that is refaults), and "
        "what can be saved at a target.",
    )
    add_windows_source(parser)
    add_record_arguments(parser)
    parser.add_argument(
        "--target",
        type=share_of,
        default="0.2%",
        metavar="SHARE",
        help="acceptable promotions per minute, as a share of the working set (default: 0.2%%)",
    )
    add_output_arguments(parser)
    return parser
