"""``kvmhost young ages``: the ages of pages, and the refaults that evicting them would cause."""

from __future__ import annotations

from collections.abc import Sequence

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

__all__ = ["main", "parser"]

_SHOWN = 24
_NOTES = (
    "pages: that were last young so long ago, at the end; colder: pages older than that;",
    "promotions_min: pages a minute that come back after having been cold for that long;",
    "rate_min: the same as a share of the working set",
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
            [
                windows,
                round(age_s(found, windows), 3),
                int(ages[bucket]),
                cold,
                round(share(cold, total), 6),
                at and round(at.promotions_per_min, 3),
                at and round(at.promotion_rate, 6),
            ]
        )
    saving = predict_saving(found, args.target / 100) if len(found) else None
    facts = covered | {"pages": total, "never_young": int(ages[0]), "target_percent": args.target}
    if saving is not None:
        facts |= {
            "cold_after_windows": saving.threshold.windows,
            "saved_mib": round(mib(saving.saved_pages, page_bytes), 3),
            "saved_share": round(saving.saved_share, 6),
            "promotions_per_min": round(saving.threshold.promotions_per_min, 3),
        }
    names = ["windows", "seconds", "pages", "colder", "share", "promotions_min", "rate_min"]
    formats = {"share": "%", "rate_min": "%"}
    notes = [*_NOTES, *remarks]
    if saving is None:
        notes.append(f"no threshold keeps to {args.target:g} % of the working set a minute")
    show(Table(names, rows, facts, _SHOWN, True, notes, formats), args)
    return 0


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
        type=float,
        default=0.2,
        metavar="PERCENT",
        help="promotions a minute that are bearable, in percent of the working set (default: 0.2)",
    )
    add_output_arguments(parser)
    return parser
