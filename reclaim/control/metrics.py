"""The daemon's metrics, as Prometheus text.

They are read from the sessions on each scrape, so the metrics of a VM end with the VM.
Names end in the unit, and counters in ``_total``. :data:`PER_VM` and :data:`PER_HOST`
list the metrics, and docs/reclaimd.md describes them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.policy import registry
from kvmhost.reclaim.vm.session import Session
from kvmhost.units import PAGE_BYTES

__all__ = ["PER_HOST", "PER_VM", "Family", "Metrics", "names"]


#: Values by the value of the label other than ``vm``.
Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Family:
    """One metric.

    :param kind: ``gauge`` or ``counter``
    :param label: a label in addition to ``vm``; empty for none
    :param read: function that reads the value from a session or a daemon
    """

    name: str
    kind: str
    about: str
    read: Callable[[Any], float | Values]
    label: str = ""


def _gauge(name: str, about: str, read: Callable[[Any], Any], label: str = "") -> Family:
    return Family(f"reclaimd_{name}", "gauge", about, read, label)


def _counter(name: str, about: str, read: Callable[[Any], Any], label: str = "") -> Family:
    return Family(f"reclaimd_{name}_total", "counter", about, read, label)


def _pager(name: str, scale: float = 1.0) -> Callable[[Session], float]:
    def read(session: Session) -> float:
        counters = session.counters
        pager = counters.pager if counters is not None else None
        return float((pager or {}).get(name, 0)) * scale

    return read


def _ages(session: Session) -> Values:
    """Return the number of pages by age in generations; 0 is the youngest generation."""
    generations = session.last.generations if session.last is not None else []
    return {str(age): float(pages) for age, (_, pages) in enumerate(reversed(generations))}


def _by_why(session: Session) -> Values:
    return {why.name.lower(): n for why, n in dict(session.totals.evicted).items()}


def _drive(session: Session) -> float:
    return (
        session.reclaim_target.stall_controller.drive
        if session.reclaim_target.stall_controller
        else 0.0
    )


def _promotions(session: Session) -> float:
    return (
        session.reclaim_target.promotion_controller.rate
        if session.reclaim_target.promotion_controller
        else 0.0
    )


def _promotion_step(session: Session) -> float:
    return (
        session.reclaim_target.promotion_controller.share
        if session.reclaim_target.promotion_controller
        else 0.0
    )


def _clearing(session: Session) -> Values:
    clearing = session.loss.clearing
    return {"steady": clearing.steady, "changing": clearing.changing}


def _retouched(session: Session) -> float:
    return session.counters.harvest.n_retouched if session.counters is not None else 0


PER_VM = (
    _gauge("vm_resident_bytes", "resident memory", lambda s: s.pages.n_resident * PAGE_BYTES),
    _gauge("vm_size_bytes", "all memory", lambda s: s.pages.n_pages * PAGE_BYTES),
    _gauge(
        "vm_budget_bytes",
        "limit on resident memory; 0 if none",
        lambda s: s.budget.max_bytes if s.budget else 0,
    ),
    _gauge(
        "vm_generation_pages", "resident pages by age in generations, 0 the youngest", _ages, "age"
    ),
    _gauge(
        "vm_holding",
        "1 while holding back because evicted pages refault",
        lambda s: s.reclaim_target.backoff.holding,
    ),
    _gauge(
        "vm_refaulted_own_ratio",
        "share of the daemon's evictions that refaulted, decayed over 10 s",
        lambda s: s.reclaim_target.backoff.share,
    ),
    _gauge(
        "vm_stall_ratio",
        "share of vCPU time that faults took in the VM's handler, in the last pass",
        lambda s: s.stall,
    ),
    _gauge(
        "vm_stall_drive_ratio", "part of the proactive step that the stall target allows", _drive
    ),
    _gauge(
        "vm_promotion_ratio",
        "share of the working set that refaults per minute, decayed over 30 s",
        _promotions,
    ),
    _gauge(
        "vm_promotion_step_ratio",
        "part of the proactive step that the promotion target allows",
        _promotion_step,
    ),
    _gauge(
        "vm_loss_ratio",
        "share of vCPU time that re-arming cost in the last passes",
        lambda s: s.loss.loss or 0.0,
    ),
    _gauge(
        "vm_max_loss_ratio",
        "bound on that share; infinite if none",
        lambda s: s.loss.bound.max_loss,
    ),
    _gauge(
        "vm_rearm_fault_seconds",
        "measured cost of a touch of a re-armed page; 0 if it is not known",
        lambda s: s.loss.cost.fault_ns / 1e9 if s.loss.cost else 0.0,
    ),
    _gauge(
        "vm_cleared_ratio",
        "share of the young pages that a harvest clears: of the steady and of the changing ones",
        _clearing,
        "pages",
    ),
    _gauge("vm_interval_seconds", "time between two passes", lambda s: s.interval_s),
    _gauge(
        "vm_stale_seconds",
        "how long a page that is no longer touched may look young",
        lambda s: s.loss.stale_s(s.context.config.daemon.interval),
    ),
    _counter(
        "vm_retouched_pages",
        "cleared pages that the guest touched again, a fault each; of all readers",
        _retouched,
    ),
    _gauge(
        "vm_wanted_pages",
        "pages that the last pass was to evict",
        lambda s: s.last.wanted_pages if s.last else 0,
    ),
    _gauge(
        "vm_history_bytes",
        "memory of the page history",
        lambda s: s.history.n_bytes if s.history else 0,
    ),
    _gauge("vm_store_bytes", "contents of evicted pages in the VM's store", _pager("store_bytes")),
    _gauge(
        "vm_store_held_bytes",
        "memory or file blocks that the VM's store takes for them",
        _pager("store_held_bytes"),
    ),
    _gauge(
        "vm_over_budget_pages",
        "pages above the budget that the VM could not evict when it was last told to",
        lambda s: s.evictor.over_pages,
    ),
    _gauge("vm_swapped_pages", "pages that the VM saw in the host's swap", _pager("swapped_pages")),
    _gauge(
        "vm_pending_faults", "faults that wait for memory on the host", _pager("pending_faults")
    ),
    _gauge("vm_stored_pages", "pages that are evicted now", _pager("evicted_pages")),
    _counter("vm_passes", "passes", lambda s: s.totals.passes),
    _counter(
        "vm_skipped_passes", "passes skipped because the VM was paused", lambda s: s.totals.skipped
    ),
    _counter(
        "vm_harvested_pages",
        "pages whose accessed bits were tested",
        lambda s: s.totals.harvested,
    ),
    _counter("vm_young_pages", "pages found young", lambda s: s.totals.young),
    _counter(
        "vm_harvest_seconds",
        "time that harvests took in the VM process",
        lambda s: s.totals.harvest_ns / 1e9,
    ),
    _counter(
        "vm_rearm_seconds",
        "time that re-arming took in the VM process",
        lambda s: s.totals.rearm_ns / 1e9,
    ),
    _counter(
        "vm_busy_seconds",
        "processor time that the daemon spent on this VM",
        lambda s: s.totals.busy_ns / 1e9,
    ),
    _counter("vm_evicted_pages", "evicted pages, by reason", _by_why, "why"),
    _counter(
        "vm_refused_pages",
        "evictions refused by the VM, by outcome",
        lambda s: dict(s.totals.refused),
        "outcome",
    ),
    _counter(
        "vm_spared_pages",
        "pages to evict that were not evicted, by cause: holding back, rate limit, policy",
        lambda s: dict(s.totals.spared),
        "cause",
    ),
    _counter(
        "vm_refaulted_pages",
        "evicted pages that became resident again",
        lambda s: s.totals.refaulted,
    ),
    _counter(
        "vm_refaulted_own_pages",
        "of these, pages that the daemon had evicted",
        lambda s: s.totals.refaulted_own,
    ),
    _counter("vm_fault_ins", "evicted pages restored by the VM", _pager("fault_ins")),
    _counter("vm_zero_fills", "first touches of a page", _pager("zero_fills")),
    _counter(
        "vm_direct_evictions", "evictions by the VM's fault handler", _pager("direct_evictions")
    ),
    _counter(
        "vm_stayed_pages",
        "pages that stayed in memory when they were punched",
        _pager("stayed_pages"),
    ),
    _counter("vm_memory_waits", "faults that found no memory on the host", _pager("memory_waits")),
    _counter("vm_over_limit", "faults served above the VM's limit", _pager("over_limit")),
    _counter(
        "vm_lost_pages", "evicted pages that the store failed to return", _pager("lost_pages")
    ),
)

PER_HOST = (
    _gauge("vms", "managed VMs", lambda d: len(d.sessions())),
    _gauge(
        "stall_ratio",
        "share of time that tasks stalled for memory, in the last interval",
        lambda d: d.context.host.stall or 0.0,
    ),
    _gauge(
        "cgroup_bytes",
        "memory of the cgroup, without reclaimable file pages",
        lambda d: d.context.host.cgroup_bytes,
    ),
    _gauge(
        "cgroup_limit_bytes",
        "memory limit of the cgroup; 0 if none",
        lambda d: d.context.host.cgroup_limit_bytes,
    ),
    _gauge(
        "dry_run",
        "1 if the daemon only simulates evictions",
        lambda d: d.context.config.daemon.dry_run,
    ),
    _counter(
        "triggers",
        "stalls reported by the kernel's trigger",
        lambda d: d.context.host.trigger_fired,
    ),
    _counter(
        "decisions_lost",
        "decisions that could not be written to the file",
        lambda d: d.context.decisions.write_errors,
    ),
)

_LATENCY = "reclaimd_vm_fault_in_seconds"
_DECISIONS = "reclaimd_vm_decisions_total"


class Metrics:
    """The metrics of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Collected(daemon))
        ProcessCollector(namespace="reclaimd", registry=self.registry)

    def text(self) -> bytes:
        """Return all metrics in Prometheus text format."""
        return generate_latest(self.registry)


class _Collected(Collector):
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the families depend on the VMs."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read all values from the daemon."""
        sessions = self._daemon.sessions()
        for family in PER_HOST:
            yield _filled(family, [([], family.read(self._daemon))])
        for family in PER_VM:
            yield _filled(family, [([s.vm], family.read(s)) for s in sessions], ["vm"])
        yield from _policies(sessions)
        yield _latency(sessions)
        decisions = CounterMetricFamily(_DECISIONS, "decisions, by kind", labels=["vm", "kind"])
        for vm, kind, count in self._daemon.context.decisions.totals():
            decisions.add_metric([vm, kind], count)
        yield decisions


def _policies(sessions: list[Session]) -> Iterator[Metric]:
    """Yield a gauge for each counter that a policy has; every one has its own unit."""
    found: dict[str, list[tuple[str, float]]] = {}
    for session in sessions:
        for name, value in dict(session.driver.policy.counters()).items():
            found.setdefault(_policy_metric(name), []).append((session.vm, value))
    for name, values in sorted(found.items()):
        metric = GaugeMetricFamily(name, f"counter {name} of the policy", labels=["vm"])
        for vm, value in values:
            metric.add_metric([vm], float(value))
        yield metric


def _policy_metric(name: str) -> str:
    """Return the metric of a policy's counter; plug-ins may use any name."""
    return "reclaimd_vm_policy_" + re.sub(r"\W", "_", name, flags=re.ASCII)


def _filled(
    family: Family, found: list[tuple[list[str], float | Values]], labels: list[str] | None = None
) -> Metric:
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    names = (labels or []) + ([family.label] if family.label else [])
    metric = kind(family.name, family.about, labels=names)
    for values, value in found:
        if isinstance(value, dict):
            for name, number in value.items():
                metric.add_metric([*values, name], float(number))
        else:
            metric.add_metric(values, float(value))
    return metric


def _latency(sessions: list[Session]) -> Metric:
    """Return the fault-in latency histograms; bucket ``b`` ends at ``2**(b + 1)`` ns."""
    about = "time to restore a page, in the VM's fault handler"
    metric = HistogramMetricFamily(_LATENCY, about, labels=["vm"])
    for session in sessions:
        pager = (session.counters.pager if session.counters is not None else None) or {}
        total, buckets = 0, []
        for bucket, count in enumerate(pager.get("latency_ns", [])):
            total += count
            buckets.append((f"{2 ** (bucket + 1) / 1e9:.9g}", total))
        buckets.append(("+Inf", total))
        metric.add_metric([session.vm], buckets, pager.get("latency_sum_ns", 0) / 1e9)
    return metric


def names() -> set[str]:
    """Return the names of all possible samples, to check dashboards against."""
    histogram = {f"{_LATENCY}_{part}" for part in ("bucket", "count", "sum")}
    process = {
        f"reclaimd_process_{part}"
        for part in ("cpu_seconds_total", "resident_memory_bytes", "open_fds")
    }
    policies = {
        _policy_metric(counter)
        for name in registry.BUILT_IN
        for counter in registry.create(name, 64, {}).counters()
    }
    own = {f.name for f in (*PER_VM, *PER_HOST)}
    return own | histogram | process | policies | {_DECISIONS}
