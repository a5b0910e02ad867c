"""Which ways to look at another process work here, found out on a page of this one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from kvmhost._ffi import ffi
from kvmhost.errors import CapabilityError
from kvmhost.process.foreign import WAYS, SoftDirty, Target, Way, Written
from kvmhost.process.procmaps import Mapping
from kvmhost.trackers.base import Support
from kvmhost.trackers.pagescan import has_soft_dirty, scans

__all__ = ["probe_ways"]


def probe_ways() -> dict[str, Support]:
    """Try each way on a page of this process; say which works, and why one does not.

    ``written`` works if the process that is looked at has registered its memory as well.
    """
    found: dict[str, Support] = {}
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        # SAFETY: the view is released before the mapping closes.
        with ffi.from_buffer(page) as view:
            here = _Here(int(ffi.cast("uintptr_t", view)))
            try:
                for name, way in WAYS.items():
                    found[name] = _try(way, here)
            finally:
                here.close()
    return found


def _try(way: Callable[[Target], Way], here: _Here) -> Support:
    try:
        used = way(here)
        if isinstance(used, Written):
            works = scans(here.pagemap_fd)
            reason = "of processes that register their memory" if works else "no PAGEMAP_SCAN"
            return Support(works, reason)
        if isinstance(used, SoftDirty):
            # Not begun: that would clear the bits of this whole process.
            works = has_soft_dirty()
            return Support(works, "works" if works else "no CONFIG_MEM_SOFT_DIRTY")
        used.begin()
    except CapabilityError as error:
        return Support(False, f"{error.needed}: {error.found}")
    return Support(True, "works on this process")


class _Here:
    """One page of this process, as a target."""

    def __init__(self, address: int) -> None:
        self.pid, self.proc = os.getpid(), Path("/proc")
        self.mapping = Mapping(address, address + 4096, 0, "00:01", 0, "/memfd:probe")
        self.pidfd = os.pidfd_open(self.pid)
        self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.pagemap_fd)
