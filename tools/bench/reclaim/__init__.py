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
from collections.abc import Callable, Sequence

from kvmhost.errors import LayoutError
from kvmhost.tools.args import about
from kvmhost.tools.bench.reclaim.workloads import BUDGETS, WORKLOADS
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.benchparts import ReclaimOutput, ReclaimParameters
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.vocabulary import add_option, listing, one_of

__all__ = ["PARTS", "main", "parser", "run"]

PARTS = ("trace", "guests", "cost", "rows")


def run(
    parts: Sequence[str] = PARTS,
    *,
    workloads: Sequence[str] = tuple(WORKLOADS),
    pages: int = 8192,
    windows: int = 200,
    duration_s: float = 3.0,
    budgets: Sequence[float] = BUDGETS,
    cost_mem_bytes: int = 1 << 30,
    tell: Callable[[str], None] = lambda text: None,
) -> ReclaimOutput:
    """Run parts.

    :raises CapabilityError: for all parts but ``trace``, without /dev/kvm
    """
    from kvmhost.tools.bench.reclaim import guests, rows, trace

    parameters = ReclaimParameters(
        parts=list(parts),
        workloads=list(workloads),
        n_pages=pages,
        n_windows=windows,
        duration_s=duration_s,
        mem_bytes=cost_mem_bytes,
    )
    return ReclaimOutput(
        **bench_head("reclaim"),
        parameters=parameters,
        trace=trace.run(workloads, pages, windows, budgets, tell) if "trace" in parts else [],
        guests=guests.run(workloads, pages * 2, duration_s, budgets, tell)
        if "guests" in parts
        else [],
        cost=guests.cost(cost_mem_bytes, duration_s * 2, tell) if "cost" in parts else [],
        rows=rows.run(pages * 2, tell) if "rows" in parts else [],
    )


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost bench reclaim",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(
        parser,
        "--part",
        **listing(one_of("part", PARTS), default=list(PARTS)),
        help=f"parts to run (default: {', '.join(PARTS)})",
    )
    add_option(
        parser,
        "--workload",
        **listing(one_of("workload", tuple(WORKLOADS)), default=list(WORKLOADS)),
        help=f"workloads to run (default: {', '.join(WORKLOADS)})",
    )
    add_option(parser, "--pages", help="pages of a trace; a guest has twice as many")
    add_option(parser, "--count", default=200, help="windows of a trace")
    add_option(parser, "--duration", default="3s")
    add_option(parser, "--json")
    add_option(
        parser, "--out", metavar="FILE.png", help="draw parts trace and guests into this file"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as tables or as JSON, and plot them if requested."""
    from kvmhost.tools.bench.reclaim import show

    options = parser().parse_args(argv)
    if options.out is not None:
        if not {"trace", "guests"} & set(options.part):
            raise LayoutError("--out draws parts trace and guests, which --part leaves out")
        show.need_file(options.out)
    report = run(
        options.part,
        workloads=options.workload,
        pages=options.pages,
        windows=options.count,
        duration_s=options.duration,
        tell=show.progress,
    )
    if options.json:
        emit(report)
    else:
        print(show.tables(report))
    if options.out is not None:
        show.plot(report, options.out)
    return 0
