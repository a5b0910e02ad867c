"""Trackers: where a young bit comes from.

========= =========================================== ============= ================
tracker   how                                         sees          granularity
========= =========================================== ============= ================
guestpt   accessed bits in the guest's own tables     reads, writes 4 KiB
pagemap   which host PTEs came back after a zap       reads, writes 4 KiB, or 64 KiB
                                                                    without userfaultfd
dirty     KVM's dirty log or dirty rings              writes        4 KiB
uffd      minor faults that userspace answers         reads, writes 4 KiB
                                                      and order
idle      the kernel's idle flags, by pfn             reads, writes 4 KiB, or the
                                                                    huge page
========= =========================================== ============= ================

``auto`` is ``guestpt`` for a tiny guest, ``pagemap`` for one that builds its own tables.
A machine has at most one tracker at a time: re-arming for one clears what another
reads.
"""

from kvmhost.trackers.base import Support, TrackedVm, Tracker, TrackerInfo
from kvmhost.trackers.registry import NAMES, create, describe, probe_all, resolve
from kvmhost.trackers.sampling import sample_mask

__all__ = [
    "NAMES",
    "Support",
    "TrackedVm",
    "Tracker",
    "TrackerInfo",
    "create",
    "describe",
    "probe_all",
    "resolve",
    "sample_mask",
]
