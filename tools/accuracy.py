"""``kvmhost accuracy``: how right each tracker is, and what it costs.

The truth is computed from the guests' parameters (``guests/workloads.py``). Rows:

- **epochs**: the guest stops at a doorbell after each epoch; one harvest there. At
  period 1 every page is cleared by every harvest, and a tracker must be exact. At a
  longer period a harvest clears only its share of the pages, see ``sample_mask``.
  *old after*: harvests until a page that is no longer touched reads as old, *new
  after*: until a newly touched one reads as young; 1 is at once. Mean and maximum.
- **free**: the guest runs on. A harvest must report what every epoch inside its
  window touched (else: missed) and nothing that no epoch that overlaps the window
  did (else: wrong).
- **cost**: throughput of a guest that touches the same pages over and over, without
  harvests and with so many a second, in turn.

A tracker that sees only writes is held against what was written. Exit status 1 if
a tracker is not exact at period 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guests import image_path
from guests.workloads import hotcold_gfns, hotcold_written_gfns, touch_gfns
from kvmhost.errors import LayoutError
from kvmhost.machine import Machine
from kvmhost.trackers import NAMES, Tracker, describe, probe_all, sample_mask

__all__ = ["WORKLOADS", "Settings", "main", "run"]

_START_GFN = 1024
_MEM_BYTES = 64 << 20
_PAGES = 4096

Bits = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A guest with its parameters; ``n_vcpus`` of it share the pages."""

    image: str
    params: dict[str, int]
    n_vcpus: int = 1

    def touched(self, params: dict[str, int], epoch: int, only_writes: bool) -> Bits:
        """Return which pages of the range an epoch touches, or writes."""
        bits = np.zeros(_PAGES, dtype=bool)
        if self.image == "hotcold":
            of_epoch = hotcold_written_gfns if only_writes else hotcold_gfns
            bits[of_epoch(params, epoch, self.n_vcpus) - _START_GFN] = True
        elif params["write"] or not only_writes:
            bits[touch_gfns(params, epoch) - _START_GFN] = True
        return bits


_HOTCOLD = {"hot": 512, "cold": 64, "scan_every": 6, "scan_epochs": 3}

#: What the guests do, by name.
WORKLOADS = {
    "sequential": Workload("touch", {}),
    "write-only": Workload("touch", {"write": 1}),
    "strided": Workload("touch", {"stride": 5}),
    "random": Workload("touch", {"pattern": 2, "count": 600}),
    "random-writes": Workload("touch", {"pattern": 2, "count": 600, "write": 1}),
    "hotcold": Workload("hotcold", _HOTCOLD),
    "random-2-vcpus": Workload("touch", {"pattern": 2, "count": 600, "write": 1}, 2),
    "hotcold-2-vcpus": Workload("hotcold", _HOTCOLD, 2),
}
#: Runs free: epochs so short that a window of a few of them leaves most pages alone.
_FREE = Workload("touch", {"pattern": 2, "count": 60, "write": 1})
_FREE_EPOCHS = 4
_ROUNDS = 3
_SETTLE_S = 10.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    :param periods: of how many harvests each one clears a share
    :param rates: harvests a second of the cost rows; empty: no cost rows
    :param seconds: length of a segment of the free and the cost rows
    """

    engine: str = "auto"
    trackers: tuple[str, ...] = ()
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    epochs: int = 16
    periods: tuple[int, ...] = (1, 8)
    rates: tuple[float, ...] = (1.0, 10.0)
    seconds: float = 1.0


def run(settings: Settings, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure; ``epochs``, ``free`` and ``cost`` hold one row each.

    :raises LayoutError: for a tracker or workload that does not exist
    """
    support = probe_all(settings.engine)
    _known(settings.trackers, NAMES, "tracker")
    _known(settings.workloads, WORKLOADS, "workload")
    names = settings.trackers or NAMES
    report: dict[str, Any] = {"engine": settings.engine, "pages": _PAGES, "epochs": []}
    report |= {"free": [], "cost": []}
    report["missing"] = {n: support[n].reason for n in names if not support[n].works}
    for name in (n for n in names if support[n].works):
        say(f"tracker {name}")
        for period in settings.periods:
            for workload in settings.workloads:
                report["epochs"].append(_by_epochs(settings, name, workload, period))
        report["free"].append(_free(settings, name))
        if settings.rates:
            report["cost"] += _cost(settings, name)
    rows = [row for row in report["epochs"] if row["period"] == 1]
    exact = all(row["precision"] == row["recall"] == 1.0 for row in rows)
    report["exact"] = exact and not any(row["wrong"] or row["missed"] for row in report["free"])
    return report


def _known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in given:
        if name not in known:
            raise LayoutError(f"no {what} {name!r}; there are: {', '.join(known)}")


def _machine(settings: Settings, workload: Workload) -> Machine:
    params = {"start_gfn": _START_GFN, "pages": _PAGES, "epochs": 0} | workload.params
    return Machine(
        image_path(workload.image),
        mem_bytes=_MEM_BYTES,
        engine=settings.engine,
        n_vcpus=workload.n_vcpus,
        params=params,
    )


def _only_writes(tracker: str) -> bool:
    return "reads" not in describe(tracker).sees


# -- at doorbells ----------------------------------------------------------------


def _by_epochs(settings: Settings, name: str, workload_name: str, period: int) -> dict[str, Any]:
    workload = WORKLOADS[workload_name]
    truth = np.zeros((settings.epochs, _PAGES), dtype=bool)
    found = np.zeros_like(truth)
    harvest_ns, rearm_ns = [], []
    with _machine(settings, workload) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker(name)
        for epoch in range(settings.epochs):
            machine.run_epoch()
            mask = None if period == 1 else sample_mask(_PAGES, period, epoch)
            start = time.perf_counter_ns()
            young = tracker.harvest(_START_GFN, _PAGES, mask=mask)
            middle = time.perf_counter_ns()
            cleared = young
            if mask is not None:
                cleared = dataclasses.replace(young, words=young.words & mask)
            tracker.rearm(_START_GFN, _PAGES, cleared)
            rearm_ns.append((time.perf_counter_ns() - middle) / _PAGES)
            harvest_ns.append((middle - start) / _PAGES)
            found[epoch] = young.as_bool()
            truth[epoch] = workload.touched(machine.params, epoch, _only_writes(name))
    right = int((truth & found).sum())
    old, new = _harvests_until(truth, found, False), _harvests_until(truth, found, True)
    return {
        "tracker": name,
        "workload": workload_name,
        "period": period,
        # What reports nothing is never wrong, and what has nothing to find finds it all.
        "precision": right / int(found.sum()) if found.any() else 1.0,
        "recall": right / int(truth.sum()) if truth.any() else 1.0,
        "old_after_mean": statistics.fmean(old) if old else None,
        "old_after_max": max(old, default=None),
        "new_after_mean": statistics.fmean(new) if new else None,
        "new_after_max": max(new, default=None),
        "harvest_ns_per_page": statistics.median(harvest_ns),
        "rearm_ns_per_page": statistics.median(rearm_ns),
    }


def _harvests_until(truth: Bits, found: Bits, becomes: bool) -> list[int]:
    """Return, for each change of a page to ``becomes``, how many harvests it takes to show.

    A change that is undone, or the end, before it shows is left out.
    """
    waits = []
    n_epochs = truth.shape[0]
    for epoch in range(1, n_epochs):
        waiting = (truth[epoch] == becomes) & (truth[epoch - 1] != becomes)
        for later in range(epoch, n_epochs):
            waiting = waiting & (truth[later] == becomes)
            shown = waiting & (found[later] == becomes)
            waits += [later - epoch + 1] * int(shown.sum())
            waiting = waiting & ~shown
    return waits


# -- free-running ----------------------------------------------------------------


def _free(settings: Settings, name: str) -> dict[str, Any]:
    """Harvest a running guest; check each bitmap against what it could and must hold."""
    workload = _FREE
    wrong = missed = must = harvests = 0
    pause = threading.Event()
    with _machine(settings, workload) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker(name)
        for _ in range(3):
            machine.run_epoch()
        tracker.rearm(_START_GFN, _PAGES, tracker.harvest(_START_GFN, _PAGES))
        vcpu = machine.vcpus[0]
        began = armed = vcpu.doorbell_value
        machine.step_by_doorbell(False)
        deadline = time.monotonic() + settings.seconds
        while time.monotonic() < deadline:
            # A window has to hold whole epochs, or nothing in it is certain.
            if vcpu.doorbell_value < armed + _FREE_EPOCHS:
                pause.wait(0.0005)
                continue
            before = vcpu.doorbell_value
            young = tracker.harvest(_START_GFN, _PAGES)
            after = vcpu.doorbell_value
            tracker.rearm(_START_GFN, _PAGES, young)
            # In progress at either end: counted as possible, not as certain.
            possible = _union(workload, machine.params, began + 1, after + 1)
            certain = _union(workload, machine.params, armed + 2, before)
            wrong += int((young.as_bool() & ~possible).sum())
            missed += int((certain & ~young.as_bool()).sum())
            must += int(certain.sum())
            began, armed = before, vcpu.doorbell_value
            harvests += 1
    return {
        "tracker": name,
        "harvests": harvests,
        "certain": must,
        "missed": missed,
        "wrong": wrong,
    }


def _union(workload: Workload, params: dict[str, int], first: int, last: int) -> Bits:
    bits = np.zeros(_PAGES, dtype=bool)
    for epoch in range(first, last + 1):
        bits |= workload.touched(params, epoch, only_writes=True)
        if bits.all():
            break
    return bits


# -- cost --------------------------------------------------------------------------


def _cost(settings: Settings, name: str) -> list[dict[str, Any]]:
    """Run the variants in turn, several times; each is held against its own round's free run."""
    workload = WORKLOADS["write-only" if _only_writes(name) else "sequential"]
    variants = [(rate, period) for rate in settings.rates for period in settings.periods]
    kept: dict[tuple[float, int], list[float]] = {variant: [] for variant in variants}
    with _machine(settings, workload) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker(name)
        machine.run_epoch()
        machine.step_by_doorbell(False)
        for _ in range(_ROUNDS):
            free = _rate(machine, tracker, settings.seconds, 0, 1)
            for variant in variants:
                kept[variant].append(_rate(machine, tracker, settings.seconds, *variant) / free)
    return [
        {
            "tracker": name,
            "harvests_per_s": rate,
            "period": period,
            "throughput": statistics.median(values),
            "throughput_min": min(values),
            "throughput_max": max(values),
        }
        for (rate, period), values in kept.items()
    ]


def _rate(machine: Machine, tracker: Tracker, seconds: float, rate: float, period: int) -> float:
    """Return epochs a second with ``rate`` harvests a second; 0: none."""
    stop = threading.Event()
    # What the segment before cleared is paid for before this one begins.
    first, deadline = machine.doorbells, time.monotonic() + _SETTLE_S
    while machine.doorbells < first + 2 and time.monotonic() < deadline:
        stop.wait(0.001)
    first, start = machine.doorbells, time.perf_counter()
    turn = 0
    while (left := start + seconds - time.perf_counter()) > 0:
        if rate:
            mask = sample_mask(_PAGES, period, turn)
            young = tracker.harvest(_START_GFN, _PAGES, mask=mask)
            cleared = dataclasses.replace(young, words=young.words & mask)
            tracker.rearm(_START_GFN, _PAGES, cleared)
            turn += 1
        next_one = start + turn / rate if rate else start + seconds
        stop.wait(max(0.0, min(left, next_one - time.perf_counter())))
    return (machine.doorbells - first) / (time.perf_counter() - start)


# -- output --------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0 if all trackers are exact where they have to be, else 1."""
    options = _parser().parse_args(argv)
    if options.plot is not None:
        from reclaim.young.render import need_plotting

        need_plotting()
        if options.plot.is_dir() or not os.access(options.plot.parent, os.W_OK | os.X_OK):
            raise LayoutError(f"{options.plot}: no file can be written there")
    settings = Settings(
        engine=options.engine,
        trackers=tuple(options.tracker),
        workloads=tuple(options.workload) or tuple(WORKLOADS),
        epochs=options.epochs,
        seconds=options.seconds,
        rates=() if options.no_cost else Settings.rates,
    )
    report = run(settings, lambda text: print(text, file=sys.stderr, flush=True))
    if options.plot is not None:
        _plot(report, options.plot)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if report["exact"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmhost accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", default="auto", choices=("auto", "kvm", "emulated"))
    parser.add_argument(
        "--tracker", action="append", default=[], help="may be repeated (default: all that work)"
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        help=f"may be repeated (default: all: {', '.join(WORKLOADS)})",
    )
    parser.add_argument("--epochs", type=_at_least_two, default=16, help="harvests of a row")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a free or cost segment")
    parser.add_argument("--no-cost", action="store_true", help="leave the cost rows out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows")
    return parser


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: need 2 or more")
    return value


def _print(report: dict[str, Any]) -> None:
    print(
        f"{'tracker':8} {'workload':16} period precision recall  old after  new after "
        " harvest ns/page  re-arm ns/page"
    )
    for row in report["epochs"]:
        print(
            f"{row['tracker']:8} {row['workload']:16} {row['period']:6} {row['precision']:9.4f} "
            f"{row['recall']:6.4f} {_pair(row, 'old'):>10} {_pair(row, 'new'):>10} "
            f"{row['harvest_ns_per_page']:16.1f} {row['rearm_ns_per_page']:15.1f}"
        )
    for row in report["free"]:
        print(
            f"{row['tracker']:8} free-running, {row['harvests']} harvests: of {row['certain']} "
            f"certain touches {row['missed']} missed; {row['wrong']} wrong"
        )
    for row in report["cost"]:
        print(
            f"{row['tracker']:8} {row['harvests_per_s']:g} harvests a second, period "
            f"{row['period']}: {100 * row['throughput']:.1f} % of the guest's throughput "
            f"({100 * row['throughput_min']:.0f} to {100 * row['throughput_max']:.0f})"
        )
    for name, reason in report["missing"].items():
        print(f"{name:8} not measured: {reason}")


def _pair(row: dict[str, Any], kind: str) -> str:
    mean, most = row[f"{kind}_after_mean"], row[f"{kind}_after_max"]
    return "-" if mean is None else f"{mean:.2f}/{most}"


def _plot(report: dict[str, Any], path: Path) -> None:
    """Draw recall and precision by tracker, and throughput by harvest rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["tracker"] for row in report["epochs"]))
    periods = sorted({row["period"] for row in report["epochs"]})
    bars = [(kind, period) for period in periods for kind in ("precision", "recall")]
    for i, (kind, period) in enumerate(bars):
        worst = [
            min(r[kind] for r in report["epochs"] if r["tracker"] == name and r["period"] == period)
            for name in names
        ]
        places = np.arange(len(names)) + (i - len(bars) / 2 + 0.5) * 0.8 / len(bars)
        left.bar(places, worst, 0.8 / len(bars), label=f"{kind}, period {period}")
    left.set_xticks(np.arange(len(names)), names)
    left.set(ylim=(0, 1.05), title="worst workload, one harvest an epoch")
    left.legend(fontsize="small", loc="lower left")
    for name in names:
        for period in periods:
            rows = [r for r in report["cost"] if (r["tracker"], r["period"]) == (name, period)]
            rates = [r["harvests_per_s"] for r in rows]
            kept = [100 * r["throughput"] for r in rows]
            right.plot(rates, kept, marker="o", label=f"{name}, period {period}")
    right.set(xlabel="harvests a second", ylabel="% of throughput", title="what the guest keeps")
    if report["cost"]:
        right.set_xscale("log")
        right.legend(fontsize="small")
    figure.savefig(path, format="png")
