"""Outputs of the benchmarks that have parts; the rows of a part that was not run are empty."""

from __future__ import annotations

from typing import Literal

from kvmhost.tools.outputs.base import Output
from kvmhost.tools.outputs.bench import BenchOutput

__all__ = [
    "AgingKind",
    "AgingRow",
    "Change",
    "ChangeRow",
    "CodecRow",
    "CostRow",
    "FaultInRow",
    "LimitedGuestRow",
    "MmuOutput",
    "MmuParameters",
    "OverheadRow",
    "PagerOutput",
    "PagerParameters",
    "ReclaimOutput",
    "ReclaimParameters",
    "ScaleRow",
    "ScanRow",
    "SecondPassRow",
    "SparseRow",
    "TraceRow",
    "WayRow",
]


class PagerParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench pager``."""

    parts: list[str]
    """parts that were run"""
    n_pages: int
    """faults: pages that are evicted and touched"""
    rounds: int
    """measurements of each variant"""
    content: str
    """faults: contents of the pages"""
    prefetch_pages: int
    """faults: pages of prefetch of one more pager; 0: none"""
    mem_bytes: int
    """overhead: guest memory that is compared with none"""


class CodecRow(Output, frozen=True, kw_only=True):
    """One codec on pages of one content."""

    content: str
    """what is in the pages"""
    codec: str
    """the codec"""
    compression_ratio: float | None
    """size before over size after; null if all pages are same-filled"""
    same_filled_pages: int
    """pages kept as one word"""
    raw_pages: int
    """pages kept uncompressed"""
    put_ns_per_page: float
    """put a page into the store"""
    get_ns_per_page: float
    """get it back"""
    get_unchecked_ns_per_page: float
    """the same without checksums"""


class FaultInRow(Output, frozen=True, kw_only=True):
    """One pager: all pages are evicted, and touched in random order."""

    pager: str
    """the minimal C pager, or this one with a codec and a store"""
    p50_ns: float
    """median time of a touch"""
    p99_ns: float
    """99th percentile of it"""
    evictions_per_s: float
    """pages evicted"""
    scan_ns_per_page: float
    """touches in the order of addresses"""
    p50_of_minimal_ratio: float
    """median of a touch, of that with the minimal pager"""
    evictions_of_minimal_ratio: float
    """speed of evictions, of that of the minimal pager"""


class OverheadRow(Output, frozen=True, kw_only=True):
    """Memory of a VM process beyond guest memory and the contents of the store."""

    process_base_bytes: int
    """private memory with 64 MiB of guest memory"""
    private_bytes_per_gib: float
    """private memory for each further GiB"""
    page_tables_bytes_per_gib: float
    """page tables for each further GiB"""
    private_share: float
    """private memory as a share of guest memory"""
    page_tables_share: float
    """page tables as a share of guest memory"""


class PagerOutput(BenchOutput, frozen=True, kw_only=True):
    """Codecs, fault-in, eviction and memory of the pager."""

    parameters: PagerParameters
    """what was measured"""
    codecs: list[CodecRow]
    """part codecs"""
    faults: list[FaultInRow]
    """part faults"""
    overhead: OverheadRow | None
    """part overhead"""


class MmuParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench mmu``."""

    parts: list[str]
    """parts that were run"""
    table_formats: list[str]
    """ways: formats that were measured"""


class ScanRow(Output, frozen=True, kw_only=True):
    """Harvests of a full table, beside bare loops over the same entries."""

    table_format: str
    """the format"""
    sum_ns_per_entry: float
    """a plain 64-bit sum"""
    wide_sum_ns_per_entry: float
    """a vectorised sum"""
    old_ns_per_entry: float
    """a harvest of old entries"""
    and_ns_per_entry: float
    """a bare atomic-and loop"""
    young_ns_per_entry: float
    """a harvest of young entries"""
    old_of_sum_ratio: float
    """speed of a harvest of old entries, of that of the plain sum"""
    old_of_wide_sum_ratio: float
    """the same, of that of the vectorised sum"""
    young_of_and_ratio: float
    """time of a harvest of young entries, of that of the bare loop"""


class SparseRow(Output, frozen=True, kw_only=True):
    """1 GiB of mapped pages, alone and in a large space."""

    table_format: str
    """the format"""
    space_gib: int
    """size of the space"""
    alone_us: float
    """a harvest of the mapped range"""
    sparse_us: float
    """a harvest of the space"""
    sparse_of_alone_ratio: float
    """the space, of the mapped range"""


class ScaleRow(Output, frozen=True, kw_only=True):
    """A table of a large guest, in base pages."""

    guest_gib: int
    """guest memory that is mapped"""
    n_entries: int
    """entries"""
    table_bytes: int
    """size of the tables"""
    resident_bytes: int
    """resident memory that they take"""
    build_s: float
    """map all"""
    harvest_young_s: float
    """harvest all entries, all young"""
    harvest_old_s: float
    """harvest all entries, all old"""


AgingKind = Literal["none", "locked", "lockless"]


class AgingRow(Output, frozen=True, kw_only=True):
    """vCPUs fault pages in, while the same memory is aged."""

    n_vcpus: int
    """vCPUs"""
    aging: AgingKind
    """with the MMU lock, without it, or no aging"""
    vcpu_s: float
    """time until all pages are there"""
    pass_s: float
    """mean time of an aging pass; 0 without aging"""
    lock_waits: int
    """waits for the MMU lock"""
    slowdown_ratio: float
    """time of the vCPUs, of that without aging in the same round"""


class WayRow(Output, frozen=True, kw_only=True):
    """One way of aging, of the eight of 2023."""

    table_format: str
    """the format"""
    batch_pages: int
    """pages of a batch"""
    locked: bool
    """whether it holds the MMU lock"""
    flush: bool
    """whether it flushes the TLB for each page"""
    ns_per_page: float
    """cost of aging"""
    slowdown_ratio: float
    """time of the vCPU, of that without aging in the same round"""


Change = Literal["batching", "no lock", "no flush"]


class ChangeRow(Output, frozen=True, kw_only=True):
    """What one change of the three brings, over the four pairs of ways that differ in it."""

    table_format: str
    """the format"""
    change: Change
    """the change"""
    cost_ratio: float
    """cost of aging before over after, geometric mean"""
    min_cost_ratio: float
    """the least of the pairs"""
    max_cost_ratio: float
    """the most of the pairs"""
    vcpu_ratio: float
    """time of the vCPU before over after, geometric mean"""


class MmuOutput(BenchOutput, frozen=True, kw_only=True):
    """Speed, locking and batching of table walks."""

    parameters: MmuParameters
    """what was measured"""
    scan: list[ScanRow]
    """part scan"""
    sparse: list[SparseRow]
    """part sparse"""
    scale: list[ScaleRow]
    """part scale, one row"""
    aging: list[AgingRow]
    """part aging"""
    ways: list[WayRow]
    """part ways"""
    changes: list[ChangeRow]
    """part ways: what each change brings"""


class ReclaimParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench reclaim``."""

    parts: list[str]
    """parts that were run"""
    workloads: list[str]
    """workloads of traces and guests"""
    n_pages: int
    """pages of a trace; a guest has twice as many"""
    n_windows: int
    """windows of a trace"""
    duration_s: float
    """length of the measured segments of guests"""
    mem_bytes: int
    """cost: guest memory"""


class TraceRow(Output, frozen=True, kw_only=True):
    """A computed trace, replayed through a policy."""

    workload: str
    """the workload"""
    budget_share: float
    """resident memory, of the touched"""
    policy: str
    """the policy; belady is the optimum"""
    touches: int
    """touched pages, over all windows"""
    refaults: int
    """touches of pages that were evicted"""
    refaults_of_belady_ratio: float
    """the same, of those of the optimum"""
    evictions: int
    """evictions"""
    wrong_evictions: int
    """of these, undone within four windows"""
    forced_evictions: int
    """of these, against the policy's protection"""
    swept_pages: int
    """pages that sweeps tested"""
    probed_pages: int
    """pages that were tested one by one"""
    policy_ms_per_window: float
    """time of the policy"""


class LimitedGuestRow(Output, frozen=True, kw_only=True):
    """A KVM guest under a limit, with one pass per second."""

    workload: str
    """the workload"""
    policy: str
    """the policy"""
    budget_share: float
    """resident memory, of the touched"""
    touched_pages: int
    """pages that the guests touch"""
    throughput_of_no_limit_ratio: float
    """epochs per second, of those without a limit"""
    epochs_per_s: float
    """epochs of all guests"""
    fault_ins_per_epoch: float
    """evicted pages that came back"""
    refaulted_pages: int
    """evicted pages that were resident again at a pass"""
    belady_refaults: int | None
    """refaults of the optimum for the recorded windows; null for policies that record none"""
    wrong_evictions: int
    """evictions that were undone within four windows"""
    busy_ms_per_pass: float
    """processor time of a pass"""


class CostRow(Output, frozen=True, kw_only=True):
    """One pass per second for a large guest in steady state."""

    policy: str
    """the policy"""
    guest_gib: float
    """guest memory"""
    busy_percent_per_gib: float
    """share of a core, all"""
    policy_percent_per_gib: float
    """share of a core, the policy"""
    harvest_percent_per_gib: float
    """share of a core, harvests"""


class SecondPassRow(Output, frozen=True, kw_only=True):
    """The second pass of a guest over its memory, under a limit of half of it."""

    aging: str
    """how pages are aged"""
    second_pass_s: float
    """its time"""
    of_batched_ratio: float
    """the same, of that of aging in batches without the lock"""
    test_s: float
    """time of the tests of accessed bits, locks included"""
    rearm_s: float
    """time of re-arming: invalidations through KVM, with its lock and its flushes"""
    n_single_tests: int
    """pages that were tested one by one, each with the lock held and an invalidation"""
    n_flush_requests: int
    """flushes of the TLBs of all vCPUs, as KVM counts them"""
    fault_ins: int
    """evicted pages that came back"""


class ReclaimOutput(BenchOutput, frozen=True, kw_only=True):
    """Policies beside Belady's optimum."""

    parameters: ReclaimParameters
    """what was measured"""
    trace: list[TraceRow]
    """part trace"""
    guests: list[LimitedGuestRow]
    """part guests"""
    cost: list[CostRow]
    """part cost"""
    rows: list[SecondPassRow]
    """part rows"""
