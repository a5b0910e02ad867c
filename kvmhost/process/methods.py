"""Probes the methods for tracking another process, on a page of this one."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from kvmhost._ffi import ffi
from kvmhost.errors import CapabilityError
from kvmhost.process.foreign import METHODS, Method, SoftDirty, Target, Written
from kvmhost.process.procmaps import Mapping
from kvmhost.trackers.base import Support
from kvmhost.trackers.pagescan import has_soft_dirty, scans
from kvmhost.units import PAGE_BYTES

__all__ = ["probe_methods"]


def probe_methods() -> dict[str, Support]:
    """Try each method on a page of this process; report whether it works, and why not.

    ``written`` also requires that the target process has registered its memory.
    """
    found: dict[str, Support] = {}
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        page[0] = 1
        # SAFETY: the view is released before the mapping closes.
        with ffi.from_buffer(page) as view:
            here = _Here(int(ffi.cast("uintptr_t", view)))
            try:
                for name, method in METHODS.items():
                    found[name] = _try(method, here)
            finally:
                here.close()
    return found


def _try(method: Callable[[Target], Method], here: _Here) -> Support:
    try:
        used = method(here)
        if isinstance(used, Written):
            works = scans(here.pagemap_fd)
            reason = "of processes that register their memory" if works else "no PAGEMAP_SCAN"
            return Support(works, reason)
        if isinstance(used, SoftDirty):
            # begin() is not called: it would clear the bits of this whole process.
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
        self.mapping = Mapping(address, address + PAGE_BYTES, 0, "00:01", 0, "/memfd:probe")
        self.pidfd = os.pidfd_open(self.pid)
        self.pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.pagemap_fd)
