"""``kvmhost bench sampling``: clear and re-arm only a fraction of the pages per harvest.

A 1 GiB guest touches a tenth of its memory repeatedly and is harvested once per second.
For each fraction, the benchmark measures the time that the guest loses relative to no
harvests, in turn; and, on a small guest whose hot set moves, the number of harvests until
an untouched page reads as old. The default of ``rearm=sample`` is the largest fraction
measured here whose loss is certainly below 3 %.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.suggest import unknown_name
from kvmhost.tools.accuracy import doorbells
from kvmhost.tools.accuracy.kinds import KINDS, AccuracyWorkload, TrackerKind, probe_kinds
from kvmhost.tools.args import about, share
from kvmhost.tools.bench.harvest import hot_machine
from kvmhost.tools.measured import bench_head
from kvmhost.tools.outputs.accuracy import DoorbellRow
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.outputs.bench import FractionRow, SamplingOutput, SamplingParameters
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress
from kvmhost.tools.throughput import Kept, ThroughputPlan, paired_rates
from kvmhost.tools.vocabulary import add_option, listing, one_of
from kvmhost.trackers.sampling import DEFAULT_FRACTION, period_of
from kvmhost.units import PAGE_BYTES

__all__ = ["main", "parser", "run"]

_FRACTIONS = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
#: Phases of a staleness run; each is twice as long as a page may wait to be sampled.
_PHASES = 4


def run(
    tracker: str = "guestpt",
    fractions: Sequence[float] = _FRACTIONS,
    *,
    mem_bytes: int = 1 << 30,
    hot_share: float = 0.1,
    duration_s: float = 1.0,
    rounds: int = 9,
) -> SamplingOutput:
    """Measure each fraction.

    :raises LayoutError: for an unknown tracker or a bad fraction
    :raises CapabilityError: if the tracker does not work here
    """
    if tracker not in KINDS:
        raise LayoutError(unknown_name("tracker", tracker, KINDS))
    support = probe_kinds("kvm")[tracker]
    if not support.works:
        raise CapabilityError(f"tracker {tracker}", "the kvm engine", support.reason, "")
    kind, progress = KINDS[tracker], Progress()
    hot = int(mem_bytes // PAGE_BYTES * hot_share)
    plans = [ThroughputPlan(1.0, period=period_of(fraction)) for fraction in fractions]
    progress.say("throughput")
    with hot_machine(kind, mem_bytes, hot) as machine:
        machine.run_epoch()
        used = kind.use(machine)
        machine.step_by_doorbell(False)
        kept = paired_rates(machine, used, plans, rounds, duration_s / 2, lambda plan: duration_s)
    rows = []
    for plan, values in kept.items():
        progress.say(f"staleness of 1/{plan.period}")
        rows.append(_row(plan.period, values, _staleness(kind, plan.period)))
    parameters = SamplingParameters(
        tracker=tracker, mem_bytes=mem_bytes, hot_pages=hot, duration_s=duration_s, rounds=rounds
    )
    return SamplingOutput(
        **bench_head("sampling"),
        parameters=parameters,
        default_fraction=DEFAULT_FRACTION,
        fractions=rows,
    )


def _row(period: int, kept: list[Kept], stale: DoorbellRow) -> FractionRow:
    return FractionRow(
        fraction=1 / period,
        lost_share=1 - statistics.median(one.wall for one in kept),
        min_lost_share=1 - max(one.wall for one in kept),
        max_lost_share=1 - min(one.wall for one in kept),
        lost_by_cpu_share=1 - statistics.median(one.cpu for one in kept),
        recall_ratio=stale.recall_ratio,
        mean_old_after_harvests=stale.mean_old_after_harvests,
        max_old_after_harvests=stale.max_old_after_harvests,
        max_new_after_harvests=stale.max_new_after_harvests,
    )


def _staleness(kind: TrackerKind, period: int) -> DoorbellRow:
    params = {"hot": 512, "cold": 0, "scan_every": 0, "write_permille": 1000}
    params |= {"phase_every": 2 * period, "phase_step": 512}
    workload = AccuracyWorkload("hotcold", params)
    return doorbells.measure(kind, "phases", workload, "kvm", _PHASES * 2 * period, period)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost bench sampling",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(
        parser,
        "--tracker",
        type=one_of("tracker", tuple(KINDS)),
        default="guestpt",
        help="the tracker to measure",
    )
    add_option(
        parser,
        "--fraction",
        **listing(share, "SHARE"),
        help="fractions to measure (default: 1,1/2,1/4,1/8,1/16,1/32)",
    )
    add_option(parser, "--mem", default="1G")
    add_option(parser, "--duration")
    add_option(parser, "--rounds", default=9, help="segments of each fraction")
    add_option(parser, "--json")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the figures as a table, or as JSON."""
    options = parser().parse_args(argv)
    result = run(
        options.tracker,
        options.fraction or _FRACTIONS,
        mem_bytes=options.mem,
        duration_s=options.duration,
        rounds=options.rounds,
    )
    if options.json:
        emit(result)
        return 0
    given = result.parameters
    hot = f"{given.hot_pages:,} hot pages, one harvest a second, {given.tracker}"
    print(f"guest of {given.mem_bytes >> 20} MiB, {hot}\n")
    print(
        "| re-armed | guest's time lost, % | by its processor time, % | recall "
        "| reads as old after | as young after |"
    )
    print("|---|---|---|---|---|---|")
    for row in result.fractions:
        print(
            f"| 1/{1 / row.fraction:.0f} | {100 * row.lost_share:.1f} "
            f"({100 * row.min_lost_share:.1f} to {100 * row.max_lost_share:.1f}) | "
            f"{100 * row.lost_by_cpu_share:.1f} | {row.recall_ratio:.1f} | "
            f"{_old_after(row)} | {row.max_new_after_harvests} |"
        )
    return 0


def _old_after(row: FractionRow) -> str:
    if row.mean_old_after_harvests is None:
        return "-"
    return f"{row.mean_old_after_harvests:.1f} harvests, {row.max_old_after_harvests} at most"
