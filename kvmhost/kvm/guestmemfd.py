"""The guest_memfd descriptor: guest memory that belongs to one VM."""

from __future__ import annotations

import mmap
import os

from kvmhost._ffi import check, lib
from kvmhost.kvm.descriptor import Descriptor

__all__ = ["GuestMemfd"]


class GuestMemfd(Descriptor):
    """Guest memory that only its VM can use, unless it was made to be mapped.

    :param fd: as KVM_CREATE_GUEST_MEMFD returned it; owned
    """

    def __init__(self, fd: int, n_bytes: int) -> None:
        super().__init__(fd)
        self.n_bytes = n_bytes

    def map(self) -> mmap.mmap:
        """Map it, where it was created with ``GUEST_MEMFD_FLAG_MMAP``.

        >>> with memory.map() as mapping: mapping[:2] = b"hi"  # doctest: +SKIP

        :raises OSError: ``ENODEV`` where it may not be mapped; a touch of a private
            page is SIGBUS
        """
        os.fstat(self.fd)  # mmap takes -1 for anonymous memory, and would not fail
        return mmap.mmap(self.fd, self.n_bytes)

    def punch(self, offset: int, n_bytes: int) -> None:
        """Free pages; the guest then reads zeros.

        :param offset: in bytes, page-aligned as ``n_bytes``
        :raises OSError: ``EINVAL`` for a range that is not whole pages

        Source: fallocate(2) with FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE.
        """
        check(lib.kh_punch(self.fd, offset, n_bytes), "fallocate", offset=offset, length=n_bytes)
