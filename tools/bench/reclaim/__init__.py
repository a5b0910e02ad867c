"""``kvmhost bench reclaim``: refaults of each policy, compared with the minimum possible.

Each of the four parts is a comparison within one run:

- **trace**: the pages that each window of a workload touches are computed from its seed
  and replayed through every policy and through Belady's optimum (deterministic, no KVM);
- **guests**: the same workloads run as real guests under a limit, with one pass per
  second; measured are refaults, wrong evictions, throughput relative to the same guest
  with the same harvests and no limit, and Belady's optimum for the recorded windows;
- **cost**: the processor time and memory of the daemon for a large guest;
- **rows**: the second pass over memory under a limit, with aging page by page under the
  MMU lock, in batches without it, and with the two lists (the rows of 2023).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvmhost.tools.args import about, seconds
from kvmhost.tools.bench.reclaim.workloads import BUDGETS, WORKLOADS
from kvmhost.tools.parser import CommandParser

__all__ = ["PARTS", "main", "parser", "run"]

PARTS = ("trace", "guests", "cost", "rows")


def run(
    parts: Sequence[str] = PARTS,
    *,
    workloads: Sequence[str] = tuple(WORKLOADS),
    pages: int = 8192,
    windows: int = 200,
    seconds_each: float = 3.0,
    budgets: Sequence[float] = BUDGETS,
    cost_mem_bytes: int = 1 << 30,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run parts and return their rows by part.

    :raises CapabilityError: for all parts but ``trace``, without /dev/kvm
    """
    from kvmhost.tools.bench.reclaim import guests, rows, trace

    report: dict[str, Any] = {}
    if "trace" in parts:
        report["trace"] = trace.run(workloads, pages, windows, budgets, tell)
    if "guests" in parts:
        report["guests"] = guests.run(workloads, pages * 2, seconds_each, budgets, tell)
    if "cost" in parts:
        report["cost"] = guests.cost(cost_mem_bytes, seconds_each * 2, tell)
    if "rows" in parts:
        report["rows"] = rows.run(pages * 2, tell)
    return report


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost bench reclaim",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only these; repeatable")
    parser.add_argument(
        "--workload", action="append", choices=tuple(WORKLOADS), help="only these; repeatable"
    )
    parser.add_argument("--pages", type=int, default=8192, help="pages of a trace (default: 8192)")
    parser.add_argument("--windows", type=int, default=200, help="windows of a trace")
    parser.add_argument(
        "--seconds", type=seconds, default=3.0, help="length of each real segment (default: 3)"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as tables or as JSON, and plot them if requested."""
    from kvmhost.tools.bench.reclaim import show

    options = parser().parse_args(argv)
    if options.plot is not None:
        show.need_file(options.plot)
    report = run(
        options.part or PARTS,
        workloads=options.workload or tuple(WORKLOADS),
        pages=options.pages,
        windows=options.windows,
        seconds_each=options.seconds,
        tell=show.progress,
    )
    print(json.dumps(report, indent=2) if options.json else show.tables(report))
    if options.plot is not None:
        show.plot(report, options.plot)
    return 0
