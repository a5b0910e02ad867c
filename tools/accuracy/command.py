"""``kvmhost accuracy``: how accurate and how expensive each tracker is.

The expected young pages are computed from the parameters of the guests
(``guests/workloads.py``), which shares no code with the guests. For each tracker that
works on this host it measures:

- at doorbells: the guest stops after each epoch and is harvested while it is stopped.
  Recall must be 1.0, and so must precision unless the bits are reported as coarse. *old
  after* is the number of harvests until a page that is no longer touched reads as old,
  *new after* the number until a newly touched page reads as young; 1 means immediately.
  Both are given as mean and maximum. With *re-armed* 1/N, each harvest clears and re-arms
  one page in N.
- running: the guest keeps running. A harvest must report every page touched by an epoch
  inside its window (a page it lacks is *missed*) and no page that no epoch overlapping
  the window touched (such a page is *wrong*); the precision lies between the certain and
  the possible value.
- cost: the time of a harvest per page of memory, of clearing and re-arming per young
  page, and of the guest's fault at its next touch; and the guest's throughput relative
  to no harvests, at several intervals, re-arming young pages, all of memory, or a
  sample.

A tracker that only sees writes is compared with the written pages. The exit status is 1
if a tracker is not exact where it must be.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.files import check_target
from kvmhost.suggest import unknown_name
from kvmhost.tools.accuracy import cost, doorbells, running
from kvmhost.tools.accuracy.kinds import (
    CHANGING,
    FREE_WORKLOADS,
    KINDS,
    PAGES,
    WORKLOADS,
    probe_kinds,
)
from kvmhost.tools.args import about, count, mem_bytes, seconds
from kvmhost.tools.measured import head
from kvmhost.tools.outputs.accuracy import (
    AccuracyOutput,
    DoorbellRow,
    PageCostRow,
    RunningRow,
    ThroughputRow,
)
from kvmhost.tools.outputs.base import emit
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress
from kvmhost.tools.vocabulary import add_option, listing, one_of
from kvmhost.trackers.sampling import DEFAULT_FRACTION, period_of
from kvmhost.vm.names import EngineName

__all__ = ["AccuracySettings", "main", "parser", "run"]

_MIN_MEM_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class AccuracySettings:
    """What to measure.

    :param fraction: fraction of the pages that a sampled harvest clears
    :param intervals_s: times between harvests of the throughput rows; empty: no cost
    :param rounds: number of segments of each kind
    :param duration_s: length of a segment; segments with infrequent harvests are longer
    :param mem_bytes: memory size of the guest whose throughput is measured
    """

    engine: EngineName = "auto"
    trackers: tuple[str, ...] = ()
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    epochs: int = 16
    fraction: float = DEFAULT_FRACTION
    intervals_s: tuple[float, ...] = (10.0, 1.0, 0.1)
    rounds: int = 3
    duration_s: float = 1.0
    mem_bytes: int = 256 << 20

    def quick(self) -> AccuracySettings:
        """Return reduced settings, with which a run takes seconds."""
        workloads = tuple(w for w in self.workloads if w in _QUICK) or self.workloads
        return dataclasses.replace(
            self,
            workloads=workloads,
            epochs=min(self.epochs, 10),
            intervals_s=self.intervals_s[-1:],
            rounds=1,
            duration_s=min(self.duration_s, 0.3),
            mem_bytes=min(self.mem_bytes, 32 << 20),
        )


_QUICK = ("random-writes", "zipf-0.9", "read-only", "phases-2-vcpus")


def run(
    settings: AccuracySettings, say: Callable[[str], None] = lambda text: None
) -> AccuracyOutput:
    """Measure.

    :raises LayoutError: for a tracker or workload that does not exist
    :raises CapabilityError: if none of the trackers works on this host
    """
    _known(settings.trackers, KINDS, "tracker")
    _known(settings.workloads, WORKLOADS, "workload")
    support = probe_kinds(settings.engine)
    names = settings.trackers or tuple(KINDS)
    working = [name for name in names if support[name].works]
    if not working:
        raise CapabilityError("accuracy", "a tracker", support[names[0]].reason, "kvmhost doctor")
    rows = _Rows()
    for name in working:
        _measure(settings, name, rows, say)
    return AccuracyOutput(
        **head(),
        engine=settings.engine,
        n_pages=PAGES,
        fraction=1 / period_of(settings.fraction),
        mem_bytes=settings.mem_bytes,
        doorbells=rows.doorbells,
        running=rows.running,
        cost=rows.cost,
        throughput=rows.throughput,
        missing={name: support[name].reason for name in names if not support[name].works},
        exact=all(map(_is_exact, rows.doorbells)) and all(map(_is_right, rows.running)),
    )


@dataclasses.dataclass
class _Rows:
    """The rows of the trackers so far."""

    doorbells: list[DoorbellRow] = dataclasses.field(default_factory=list)
    running: list[RunningRow] = dataclasses.field(default_factory=list)
    cost: list[PageCostRow] = dataclasses.field(default_factory=list)
    throughput: list[ThroughputRow] = dataclasses.field(default_factory=list)


def _measure(
    settings: AccuracySettings, name: str, rows: _Rows, say: Callable[[str], None]
) -> None:
    kind, engine = KINDS[name], settings.engine
    sampled = period_of(settings.fraction)
    for period in sorted({1, sampled}):
        for workload in settings.workloads:
            if period == 1 or workload in CHANGING:
                say(f"{name}: {workload} at doorbells, one page in {period} re-armed")
                rows.doorbells.append(
                    doorbells.measure(
                        kind, workload, WORKLOADS[workload], engine, settings.epochs, period
                    )
                )
    for workload in FREE_WORKLOADS:
        say(f"{name}: {workload}, running")
        rows.running.append(running.measure(kind, workload, engine, settings.duration_s))
    if settings.intervals_s:
        say(f"{name}: cost")
        by_page, throughput = cost.measure(
            kind,
            engine,
            settings.mem_bytes,
            tuple(1 / interval_s for interval_s in settings.intervals_s),
            sampled,
            settings.rounds,
            settings.duration_s,
        )
        rows.cost.append(by_page)
        rows.throughput += throughput


def _is_exact(row: DoorbellRow) -> bool:
    """Return whether a row is as exact as its tracker claims to be.

    Recall must be 1.0, and precision too where the tracker is not coarse. A sampled
    harvest misses no touch either, but reports too many young pages.
    """
    precise = row.precision_ratio == 1.0 or row.coarse or row.fraction < 1
    return row.recall_ratio == 1.0 and precise


def _is_right(row: RunningRow) -> bool:
    return not row.missed_pages and (row.coarse or not row.wrong_pages)


def _known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise LayoutError(unknown_name(what, name, known))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 0 if all trackers are exact where they must be, else 1."""
    options = parser().parse_args(argv)
    if options.out is not None:
        _check_plot(options.out)
    settings = AccuracySettings(
        engine=options.engine,
        trackers=tuple(options.tracker or ()),
        workloads=tuple(options.workload),
        epochs=options.epochs,
        fraction=options.fraction,
        intervals_s=() if options.no_cost else tuple(options.interval),
        rounds=options.rounds,
        duration_s=options.duration,
        mem_bytes=options.mem,
    )
    report = run(settings.quick() if options.quick else settings, Progress().say)
    if options.out is not None:
        from kvmhost.tools.accuracy.plot import draw

        draw(report, options.out)
    if options.json:
        emit(report)
    else:
        from kvmhost.tools.accuracy.table import show

        show(report)
    return 0 if report.exact else 1


def _check_plot(path: Path) -> None:
    from kvmhost.reclaim.draw.render import need_plotting

    need_plotting()
    if path.suffix.lower() != ".png":
        raise LayoutError(f"{path}: the name must end in .png")
    check_target(path)


def parser() -> CommandParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        prog="kvmhost accuracy",
        description=about(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_option(parser, "--engine")
    add_option(
        parser,
        "--tracker",
        **listing(one_of("tracker", tuple(KINDS))),
        help=f"trackers to measure (default: all that work, of {', '.join(KINDS)})",
    )
    add_option(
        parser,
        "--workload",
        **listing(one_of("workload", tuple(WORKLOADS)), default=list(WORKLOADS)),
        help=f"workloads to measure (default: {', '.join(WORKLOADS)})",
    )
    add_option(
        parser, "--epochs", type=_at_least_two, default=16, help="epochs, each with one harvest"
    )
    add_option(
        parser, "--fraction", help="part of the pages that a harvest with sampled re-arming clears"
    )
    add_option(
        parser,
        "--interval",
        **listing(seconds, "TIME", default=list(AccuracySettings.intervals_s)),
        help="times between two harvests of the throughput rows (default: 10s,1s,100ms)",
    )
    add_option(
        parser,
        "--mem",
        type=_guest_size,
        default="256M",
        help="memory of the guest whose throughput is measured; it touches a tenth of it",
    )
    add_option(parser, "--rounds", default=3, help="segments of each kind")
    add_option(parser, "--duration")
    parser.add_argument("--no-cost", action="store_true", help="do not measure cost and throughput")
    parser.add_argument(
        "--quick", action="store_true", help="few workloads and short segments; takes seconds"
    )
    add_option(parser, "--json")
    add_option(parser, "--out", metavar="FILE.png", help="draw the figures into this file")
    return parser


def _at_least_two(text: str) -> int:
    value = count(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: need 2 or more")
    return value


def _guest_size(text: str) -> int:
    value = mem_bytes(text)
    if value < _MIN_MEM_BYTES or value % 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: need 16M or more, in pages of 4 KiB")
    return value
