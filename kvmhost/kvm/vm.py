"""The VM descriptor: memory slots, dirty logs and vCPUs."""

from __future__ import annotations

import os
import typing

from kvmhost._ffi import check, ffi, lib
from kvmhost.closing import Closing
from kvmhost.errors import LayoutError
from kvmhost.kvm.vcpu import KvmVcpu

if typing.TYPE_CHECKING:
    from kvmhost.bitmap import Words
    from kvmhost.kvm.caps import Cap

__all__ = ["Vm"]


class Vm(Closing):
    """A VM, as KVM_CREATE_VM returned it. Owns its descriptor."""

    def __init__(self, fd: int, vcpu_run_bytes: int) -> None:
        self.fd = fd
        self._run_bytes = vcpu_run_bytes

    def check_extension(self, cap: Cap) -> int:
        """Return what KVM says of a capability for this VM; 0 means missing."""
        return check(
            lib.kh_ioctl_int(self.fd, lib.KVM_CHECK_EXTENSION, int(cap)),
            "KVM_CHECK_EXTENSION",
            cap=cap.name,
        )

    def set_memory_region(
        self, slot: int, gpa: int, n_bytes: int, host_address: int, flags: int = 0
    ) -> None:
        """Create, change or (``n_bytes`` 0) delete a memslot.

        :param flags: ``KVM_MEM_LOG_DIRTY_PAGES`` and ``KVM_MEM_READONLY`` bits
        :raises IoctlError: ``EEXIST`` for an overlap, ``EINVAL`` for bad alignment

        Source: KVM_SET_USER_MEMORY_REGION.
        """
        region = ffi.new(
            "struct kvm_userspace_memory_region *",
            {
                "slot": slot,
                "flags": flags,
                "guest_phys_addr": gpa,
                "memory_size": n_bytes,
                "userspace_addr": host_address,
            },
        )
        check(
            lib.kh_ioctl_ptr(self.fd, lib.KVM_SET_USER_MEMORY_REGION, region),
            "KVM_SET_USER_MEMORY_REGION",
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=n_bytes,
            userspace_addr=host_address,
        )

    def enable_cap(self, cap: Cap, *args: int) -> None:
        """Switch a capability on for this VM, with up to four arguments.

        :raises IoctlError: ``EINVAL`` for a capability or an argument that this KVM does
            not know, or one that comes too late (after the first vCPU, for some)

        Source: KVM_ENABLE_CAP.
        """
        request = ffi.new("struct kvm_enable_cap *", {"cap": int(cap), "args": list(args)})
        check(
            lib.kh_ioctl_ptr(self.fd, lib.KVM_ENABLE_CAP, request),
            "KVM_ENABLE_CAP",
            cap=cap.name,
            **{f"arg{i}": value for i, value in enumerate(args)},
        )

    def get_dirty_log(self, slot: int, words: Words) -> None:
        """Fetch the dirty bitmap of a memslot, and clear it unless protection is manual.

        Under ``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`` nothing is cleared.

        :param slot: memslot id, as given to :meth:`set_memory_region`
        :param words: ``uint64``, shape ``(ceil(n_pages / 64),)`` of the slot, overwritten;
            bit ``i`` of word ``w`` is page ``64 * w + i`` of the slot. A shorter one
            would be written past its end
        :raises IoctlError: ``ENOENT`` if the slot does not log dirty pages,
            ``ENXIO`` if the VM uses the dirty ring

        Source: KVM_GET_DIRTY_LOG, Linux v6.12, virt/kvm/kvm_main.c.
        """
        # SAFETY: the view keeps words alive until the call returns.
        view = ffi.from_buffer("uint64_t[]", words, require_writable=True)
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": view})
        check(lib.kh_ioctl_ptr(self.fd, lib.KVM_GET_DIRTY_LOG, log), "KVM_GET_DIRTY_LOG", slot=slot)

    def clear_dirty_log(self, slot: int, first_page: int, n_pages: int, words: Words) -> None:
        """Clear dirty bits of a memslot and write-protect those pages again.

        :param first_page: in the slot, a multiple of 64
        :param n_pages: a multiple of 64, or all that is left of the slot
        :param words: shape ``(ceil(n_pages / 64),)``, bit 0 is ``first_page``; only pages
            whose bit is 1 are cleared
        :raises IoctlError: ``EINVAL`` for a range that is none, or without
            ``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2``; ``ENOENT`` if the slot does not log
        :raises LayoutError: if ``words`` is too short for the range

        Source: KVM_CLEAR_DIRTY_LOG, Linux v6.12, virt/kvm/kvm_main.c.
        """
        if words.size * 64 < n_pages:
            raise LayoutError(f"clear_dirty_log: {words.size} words for {n_pages} pages")
        # SAFETY: the view keeps words alive until the call returns; KVM only reads it.
        view = ffi.from_buffer("uint64_t[]", words)
        fields = {"slot": slot, "num_pages": n_pages, "first_page": first_page}
        log = ffi.new("struct kvm_clear_dirty_log *", fields | {"dirty_bitmap": view})
        check(
            lib.kh_ioctl_ptr(self.fd, lib.KVM_CLEAR_DIRTY_LOG, log),
            "KVM_CLEAR_DIRTY_LOG",
            **fields,
        )

    def ioctl_int(self, request: str, argument: int) -> int:
        """Make a request whose argument is a number.

        :param request: its name, for example ``KVM_CREATE_IRQCHIP``
        :raises IoctlError: if KVM refuses
        """
        result = lib.kh_ioctl_int(self.fd, getattr(lib, request), argument)
        return check(result, request, argument=argument)

    def create_vcpu(self, index: int) -> KvmVcpu:
        """Create vCPU ``index``. Source: KVM_CREATE_VCPU.

        :raises IoctlError: ``EEXIST`` if it exists, ``EINVAL`` above KVM_CAP_MAX_VCPUS
        """
        fd = check(
            lib.kh_ioctl_int(self.fd, lib.KVM_CREATE_VCPU, index), "KVM_CREATE_VCPU", id=index
        )
        return KvmVcpu(fd, index, self._run_bytes)

    def close(self) -> None:
        """Close the descriptor. Idempotent; KVM frees the VM with its last vCPU."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
