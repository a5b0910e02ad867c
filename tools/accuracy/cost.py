"""The cost of harvests: host time per page, and guest throughput."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.tools.accuracy.kinds import GFN_START, TrackerKind
from kvmhost.tools.outputs.accuracy import PageCostRow, ThroughputRow
from kvmhost.tools.throughput import Kept, ThroughputPlan, measure_steps, paired_rates
from kvmhost.trackers import Tracker
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import EngineName

__all__ = ["HOT_SHARE", "measure"]

HOT_SHARE = 0.1
#: Less frequent harvests than this are measured in one segment instead of one per round.
_LONG_S = 5.0
_STEPS = 7


def measure(
    kind: TrackerKind,
    engine: EngineName,
    mem_bytes: int,
    rates: tuple[float, ...],
    period: int,
    rounds: int,
    seconds: float,
) -> tuple[PageCostRow, list[ThroughputRow]]:
    """Measure a guest that touches a tenth of its memory repeatedly.

    :return: the cost per page, and one row for each rate and method of re-arming
    """
    hot = int(mem_bytes // PAGE_BYTES * HOT_SHARE)
    params = {"gfn_start": GFN_START, "pages": hot, "epochs": 0, "write": int(kind.only_writes)}
    with Machine(
        image_path("touch"),
        mem_bytes=mem_bytes,
        engine=engine,
        params=params,
        dirty_ring_entries=kind.large_ring_entries,
    ) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        tracker = kind.use(machine)
        steps = measure_steps(machine, tracker, GFN_START, hot, _STEPS)
        machine.step_by_doorbell(False)
        kept: dict[ThroughputPlan, list[Kept]] = {}
        plans = _plans(tracker, rates, period)
        for some, times in ((plans, rounds), (_rare(rates), 1)):
            if some:
                kept |= paired_rates(machine, tracker, some, times, seconds / 2, _length(seconds))
    by_page = PageCostRow(
        tracker=kind.name,
        harvest_ns_per_page=steps.scan_ns / (mem_bytes // PAGE_BYTES),
        rearm_ns_per_page=steps.rearm_ns / hot,
        refault_ns_per_page=steps.refault_ns,
    )
    return by_page, [_row(kind, plan, values) for plan, values in kept.items()]


def _plans(tracker: Tracker, rates: tuple[float, ...], period: int) -> list[ThroughputPlan]:
    plans = []
    for rate in (rate for rate in rates if rate * _LONG_S >= 1):
        plans.append(ThroughputPlan(rate))
        # The other trackers do not clear pages that are not young, and re-arm by clearing.
        if hasattr(tracker, "rearm_kind"):
            plans.append(ThroughputPlan(rate, whole=True))
        plans.append(ThroughputPlan(rate, period=period))
    return plans


def _rare(rates: tuple[float, ...]) -> list[ThroughputPlan]:
    return [ThroughputPlan(rate) for rate in rates if rate * _LONG_S < 1]


def _length(seconds: float) -> Callable[[ThroughputPlan], float]:
    return lambda plan: max(seconds, 1 / plan.rate)


def _row(kind: TrackerKind, plan: ThroughputPlan, kept: list[Kept]) -> ThroughputRow:
    values = [one.wall for one in kept]
    return ThroughputRow(
        tracker=kind.name,
        harvests_per_s=plan.rate,
        rearm=plan.rearm,
        throughput_share=statistics.median(values),
        min_throughput_share=min(values),
        max_throughput_share=max(values),
        throughput_by_cpu_share=statistics.median(one.cpu for one in kept),
        n_segments=len(values),
    )
