"""Huge pages of a memfd, made per mapping: the system's setting is left alone."""

from __future__ import annotations

import ctypes
import mmap
import os

from kvmhost.memory.guest import Region
from kvmhost.units import PAGE_BYTES

__all__ = ["PIECE_BYTES", "PIECE_PAGES", "Window", "reference_page"]

PIECE_BYTES = 2 << 20
PIECE_PAGES = PIECE_BYTES // PAGE_BYTES

_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.vmsplice.restype = ctypes.c_ssize_t
_libc.vmsplice.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def reference_page(address: int) -> tuple[int, int]:
    """Take a reference to a mapped page, in a pipe; return the pipe's ends, which hold it."""
    ends = os.pipe()
    piece = _Iovec(address, PAGE_BYTES)
    # SAFETY: the caller's mapping of that page outlives the call.
    assert _libc.vmsplice(ends[1], ctypes.byref(piece), 1, 0) == PAGE_BYTES
    return ends


class Window:
    """A mapping of one piece of a memfd by somebody else, where huge pages are allowed."""

    def __init__(self, region: Region, offset: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._space = _libc.mmap(None, 2 * PIECE_BYTES, 0, flags, -1, 0)
        self.address = -(-self._space // PIECE_BYTES) * PIECE_BYTES
        fixed = mmap.MAP_SHARED | _MAP_FIXED
        # SAFETY: inside of the space that was just mapped for this, and unmapped by close().
        found = _libc.mmap(self.address, PIECE_BYTES, mmap.PROT_READ, fixed, region.memfd, offset)
        assert found == self.address

    def collapse(self) -> bool:
        """Make one huge page of the piece; False if the kernel does not."""
        return _libc.madvise(self.address, PIECE_BYTES, _MADV_COLLAPSE) == 0

    def hold(self, page: int = 0) -> tuple[int, int]:
        """Take a reference to a page, in a pipe; return its ends."""
        return reference_page(self.address + page * PAGE_BYTES)

    def close(self) -> None:
        """Unmap it."""
        _libc.munmap(self._space, 2 * PIECE_BYTES)
