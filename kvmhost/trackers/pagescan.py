"""Scans of /proc/PID/pagemap: which pages of a mapping are present, huge or swapped.

By ``PAGEMAP_SCAN`` (Linux 6.7), with a buffer that grows while calls fill it, or by
reading 8 bytes per page. A shared mapping has no swap entries: what the kernel swapped
out of a memfd is absent from the page table. The markers that userfaultfd leaves in
place of a write-protected page read as swapped, with both methods.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import n_words, unpack
from kvmhost.units import PAGE_BYTES

__all__ = [
    "PLAIN_PAGEMAP_ENV",
    "Bits",
    "PageStates",
    "has_soft_dirty",
    "new_scanner",
    "page_states",
    "scans",
]

#: Set to a non-empty value to read pagemap as on kernels before 6.7.
PLAIN_PAGEMAP_ENV = "KVMHOST_PLAIN_PAGEMAP"

#: Initial number of regions in a scan's buffer, and pages per region at most: 24
#: bytes each, less than 0.01 % of the memory.
_START_REGIONS, _PAGES_PER_REGION = 512, 64

Bits = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class PageStates:
    """State of the page-table entry of each page of a range; arrays have its length.

    :param present: mapped
    :param huge: mapped by an entry for a huge page; plain reads cannot detect it
    :param swapped: a swap entry or a userfaultfd marker. The rest is absent
    """

    present: Bits
    huge: Bits
    swapped: Bits


def new_scanner(n_pages: int, start_regions: int = _START_REGIONS) -> Any:
    """Return a scan buffer for mappings of up to ``n_pages``; frees itself.

    :raises MemoryError: if there is no memory for it
    """
    scanner = lib.kh_scanner_new(start_regions, max(start_regions, n_pages // _PAGES_PER_REGION))
    if scanner == ffi.NULL:
        raise MemoryError("scan buffer")
    # SAFETY: owned by the returned object; C keeps no copy of the pointer.
    return ffi.gc(scanner, lib.kh_scanner_free)


def scans(pagemap_fd: int) -> bool:
    """Return whether the kernel has ``PAGEMAP_SCAN`` and its use is permitted.

    :raises IoctlError: if it fails for a reason other than being unavailable
    """
    if os.environ.get(PLAIN_PAGEMAP_ENV):
        return False
    words = ffi.new("uint64_t *")
    # Page 0, which no process has mapped: only the call itself is tested.
    result = lib.kh_pagemap_scan(pagemap_fd, 0, 1, words)
    if result in (-errno.ENOTTY, -errno.EINVAL):
        return False
    check(result, "PAGEMAP_SCAN", start=0)
    return True


def page_states(pagemap_fd: int, address: int, n_pages: int, scanner: Any = None) -> PageStates:
    """Return the states of a mapping's pages.

    :param scanner: from :func:`new_scanner`; None reads pagemap plainly
    :raises IoctlError: ``ESRCH`` if the process has ended
    """
    words = np.zeros((3, n_words(n_pages)), dtype=np.uint64)
    # SAFETY: the words live until the call returns.
    pointers = [ffi.from_buffer("uint64_t[]", row) for row in words]
    bits = ffi.new("struct kh_page_bits *", pointers)
    if scanner is None:
        result = lib.kh_pagemap_read(pagemap_fd, address, n_pages, bits)
    else:
        result = lib.kh_scanner_scan(scanner, pagemap_fd, address, n_pages, bits)
    check(result, "pagemap", start=address, length=n_pages * PAGE_BYTES)
    return PageStates(*(unpack(row, n_pages) for row in words))


def has_soft_dirty() -> bool:
    """Return whether a write to a page of this process sets its soft-dirty bit.

    Needs ``CONFIG_MEM_SOFT_DIRTY``.
    """
    import mmap

    words = np.zeros(1, dtype=np.uint64)
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page[0] = 1
            # SAFETY: the view is released before the mapping closes.
            with ffi.from_buffer(page) as view:
                address = int(ffi.cast("uintptr_t", view))
                out = ffi.from_buffer("uint64_t[]", words)
                check(lib.kh_pagemap_soft_dirty(fd, address, 1, out), "pread(pagemap)")
    finally:
        os.close(fd)
    return bool(words[0])
