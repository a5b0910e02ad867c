"""Outputs of ``kvmhost accuracy`` and ``kvmhost demo``."""

from __future__ import annotations

from kvmhost.tools.outputs.base import Output
from kvmhost.tools.outputs.bench import MeasuredOutput

__all__ = [
    "AccuracyOutput",
    "DemoOutput",
    "DemoThroughput",
    "DemoTracker",
    "DoorbellRow",
    "KilledRun",
    "LimitedRun",
    "LimitedRuns",
    "PageCostRow",
    "RunningRow",
    "ThroughputRow",
]


class DoorbellRow(Output, frozen=True, kw_only=True):
    """Harvests at doorbells, where the guest is stopped and the result is known exactly.

    A change of a page that is undone before it is reported is left out of the waits.
    """

    tracker: str
    """the tracker"""
    workload: str
    """the workload"""
    fraction: float
    """part of the pages that each harvest clears"""
    coarse: bool
    """whether some bits stood for more than one page"""
    touches: int
    """pages touched, over all epochs"""
    reported_pages: int
    """pages reported young, over all epochs"""
    precision_ratio: float
    """reported pages that were touched, over reported pages"""
    recall_ratio: float
    """reported pages that were touched, over touched pages"""
    mean_old_after_harvests: float | None
    """harvests until an untouched page reads as old; null if none did"""
    max_old_after_harvests: int | None
    """the most of them"""
    mean_new_after_harvests: float | None
    """harvests until a newly touched page reads as young; null if none did"""
    max_new_after_harvests: int | None
    """the most of them"""
    harvest_ns_per_page: float
    """median time of a harvest"""
    rearm_ns_per_page: float
    """median time of re-arming"""


class RunningRow(Output, frozen=True, kw_only=True):
    """Harvests of a running guest; pages are summed over the harvests."""

    tracker: str
    """the tracker"""
    workload: str
    """the workload"""
    harvests: int
    """harvests"""
    n_young: int
    """reported pages"""
    certain_pages: int
    """pages touched by an epoch inside the window"""
    confirmed_pages: int
    """of these, reported"""
    missed_pages: int
    """of these, not reported"""
    wrong_pages: int
    """reported pages that no epoch touched which overlaps the window"""
    min_precision_ratio: float
    """precision if only certain pages were touched"""
    max_precision_ratio: float
    """precision if all possible pages were touched"""
    recall_ratio: float
    """reported certain pages, over certain pages"""
    coarse: bool
    """whether some bits stood for more than one page"""


class PageCostRow(Output, frozen=True, kw_only=True):
    """The cost of a tracker by page."""

    tracker: str
    """the tracker"""
    harvest_ns_per_page: float
    """a harvest, per page of memory"""
    rearm_ns_per_page: float
    """clearing and re-arming, per young page"""
    refault_ns_per_page: float
    """the guest's next touch of a re-armed page"""


class ThroughputRow(Output, frozen=True, kw_only=True):
    """What a guest keeps of its throughput, relative to that without harvests."""

    tracker: str
    """the tracker"""
    harvests_per_s: float
    """rate of the harvests"""
    rearm: str
    """what is re-armed: young, all, or one page in N as 1/N"""
    throughput_share: float
    """median of the segments"""
    min_throughput_share: float
    """the least of them"""
    max_throughput_share: float
    """the most of them"""
    throughput_by_cpu_share: float
    """median, by the vCPU's processor time"""
    n_segments: int
    """segments"""


class AccuracyOutput(MeasuredOutput, frozen=True, kw_only=True):
    """Trackers, compared with what the guest touched."""

    engine: str
    """what runs the vCPUs, as it was asked for"""
    n_pages: int
    """pages of the guest at doorbells and running"""
    fraction: float
    """part of the pages that sampled re-arming clears"""
    mem_bytes: int
    """memory of the guest whose throughput is measured"""
    doorbells: list[DoorbellRow]
    """at doorbells"""
    running: list[RunningRow]
    """running"""
    cost: list[PageCostRow]
    """cost by page; empty with --no-cost"""
    throughput: list[ThroughputRow]
    """throughput; empty with --no-cost"""
    missing: dict[str, str]
    """trackers that do not work on this host, and why"""
    exact: bool
    """whether each is as exact as it claims to be"""


class DemoTracker(Output, frozen=True, kw_only=True):
    """The accuracy of a tracker."""

    tracker: str
    """the tracker"""
    precision_ratio: float
    """reported pages that were touched, over reported pages"""
    recall_ratio: float
    """reported pages that were touched, over touched pages"""
    harvest_ns_per_page: float
    """median time of a harvest"""


class DemoThroughput(Output, frozen=True, kw_only=True):
    """The cost of aging, without a limit."""

    alone_epochs_per_s: float
    """the guest without a daemon"""
    managed_epochs_per_s: float
    """with a daemon that harvests each second"""


class KilledRun(Output, frozen=True, kw_only=True):
    """The guest under the limit, without a daemon."""

    status: int
    """its exit status; -9 if the kernel killed it"""
    oom_kills: int
    """processes that the kernel killed"""


class LimitedRun(Output, frozen=True, kw_only=True):
    """The guest under the limit, with a daemon."""

    status: int
    """its exit status; 0 if every check passed"""
    duration_s: float
    """time until it ended"""
    epochs_per_s: float
    """its speed"""
    oom_kills: int
    """processes that the kernel killed"""
    evictions: int
    """pages evicted"""
    direct_evictions: int
    """of these, at the limit, by the fault handler"""
    fault_ins: int
    """evicted pages that came back because of a touch"""
    refault_ratio: float
    """the same over evictions"""
    touched_bytes: int
    """memory that the guest touches"""
    peak_resident_bytes: int
    """the most that was resident"""
    resident_bytes: int
    """what was resident at the end"""
    compression_ratio: float
    """size of the evicted pages at the end, over that in the store"""
    same_filled_pages: int
    """of them, kept as one word"""
    daemon_status: int
    """exit status of the daemon"""


class LimitedRuns(Output, frozen=True, kw_only=True):
    """The guest under a limit of half of the memory that it touches."""

    cgroup: str | None
    """version of the memory cgroup, v1 or v2; null without one"""
    why: str
    """why there is none; else empty"""
    limit_bytes: int
    """the limit of the cgroup"""
    budget_bytes: int
    """the budget of the daemon"""
    alone: KilledRun | None
    """without a daemon; null without a cgroup"""
    managed: LimitedRun
    """with a daemon"""


class DemoOutput(MeasuredOutput, frozen=True, kw_only=True):
    """What the demonstration measured."""

    engine: str
    """what runs the vCPUs"""
    mem_bytes: int
    """guest memory"""
    trackers: list[DemoTracker]
    """trackers that work on this host and see reads"""
    throughput: DemoThroughput
    """the cost of aging"""
    heatmap: str | None
    """the picture; null without matplotlib"""
    limited: LimitedRuns
    """under a limit"""
    ok: bool
    """whether every part had the expected result"""
