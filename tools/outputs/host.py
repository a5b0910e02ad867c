"""Outputs of ``kvmhost doctor``, ``guests`` and ``run``."""

from __future__ import annotations

from kvmhost.boot.image import Unit
from kvmhost.tools.outputs.base import Output

__all__ = [
    "DoctorOutput",
    "FeatureRow",
    "FindingRow",
    "GuestRow",
    "GuestsOutput",
    "PagerRow",
    "ParamRow",
    "RunReport",
]


class FeatureRow(Output, frozen=True, kw_only=True):
    """Whether a feature of kvmhost works on this host."""

    works: bool
    """whether it works"""
    why: str
    """how it works, or why it does not"""
    remedy: str
    """how to fix it; empty if it works"""


class FindingRow(Output, frozen=True, kw_only=True):
    """The result of one probe."""

    area: str
    """what it is about: engine, tracker, pager, pressure, …"""
    name: str
    """what was tried"""
    works: bool | None
    """whether it works; null for information without a verdict"""
    found: str
    """what was found, or why it does not work"""
    remedy: str
    """how to make it work; else empty"""


class DoctorOutput(Output, frozen=True, kw_only=True):
    """What works on this host."""

    usable: bool
    """whether at least one engine works"""
    features: dict[str, FeatureRow]
    """verdicts by feature: run_kvm, run_emulated, reclaim, tracker_NAME, cgroup_limits, psi, lab,
    pictures, records"""
    findings: list[FindingRow]
    """everything that was tried"""


class ParamRow(Output, frozen=True, kw_only=True):
    """A parameter of a guest."""

    name: str
    """its name"""
    default: int
    """its default"""
    unit: Unit
    """unit of its values; empty for a plain number"""
    help: str
    """its meaning"""


class GuestRow(Output, frozen=True, kw_only=True):
    """A guest image."""

    name: str
    """its name"""
    path: str
    """its file"""
    params: list[ParamRow]
    """its parameters"""
    contract: str
    """the comment at the head of its source; empty without a source beside the file"""


class GuestsOutput(Output, frozen=True, kw_only=True):
    """The built-in guests, or the one that was asked for."""

    guests: list[GuestRow]
    """the guests"""


class PagerRow(Output, frozen=True, kw_only=True):
    """The pager's counters; pages are counted since the start unless they are `now`."""

    resident_pages: int
    """pages in the memfds now"""
    swapped_pages: int
    """pages that were found in the host's swap"""
    evicted_pages: int
    """pages in the store now"""
    same_filled_pages: int
    """of these, kept as one word"""
    raw_pages: int
    """of these, kept uncompressed"""
    store_bytes: int
    """page contents in the store now"""
    store_held_bytes: int
    """memory or file blocks that the store takes for them"""
    evictions: int
    """evictions"""
    direct_evictions: int
    """of these, made by the fault handler at the limit"""
    fault_ins: int
    """pages brought back because of a touch"""
    restored_pages: int
    """pages brought back on request"""
    prefetched_pages: int
    """pages brought back beside one that was touched"""
    dropped_pages: int
    """pages that the guest declared free"""
    dropped_evicted_pages: int
    """of these, dropped from the store"""
    paged_out_pages: int
    """pages handed to the host's swap"""
    zero_fills: int
    """first touches of a page"""
    wp_faults: int
    """writes that met an eviction"""
    wakes: int
    """faults whose page was resident already"""
    over_limit: int
    """faults served above the limit, because nothing could be evicted"""
    split_pieces: int
    """pieces of 2 MiB that were huge pages before an eviction"""
    stayed_pages: int
    """pages that were punched and found still in memory"""
    memory_waits: int
    """faults that found no memory on the host"""
    memory_evictions: int
    """pages evicted to free memory"""
    pending_faults: int
    """faults that wait for memory now"""
    errors: int
    """evictions that failed by a system call or the store"""
    lost_pages: int
    """pages that the store could not give back"""
    moved_records: int
    """records moved inside the store, to free chunks"""
    disk_full: int
    """evictions refused because the store's file was full"""
    latency_sum_ns: int
    """time in the handler, of all fault-ins"""
    outcomes: dict[str, int]
    """pages of eviction requests by outcome"""
    latency_ns: list[int]
    """histogram: number b counts fault-ins that took 2^b to 2^(b+1) ns in the handler"""


class RunReport(Output, frozen=True, kw_only=True):
    """A guest has ended."""

    image: str
    """the file that was loaded"""
    engine: str
    """what ran the vCPUs"""
    n_vcpus: int
    """number of vCPUs"""
    mem_bytes: int
    """guest memory"""
    status: int
    """its exit status"""
    doorbells: int
    """writes to the doorbell port"""
    exits: int
    """exits to the VMM"""
    uptime_s: float
    """time from the start to the end"""
    resident_bytes: int
    """guest memory that the memfds held at the end"""
    peak_rss_bytes: int
    """peak resident memory of the process, guest memory included"""
    pager: PagerRow | None
    """the pager's counters; null if nothing used it"""
