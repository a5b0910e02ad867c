"""The cost of harvests to a guest: throughput with and without them, and single steps.

Absolute times drift on a shared machine, so each segment with harvests is measured
between two segments without, and only the ratio is used. The measured guest touches the
same pages repeatedly and rings the doorbell after each round.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Sequence

from kvmhost.machine import Machine
from kvmhost.trackers import Tracker, sample_mask

__all__ = ["Kept", "Steps", "ThroughputPlan", "harvest_once", "measure_steps", "paired_rates"]

_SETTLE_S = 10.0


@dataclasses.dataclass(frozen=True)
class ThroughputPlan:
    """How a guest is harvested.

    :param rate: harvests per second; 0: none
    :param period: each harvest clears and re-arms one page in ``period``
    :param whole: re-arm all memory instead of the young pages only
    """

    rate: float
    period: int = 1
    whole: bool = False

    @property
    def rearm(self) -> str:
        """``young``, ``all`` or ``1/N``."""
        if self.period > 1:
            return f"1/{self.period}"
        return "all" if self.whole else "young"


@dataclasses.dataclass(frozen=True)
class Kept:
    """Throughput with harvests, relative to throughput without.

    :param wall: per wall time
    :param cpu: per processor time of the vCPUs, which is independent of other load on the
        machine; it excludes the time that the guest waits for another thread
    """

    wall: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Steps:
    """Median times of single steps while the guest is stopped.

    :param scan_ns: a scan of all memory that clears nothing
    :param rearm_ns: a harvest that clears and re-arms the hot pages
    :param refault_ns: the cost to the guest per re-armed page
    """

    scan_ns: float
    rearm_ns: float
    refault_ns: float


def harvest_once(
    tracker: Tracker, gfn_start: int, n_pages: int, plan: ThroughputPlan, turn: int = 0
) -> None:
    """Harvest and re-arm a range according to a plan."""
    if plan.whole:
        tracker.harvest(gfn_start, n_pages)
        tracker.rearm(gfn_start, n_pages)
        return
    if plan.period == 1:
        tracker.rearm(gfn_start, n_pages, tracker.harvest(gfn_start, n_pages))
        return
    mask = sample_mask(n_pages, plan.period, turn, gfn_start)
    young = tracker.harvest(gfn_start, n_pages, mask=mask)
    cleared = dataclasses.replace(young, words=young.words & mask)
    tracker.rearm(gfn_start, n_pages, cleared)


def paired_rates(
    machine: Machine,
    tracker: Tracker,
    plans: Sequence[ThroughputPlan],
    rounds: int,
    free_s: float,
    seconds_of: Callable[[ThroughputPlan], float],
) -> dict[ThroughputPlan, list[Kept]]:
    """Return the relative throughput under each plan, once per round.

    :param free_s: length of the segments without harvests before and after each segment
    :param seconds_of: length of a plan's segment
    :return: throughput relative to the mean of the two adjacent segments without harvests
    """
    kept: dict[ThroughputPlan, list[Kept]] = {plan: [] for plan in plans}
    none = ThroughputPlan(0)
    for _ in range(rounds):
        before = _epoch_rates(machine, tracker, free_s, none)
        for plan in plans:
            found = _epoch_rates(machine, tracker, seconds_of(plan), plan)
            after = _epoch_rates(machine, tracker, free_s, none)
            parts = [
                2 * with_it / (a + b) for with_it, a, b in zip(found, before, after, strict=True)
            ]
            kept[plan].append(Kept(*parts))
            before = after
    return kept


def _epoch_rates(
    machine: Machine, tracker: Tracker, seconds: float, plan: ThroughputPlan
) -> tuple[float, float]:
    """Harvest the running guest, with the first harvest at the start of the segment.

    :return: epochs per second, and per second of the vCPUs' processor time
    """
    pause = threading.Event()
    gfn_end = machine.memory.gfn_end
    # The guest takes the faults on pages cleared in the previous segment before this one.
    first, deadline = machine.doorbells, time.monotonic() + _SETTLE_S
    while machine.doorbells < first + 2 and time.monotonic() < deadline:
        pause.wait(0.001)
    first, start, cpu_start = machine.doorbells, time.perf_counter(), machine.runner.cpu_seconds()
    turn = 0
    while (left := start + seconds - time.perf_counter()) > 0:
        if plan.rate:
            harvest_once(tracker, 0, gfn_end, plan, turn)
            turn += 1
        next_one = start + turn / plan.rate if plan.rate else start + seconds
        pause.wait(max(0.0, min(left, next_one - time.perf_counter())))
    epochs = machine.doorbells - first
    # A guest that only waited has used almost no processor time.
    cpu_s = max(machine.runner.cpu_seconds() - cpu_start, 1e-3)
    return epochs / (time.perf_counter() - start), epochs / cpu_s


def measure_steps(
    machine: Machine, tracker: Tracker, gfn_start: int, hot: int, repeats: int
) -> Steps:
    """Time a scan, a re-arm, a warm epoch and a re-faulting epoch of a stepped guest.

    :param gfn_start: first of the ``hot`` pages that the guest touches in every epoch
    :raises RuntimeError: if the tracker misses one of these pages
    """
    gfn_end = machine.memory.gfn_end
    times: dict[str, list[float]] = {"scan": [], "rearm": [], "warm": [], "cold": []}
    for _ in range(repeats):
        machine.run_epoch()
        times["warm"].append(_timed_epoch(machine))
        start = time.perf_counter_ns()
        young = tracker.harvest(0, gfn_end, clear=False)
        scanned = time.perf_counter_ns()
        # pagemap clears and re-arms in one operation, guestpt in two.
        tracker.rearm(0, gfn_end, tracker.harvest(gfn_start, hot))
        done = time.perf_counter_ns()
        times["scan"].append(scanned - start)
        times["rearm"].append(done - scanned)
        times["cold"].append(_timed_epoch(machine))
        if young.count() < hot:
            raise RuntimeError(f"{young.count()} pages young, {hot} were touched")
    median = {name: statistics.median(values) for name, values in times.items()}
    return Steps(median["scan"], median["rearm"], (median["cold"] - median["warm"]) / hot)


def _timed_epoch(machine: Machine) -> int:
    start = time.perf_counter_ns()
    machine.run_epoch()
    return time.perf_counter_ns() - start
