"""The bound on each benchmark figure.

The tables of README.md and docs/ quote these by :attr:`Bound.what`; a test compares them.
"""

from __future__ import annotations

import dataclasses

__all__ = ["BOUNDS", "Bound"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """One bound.

    :param what: name of the figure in the tables of the documentation
    :param unit: unit of the figure; empty for a ratio
    :param least: whether it is a lower bound; otherwise it is an upper bound
    """

    what: str
    limit: float
    unit: str = ""
    least: bool = False

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{'at least' if self.least else 'at most'} {self.limit:g}{unit}"


#: Bounds by benchmark and figure.
BOUNDS = {
    "walk.old_of_sum_ratio": Bound(
        "harvest, all pages old, speed relative to a plain 64-bit sum", 0.7, least=True
    ),
    "walk.young_of_and_ratio": Bound(
        "harvest, all pages young, time relative to a bare atomic-and loop", 1.3
    ),
    "exits.C run loop": Bound("port exit in the C loop, relative to a minimal C loop", 1.05),
    "exits.Python device": Bound(
        "port exit to a device in Python, relative to a minimal C loop", 3
    ),
    "exits.ioeventfd": Bound(
        "port write to an ioeventfd, relative to an exit in a minimal C loop", 1
    ),
    "exits.coalesced": Bound("coalesced port write, relative to an exit in a minimal C loop", 1),
    "harvest.lost_of_bare_refault_ratio": Bound(
        "guest time lost to one harvest per second, relative to the bare re-faults", 1.3
    ),
    "sampling.lost_share": Bound(
        "guest time lost to one harvest per second that re-arms an eighth of the pages", 3, "%"
    ),
    "trackers.pagemap": Bound(
        "`pagemap` harvest, relative to a bare PAGEMAP_SCAN of the same range", 1.3
    ),
    "trackers.dirty": Bound("`dirty` harvest that clears, relative to the bare ioctls", 1.2),
    "trackers.max_share": Bound("memory of a tracker, share of guest memory", 0.1, "%"),
    "pager.p50_of_minimal_ratio": Bound(
        "fault-in with lz4, median, relative to a minimal C pager", 1.5
    ),
    "pager.private_share": Bound(
        "memory of a VM process per GiB of guest, page tables included", 0.5, "%"
    ),
    "snapshot.speed_of_cp_fsync_ratio": Bound(
        "live snapshot of an evicting VM, speed relative to cp and fsync of the same bytes",
        0.7,
        least=True,
    ),
    "start.hello_s": Bound("`kvmhost run hello`, whole process", 0.25, "s"),
    "start.image_beyond_python_s": Bound(
        "multiboot image that prints and exits, beyond Python's own start", 0.15, "s"
    ),
    "start.image_of_qemu_ratio": Bound(
        "multiboot image that prints and exits, relative to QEMU on the same file", 1.2
    ),
    "start.hello_beyond_guest_bytes": Bound(
        "memory of `run hello --mem 128M` beyond the guest's own", 60, "MiB"
    ),
    "mmu.sparse_of_alone_ratio": Bound("1 GiB inside 1 TiB, time relative to 1 GiB alone", 1.2),
    "young.append_ms": Bound("append a bitmap of a 1 GiB guest, median", 2, "ms"),
    "young.stored_bytes": Bound("3600 windows of a 1 GiB guest", 20, "MiB"),
    "young.open_s": Bound("open an hour of a 64 GiB guest", 0.3, "s"),
    "young.wss_s": Bound("its working set over 1, 10, 60 and 600 windows", 2, "s"),
    "young.heatmap_s": Bound("its heatmap as PNG", 5, "s"),
    "young.heatmap_peak_rss_bytes": Bound("memory resident while that is drawn", 1024, "MiB"),
    "views.young_of_alone_ratio": Bound(
        "young pages per pass of a daemon beside a record, a live view and a heatmap, difference "
        "from those alone",
        3,
        "%",
    ),
    "views.refaulted_of_alone_ratio": Bound(
        "refaults under that daemon, difference from those alone", 3, "%"
    ),
    "reclaim.lru_gen_of_belady": Bound(
        "refaults of lru_gen at a budget of 50 %, relative to Belady's optimum", 1.5
    ),
}
