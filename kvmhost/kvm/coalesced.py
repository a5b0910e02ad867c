"""The ring of coalesced writes that all vCPUs of a VM share."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator

from kvmhost._ffi import ffi, lib
from kvmhost.closing import Closing
from kvmhost.errors import CapabilityError
from kvmhost.kvm.caps import Cap
from kvmhost.kvm.vcpu import KvmVcpu
from kvmhost.kvm.vm import KvmVm

__all__ = ["CoalescedRing", "CoalescedWrite"]


@dataclasses.dataclass(frozen=True)
class CoalescedWrite:
    """A guest's write: a gpa or port, and what was written, little-endian."""

    address: int
    data: bytes
    port: bool


class CoalescedRing(Closing):
    """The ring, read in place through a mapping of one of the vCPUs.

    KVM appends; the reader must drain the ring often enough: a write that finds the ring
    full ends the run as an ordinary exit. One reader at a time.

    >>> vm.coalesce(0xD000_0000, 4096)  # doctest: +SKIP
    >>> ring = CoalescedRing(vm, vcpu)  # doctest: +SKIP
    >>> vcpu.run(); list(ring)  # doctest: +SKIP
    [CoalescedWrite(address=3489660928, data=b'*\\x00\\x00\\x00', port=False)]

    :raises CapabilityError: without KVM_CAP_COALESCED_MMIO
    """

    def __init__(self, vm: KvmVm, vcpu: KvmVcpu) -> None:
        page = vm.check_extension(Cap.COALESCED_MMIO)
        if not page:
            raise CapabilityError(
                "coalesced writes", "KVM_CAP_COALESCED_MMIO", "missing", "use plain exits"
            )
        size = mmap.PAGESIZE
        # SAFETY: the view is released in close(), before the mapping closes.
        self._mapping = mmap.mmap(vcpu.fd, size, offset=page * size)
        self._view = ffi.from_buffer(self._mapping)
        self._ring = ffi.cast("struct kvm_coalesced_mmio_ring *", self._view)
        head = ffi.sizeof("struct kvm_coalesced_mmio_ring")
        self._size = (size - head) // ffi.sizeof("struct kvm_coalesced_mmio")

    def __len__(self) -> int:
        return int(lib.kh_coalesced_pending(self._ring, self._size))

    def __iter__(self) -> Iterator[CoalescedWrite]:
        """Take the writes out, oldest first."""
        entry = ffi.new("struct kvm_coalesced_mmio *")
        while lib.kh_coalesced_take(self._ring, self._size, entry):
            data = ffi.buffer(entry.data, min(entry.len, 8))[:]
            yield CoalescedWrite(entry.phys_addr, data, bool(entry.pio))

    def drain(self) -> int:
        """Take all writes out without looking; return how many."""
        return int(lib.kh_coalesced_drain(self._ring, self._size))

    def close(self) -> None:
        """Unmap. Idempotent."""
        if not self._mapping.closed:
            ffi.release(self._view)
            self._mapping.close()
