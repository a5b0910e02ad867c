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
  to no harvests, at several harvest rates, re-arming young pages, all of memory, or a
  sample.

A tracker that only sees writes is compared with the written pages. The exit status is 1
if a tracker is not exact where it must be.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

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
from kvmhost.tools.args import about, count, seconds, share, size_bytes
from kvmhost.tools.parser import CommandParser
from kvmhost.tools.progress import Progress
from kvmhost.trackers.sampling import DEFAULT_FRACTION, period_of

__all__ = ["AccuracySettings", "main", "parser", "run"]

_MIN_MEM_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class AccuracySettings:
    """What to measure.

    :param fraction: fraction of the pages that a sampled harvest clears
    :param rates: harvests per second of the throughput rows; empty: cost is not measured
    :param rounds: number of segments of each kind
    :param seconds: length of a segment; segments with infrequent harvests are longer
    :param mem_bytes: memory size of the guest whose throughput is measured
    """

    engine: str = "auto"
    trackers: tuple[str, ...] = ()
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    epochs: int = 16
    fraction: float = DEFAULT_FRACTION
    rates: tuple[float, ...] = (0.1, 1.0, 10.0)
    rounds: int = 3
    seconds: float = 1.0
    mem_bytes: int = 256 << 20

    def quick(self) -> AccuracySettings:
        """Return reduced settings, with which a run takes seconds."""
        workloads = tuple(w for w in self.workloads if w in _QUICK) or self.workloads
        return dataclasses.replace(
            self,
            workloads=workloads,
            epochs=min(self.epochs, 10),
            rates=self.rates[-1:],
            rounds=1,
            seconds=min(self.seconds, 0.3),
            mem_bytes=min(self.mem_bytes, 32 << 20),
        )


_QUICK = ("random-writes", "zipf-0.9", "read-only", "phases-2-vcpus")


def run(
    settings: AccuracySettings, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure; return lists of rows: ``doorbells``, ``running``, ``cost`` and ``throughput``.

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
    report: dict[str, Any] = {"engine": settings.engine, "pages": PAGES}
    report |= {"period": period_of(settings.fraction), "mem_bytes": settings.mem_bytes}
    report |= {"doorbells": [], "running": [], "cost": [], "throughput": []}
    report["missing"] = {n: support[n].reason for n in names if not support[n].works}
    for name in working:
        _measure(settings, name, report, say)
    report["exact"] = all(map(_is_exact, report["doorbells"])) and all(
        not row["missed"] and (row["coarse"] or not row["wrong"]) for row in report["running"]
    )
    return report


def _measure(
    settings: AccuracySettings, name: str, report: dict[str, Any], say: Callable[[str], None]
) -> None:
    kind, engine = KINDS[name], settings.engine
    for period in sorted({1, report["period"]}):
        for workload in settings.workloads:
            if period == 1 or workload in CHANGING:
                say(f"{name}: {workload} at doorbells, one page in {period} re-armed")
                row = {"tracker": name, "workload": workload}
                row |= doorbells.measure(kind, WORKLOADS[workload], engine, settings.epochs, period)
                report["doorbells"].append(row)
    for workload in FREE_WORKLOADS:
        say(f"{name}: {workload}, running")
        report["running"].append(running.measure(kind, workload, engine, settings.seconds))
    if settings.rates:
        say(f"{name}: cost")
        by_page, rows = cost.measure(
            kind,
            engine,
            settings.mem_bytes,
            settings.rates,
            report["period"],
            settings.rounds,
            settings.seconds,
        )
        report["cost"].append(by_page)
        report["throughput"] += rows


def _is_exact(row: dict[str, Any]) -> bool:
    """Return whether a row is as exact as its tracker claims to be.

    Recall must be 1.0, and precision too where the tracker is not coarse. A sampled
    harvest misses no touch either, but reports too many young pages.
    """
    precise = row["precision"] == 1.0 or row["coarse"] or row["period"] > 1
    return bool(row["recall"] == 1.0 and precise)


def _known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise LayoutError(unknown_name(what, name, known))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 0 if all trackers are exact where they must be, else 1."""
    options = parser().parse_args(argv)
    if options.plot is not None:
        _check_plot(options.plot)
    settings = AccuracySettings(
        engine=options.engine,
        trackers=tuple(options.tracker),
        workloads=tuple(options.workload) or tuple(WORKLOADS),
        epochs=options.epochs,
        fraction=options.fraction,
        rates=() if options.no_cost else tuple(options.rate) or AccuracySettings.rates,
        rounds=options.rounds,
        seconds=options.seconds,
        mem_bytes=options.mem,
    )
    report = run(settings.quick() if options.quick else settings, Progress().say)
    if options.plot is not None:
        from kvmhost.tools.accuracy.plot import draw

        draw(report, options.plot)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        from kvmhost.tools.accuracy.table import show

        show(report)
    return 0 if report["exact"] else 1


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
    parser.add_argument("--engine", default="auto", choices=("auto", "kvm", "emulated"))
    add = parser.add_argument
    add(
        "--tracker",
        action="append",
        default=[],
        metavar="NAME",
        help=f"may be repeated (default: all that work of {', '.join(KINDS)})",
    )
    add(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help=f"may be repeated (default: all: {', '.join(WORKLOADS)})",
    )
    add("--epochs", type=_at_least_two, default=16, help="harvests of a row (default: 16)")
    add(
        "--fraction",
        type=share,
        default=DEFAULT_FRACTION,
        metavar="SHARE",
        help=f"of a sampled re-arming (default: 1/{period_of(DEFAULT_FRACTION)})",
    )
    add(
        "--rate",
        type=seconds,
        action="append",
        default=[],
        metavar="N",
        help="harvests a second, may be repeated (default: 0.1, 1 and 10)",
    )
    add(
        "--mem",
        type=_guest_size,
        default=AccuracySettings.mem_bytes,
        metavar="SIZE",
        help="guest whose throughput is measured, a tenth of it hot (default: 256M)",
    )
    add("--rounds", type=count, default=3, help="segments of each kind (default: 3)")
    add("--seconds", type=seconds, default=1.0, help="length of a segment (default: 1)")
    add("--no-cost", action="store_true", help="leave cost and throughput out")
    add("--quick", action="store_true", help="few workloads, short segments: seconds in all")
    add("--json", action="store_true", help="print one JSON object instead")
    add("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    return parser  # fmt: skip


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: need 2 or more")
    return value


def _guest_size(text: str) -> int:
    value = size_bytes(text)
    if value < _MIN_MEM_BYTES or value % 4096:
        raise argparse.ArgumentTypeError(f"{text!r}: need 16M or more, in pages of 4 KiB")
    return value
