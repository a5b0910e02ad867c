"""Scans of /proc/PID/pagemap: which pages of a mapping are present, huge or swapped.

By ``PAGEMAP_SCAN`` (Linux 6.7), with a buffer that grows while calls fill it, or by
reading 8 bytes a page. A shared mapping has no swap entries: what the kernel swapped
out of a memfd is absent from the page table. The markers that userfaultfd leaves where
a write-protected page went read as swapped, in both ways of asking.
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

#: Set to a non-empty value to read pagemap as kernels before 6.7 have it.
PLAIN_PAGEMAP_ENV = "KVMHOST_PLAIN_PAGEMAP"

#: Regions that a scan's buffer begins with, and one for so many pages at most: 24
#: bytes each, less than 0.01 % of the memory.
_START_REGIONS, _PAGES_PER_REGION = 512, 64

Bits = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class PageStates:
    """What the page table has for each page of a range; all arrays have its length.

    :param present: mapped
    :param huge: of those, by an entry for a huge page; plain reads cannot tell
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
    """Say whether the kernel has ``PAGEMAP_SCAN`` and nobody forbade its use.

    :raises IoctlError: if it fails in another way than by not being there
    """
    if os.environ.get(PLAIN_PAGEMAP_ENV):
        return False
    words = ffi.new("uint64_t *")
    # Page 0, which no process has mapped: it is the call itself that is tried.
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
    """Write to a page of this process: is it soft-dirty then?

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
