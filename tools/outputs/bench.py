"""Outputs of ``kvmhost bench``: one head for all benchmarks, and rows for each.

Benchmarks that have parts are in :mod:`kvmhost.tools.outputs.benchparts`. Times are medians
over the rounds where nothing else is said; a ratio ``a_of_b`` is a divided by b, which took
turns in one run.
"""

from __future__ import annotations

from typing import Literal

from kvmhost.tools.outputs.base import Output

__all__ = [
    "BenchOutput",
    "ExitsOutput",
    "ExitsParameters",
    "FractionRow",
    "HarvestOutput",
    "HarvestParameters",
    "HostRow",
    "LoopName",
    "LoopRow",
    "MeasuredOutput",
    "MethodName",
    "MethodRow",
    "ProcessName",
    "ProcessRow",
    "QueryName",
    "QueryRow",
    "RecordRow",
    "SamplingOutput",
    "SamplingParameters",
    "SnapshotBenchOutput",
    "SnapshotParameters",
    "SpeedRow",
    "StartOutput",
    "StartParameters",
    "TrackerMemoryRow",
    "TrackerRow",
    "TrackersOutput",
    "TrackersParameters",
    "ViewCost",
    "ViewedRow",
    "ViewsOutput",
    "ViewsParameters",
    "WalkOutput",
    "WalkParameters",
    "YoungOutput",
    "YoungParameters",
]


class HostRow(Output, frozen=True, kw_only=True):
    """What a measurement ran on."""

    processor: str
    """the first processor, as the kernel names it; empty if it names none"""
    architecture: str
    """its architecture, as uname -m prints it"""
    n_cpus: int
    """processors that the process may use"""
    kernel: str
    """release of the kernel"""


class MeasuredOutput(Output, frozen=True, kw_only=True):
    """The head of every measurement's output."""

    version: str
    """version of kvmhost"""
    host: HostRow
    """what it ran on"""


class BenchOutput(MeasuredOutput, frozen=True, kw_only=True):
    """The head of every benchmark's output; ``parameters`` and the figures follow."""

    benchmark: str
    """its name"""


class WalkParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench walk``."""

    n_entries: int
    """entries of the page table"""
    rounds: int
    """measurements of each loop"""


LoopName = Literal["sum", "wide_sum", "harvest_old", "and", "harvest_young"]


class LoopRow(Output, frozen=True, kw_only=True):
    """One loop over the entries."""

    loop: LoopName
    """what it does: harvests, and bare loops to compare them with"""
    ns_per_entry: float
    """its time"""


class WalkOutput(BenchOutput, frozen=True, kw_only=True):
    """The walk over a live table, beside bare loops."""

    parameters: WalkParameters
    """what was measured"""
    scan: Literal["scalar", "avx2"]
    """instructions of the scan"""
    loops: list[LoopRow]
    """the loops"""
    old_of_sum_ratio: float
    """speed of a harvest of old entries, of that of a plain 64-bit sum"""
    old_of_wide_sum_ratio: float
    """the same, of that of a vectorised sum"""
    young_of_and_ratio: float
    """time of a harvest of young entries, of that of a bare atomic-and loop"""


class ExitsParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench exits``."""

    exits: int
    """exits of each measurement"""
    rounds: int
    """measurements of each method"""


MethodName = Literal["minimal C loop", "C run loop", "Python device", "ioeventfd", "coalesced"]


class MethodRow(Output, frozen=True, kw_only=True):
    """One method of handling a port write."""

    method: MethodName
    """its name"""
    ns_per_exit: float
    """its time"""
    of_minimal_ratio: float
    """median of the rounds, of the time of the minimal C loop in the same round"""


class ExitsOutput(BenchOutput, frozen=True, kw_only=True):
    """The cost of a port exit."""

    parameters: ExitsParameters
    """what was measured"""
    methods: list[MethodRow]
    """the methods"""


class HarvestParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench harvest``."""

    mem_bytes: int
    """guest memory"""
    hot_pages: int
    """pages that the guest touches"""
    duration_s: float
    """length of a segment"""
    rounds: int
    """segments of each kind"""


class TrackerRow(Output, frozen=True, kw_only=True):
    """One tracker."""

    tracker: str
    """its name"""
    scan_ns_per_page: float
    """a harvest that clears nothing, per page of memory"""
    rearm_ns_per_page: float
    """clearing and re-arming, per hot page"""
    refault_ns_per_page: float
    """the guest's next touch of a re-armed page"""
    lost_share: float
    """time that the guest loses to one harvest per second"""
    min_lost_share: float
    """the least of the rounds"""
    max_lost_share: float
    """the most of the rounds"""
    lost_by_cpu_share: float
    """the same, by the vCPU's processor time"""
    bare_refault_s: float
    """time of one fault for each hot page"""
    lost_of_bare_refault_ratio: float
    """lost time, of the bare faults"""
    lost_by_cpu_of_bare_refault_ratio: float
    """the same, by the vCPU's processor time"""


class HarvestOutput(BenchOutput, frozen=True, kw_only=True):
    """The speed of trackers, and what the guest pays."""

    parameters: HarvestParameters
    """what was measured"""
    trackers: list[TrackerRow]
    """the trackers that work on this host"""


class SamplingParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench sampling``."""

    tracker: str
    """the tracker"""
    mem_bytes: int
    """guest memory"""
    hot_pages: int
    """pages that the guest touches"""
    duration_s: float
    """length of a segment"""
    rounds: int
    """segments of each fraction"""


class FractionRow(Output, frozen=True, kw_only=True):
    """One fraction of the pages that a harvest clears and re-arms."""

    fraction: float
    """the fraction"""
    lost_share: float
    """time that the guest loses to one harvest per second"""
    min_lost_share: float
    """the least of the rounds"""
    max_lost_share: float
    """the most of the rounds"""
    lost_by_cpu_share: float
    """the same, by the vCPU's processor time"""
    recall_ratio: float
    """touched pages that were reported"""
    mean_old_after_harvests: float | None
    """harvests until an untouched page reads as old; null if none did"""
    max_old_after_harvests: int | None
    """the most of them"""
    max_new_after_harvests: int | None
    """the most harvests until a touched page reads as young; null if none did"""


class SamplingOutput(BenchOutput, frozen=True, kw_only=True):
    """The cost and the staleness of re-arming a fraction of the pages."""

    parameters: SamplingParameters
    """what was measured"""
    default_fraction: float
    """the default of --fraction in other commands"""
    fractions: list[FractionRow]
    """the fractions"""


class SnapshotParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench snapshot``."""

    mem_bytes: int
    """guest memory"""
    rounds: int
    """snapshots, each followed by a copy"""


class SnapshotBenchOutput(BenchOutput, frozen=True, kw_only=True):
    """A live snapshot of a VM that evicts, beside ``cp`` of its file."""

    parameters: SnapshotParameters
    """what was measured"""
    resident_max_bytes: int
    """the VM's limit"""
    evicted_bytes: int
    """memory that was evicted at the end"""
    fault_ins: int
    """evicted pages that came back during the run"""
    file_bytes: int
    """size of the last snapshot"""
    save_s: float
    """the snapshot"""
    cp_s: float
    """the copy"""
    cp_fsync_s: float
    """the copy and fsync"""
    restore_s: float
    """a restore of the last snapshot"""
    save_mib_per_s: float
    """speed of the snapshot"""
    speed_of_cp_ratio: float
    """speed of the snapshot, of that of the copy"""
    speed_of_cp_fsync_ratio: float
    """speed of the snapshot, of that of the copy with fsync"""


class StartParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench start``."""

    rounds: int
    """starts of each process"""
    engine: str
    """what runs the vCPUs"""
    image: str
    """the image; that of the benchmark is a temporary file"""


ProcessName = Literal["python", "hello", "image", "qemu"]


class ProcessRow(Output, frozen=True, kw_only=True):
    """One kind of process, from its start to its end."""

    process: ProcessName
    """an interpreter that does nothing, run hello, run IMAGE, the image under QEMU"""
    median_s: float
    """its time"""
    max_s: float
    """the longest of the rounds"""


class StartOutput(BenchOutput, frozen=True, kw_only=True):
    """The time to start a guest, and the memory of a VM process."""

    parameters: StartParameters
    """what was measured"""
    processes: list[ProcessRow]
    """the processes; QEMU with --qemu only"""
    image_beyond_python_s: float
    """run IMAGE without the interpreter's own start"""
    image_of_qemu_ratio: float | None
    """run IMAGE, of QEMU in the same round; null without --qemu"""
    first_exit_s: float | None
    """from creating a machine to its first exit; null without KVM"""
    p99_first_exit_s: float | None
    """99th percentile of it; null without KVM"""
    hello_peak_rss_bytes: int
    """peak resident memory of run hello"""
    hello_guest_bytes: int
    """of it, guest memory"""
    hello_beyond_guest_bytes: int
    """of it, the rest"""


class TrackersParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench trackers``."""

    mem_bytes: int
    """guest memory"""
    rounds: int
    """measurements of each variant"""


class SpeedRow(Output, frozen=True, kw_only=True):
    """A harvest beside the bare kernel calls for the same range."""

    tracker: str
    """the tracker"""
    case: str
    """which pages are young, and whether the harvest clears"""
    bare_us: float
    """the bare calls"""
    harvest_us: float
    """the harvest"""
    harvest_of_bare_ratio: float
    """the harvest, of the bare calls"""


class TrackerMemoryRow(Output, frozen=True, kw_only=True):
    """The memory that a tracker takes."""

    tracker: str
    """the tracker"""
    held_bytes: int
    """memory after three harvests"""
    max_bytes: int
    """the most during them"""
    max_share: float
    """the same as a share of guest memory"""


class TrackersOutput(BenchOutput, frozen=True, kw_only=True):
    """Trackers beside the bare kernel calls, and their memory."""

    parameters: TrackersParameters
    """what was measured"""
    speed: list[SpeedRow]
    """harvests"""
    memory: list[TrackerMemoryRow]
    """trackers that work on this host"""


class YoungParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench young``."""

    mem_bytes: int
    """memory of the large guest"""
    n_windows: int
    """windows of each record"""
    rounds: int
    """repetitions of each query"""


class RecordRow(Output, frozen=True, kw_only=True):
    """One record that was written."""

    mem_bytes: int
    """memory of its guest"""
    append_ms: float
    """append a window"""
    mean_append_ms: float
    """mean of the same"""
    p99_append_ms: float
    """99th percentile of it"""
    stored_bytes: int
    """size of the record"""
    bits_bytes: int
    """size of one bit per page and window"""


QueryName = Literal["open", "wss", "bitmap", "hot", "heatmap", "html"]


class QueryRow(Output, frozen=True, kw_only=True):
    """One query of the large record, in a process of its own."""

    query: QueryName
    """what was asked"""
    median_s: float
    """its time, without imports"""
    peak_rss_bytes: int
    """peak resident memory of the process"""


class YoungOutput(BenchOutput, frozen=True, kw_only=True):
    """Writing, opening and querying records."""

    parameters: YoungParameters
    """what was measured"""
    records: list[RecordRow]
    """a record of a 1 GiB guest, and of the large one"""
    queries: list[QueryRow]
    """the queries"""
    html_bytes: int
    """size of the heatmap as a page"""


class ViewsParameters(Output, frozen=True, kw_only=True):
    """Arguments of ``bench views``."""

    mem_bytes: int
    """guest memory"""
    rounds: int
    """passes of the daemon that count, in each row"""


class ViewedRow(Output, frozen=True, kw_only=True):
    """A daemon beside other readers of its VM."""

    daemon: str
    """which other readers there are"""
    own_views: bool
    """whether each reader has a view of its own"""
    mean_young_pages: float
    """young pages of a pass"""
    young_of_alone_ratio: float
    """the same, of those of the daemon alone"""
    refaulted_pages: int
    """pages that came back"""
    refaulted_of_alone_ratio: float
    """the same, of those of the daemon alone"""
    sweeps: int
    """sweeps of the tracker, for all readers"""


class ViewCost(Output, frozen=True, kw_only=True):
    """The cost of a view, on bitmaps of a 1 GiB guest."""

    add_ns_per_page: float
    """add the pages of a sweep"""
    take_ns_per_page: float
    """take the young pages"""
    add_coarse_ns_per_page: float
    """add a sweep with coarse bits"""
    bytes_per_page: float
    """its memory"""
    coarse_bytes_per_page: float
    """its memory with coarse bits"""


class ViewsOutput(BenchOutput, frozen=True, kw_only=True):
    """What readers of one VM take from each other, and the cost of a view."""

    parameters: ViewsParameters
    """what was measured"""
    rows: list[ViewedRow]
    """the daemon alone, and beside others"""
    view: ViewCost
    """the cost of a view"""
