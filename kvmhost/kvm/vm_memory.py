"""Guest memory of a VM: memslots, dirty logs, guest_memfd, attributes.

A memslot is a range of guest physical addresses backed by a range of the caller's address
space. One request creates, changes and deletes it. A change may set flags
(``KVM_MEM_LOG_DIRTY_PAGES``) or, with the same size and backing, move the slot. Read-only
cannot change.
"""

from __future__ import annotations

import contextlib
import mmap
import typing
from collections.abc import Iterator

from kvmhost._ffi import ffi, lib
from kvmhost.errors import LayoutError
from kvmhost.kvm.descriptor import Descriptor
from kvmhost.kvm.guestmemfd import GuestMemfd
from kvmhost.kvm.structs import Struct

if typing.TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from kvmhost.bitmap import Words

__all__ = ["VmMemory"]


def _export(memory: WriteableBuffer, n_bytes: int) -> typing.Any:
    """Return a cffi view on a buffer that can back ``n_bytes`` of guest memory.

    :raises LayoutError: if it cannot
    """
    try:
        export = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
    except (BufferError, TypeError, ValueError) as error:
        raise LayoutError(f"guest memory needs a writable buffer: {error}") from error
    address = int(ffi.cast("uintptr_t", export))
    fault = ""
    if len(export) < n_bytes:
        fault = f"the buffer has {len(export):#x} bytes, the slot {n_bytes:#x}"
    elif address % mmap.PAGESIZE:
        fault = f"the buffer begins at {address:#x}, inside a page; use mmap.mmap(-1, {n_bytes})"
    if fault:
        ffi.release(export)
        raise LayoutError(fault)
    return export


def _empty_words(n_words: int) -> Words:
    import numpy as np  # Only here: booting a guest needs no numpy.

    return np.zeros(n_words, dtype=np.uint64)


class VmMemory(Descriptor):
    """The requests of a VM that have to do with memory."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        #: Exports of the buffers that back memslots: what has one cannot be unmapped.
        self._backing: dict[int, typing.Any] = {}
        #: Size of each memslot that was set through this object, in bytes.
        self._slot_bytes: dict[int, int] = {}

    def close(self) -> None:
        """Close the VM's descriptor and release the buffers of its memslots. Idempotent."""
        super().close()
        for slot in list(self._backing):
            self._hold(slot, None)

    def set_memory_region(
        self, slot: int, gpa: int, n_bytes: int, memory: int | WriteableBuffer, flags: int = 0
    ) -> None:
        """Create, move, change or (``n_bytes`` 0) delete a memslot.

        >>> vm.set_memory_region(0, 0, 1 << 20, mmap.mmap(-1, 1 << 20))  # doctest: +SKIP

        :param slot: number below KVM_CAP_NR_MEMSLOTS, and the address space in bits 16 and up
        :param gpa: first guest physical address, page-aligned
        :param memory: what backs the slot. A writable buffer that begins at a page, such as
            an ``mmap``: the VM holds it until the slot is deleted or backed by something
            else, or the VM is closed, and until then the buffer cannot be closed or resized.
            Or the address of memory that the caller keeps mapped
        :param flags: ``KVM_MEM_LOG_DIRTY_PAGES`` and ``KVM_MEM_READONLY`` bits
        :raises LayoutError: for a buffer that is too short, read-only, or not page-aligned
        :raises IoctlError: ``EEXIST`` for an overlap; ``EINVAL`` for bad alignment, for
            another size or backing of an existing slot, or a change of read-only

        Source: KVM_SET_USER_MEMORY_REGION.
        """
        fields = {"slot": slot, "flags": flags, "guest_phys_addr": gpa, "memory_size": n_bytes}
        with self._backed_by(slot, n_bytes, memory) as address:
            self._make(
                "KVM_SET_USER_MEMORY_REGION",
                "kvm_userspace_memory_region",
                userspace_addr=address,
                **fields,
            )

    @contextlib.contextmanager
    def _backed_by(self, slot: int, n_bytes: int, memory: int | WriteableBuffer) -> Iterator[int]:
        """Yield the address of memory; after a request that succeeds, keep its buffer exported.

        The buffer that backed the slot before is held until then.
        """
        export = None if isinstance(memory, int) else _export(memory, n_bytes)
        try:
            # SAFETY: the export pins the buffer; the slot references the export from here on.
            yield memory if isinstance(memory, int) else int(ffi.cast("uintptr_t", export))
        except BaseException:
            if export is not None:
                ffi.release(export)
            raise
        self._hold(slot, export)
        self._slot_bytes[slot] = n_bytes

    def _hold(self, slot: int, export: typing.Any) -> None:
        """Keep the buffer that backs a slot exported, and release the previous one."""
        before = self._backing.pop(slot, None)
        if before is not None:
            ffi.release(before)
        if export is not None:
            self._backing[slot] = export

    def set_memory_region2(
        self,
        slot: int,
        gpa: int,
        n_bytes: int,
        memory: int | WriteableBuffer,
        flags: int = 0,
        *,
        guest_memfd: int = -1,
        guest_memfd_offset: int = 0,
    ) -> None:
        """Create, change or delete a memslot that may have a guest_memfd.

        >>> vm.set_memory_region2(1, 1 << 30, 1 << 20, address, guest_memfd=memory.fd)
        ... # doctest: +SKIP

        :param guest_memfd: descriptor of :meth:`create_guest_memfd`; private pages come
            from it, and shared ones too where it can be mapped (``memory`` is then that
            mapping)
        :param guest_memfd_offset: byte offset into it, page-aligned
        :raises LayoutError: as :meth:`set_memory_region`
        :raises IoctlError: ``ENOTTY`` before Linux 6.8; ``EINVAL`` where this VM's type
            has no private memory; otherwise as :meth:`set_memory_region`

        Source: KVM_SET_USER_MEMORY_REGION2.
        """
        fields = {"slot": slot, "guest_phys_addr": gpa, "memory_size": n_bytes}
        if guest_memfd >= 0:
            flags |= lib.KVM_MEM_GUEST_MEMFD
            fields |= {"guest_memfd": guest_memfd, "guest_memfd_offset": guest_memfd_offset}
        with self._backed_by(slot, n_bytes, memory) as address:
            self._make(
                "KVM_SET_USER_MEMORY_REGION2",
                "kvm_userspace_memory_region2",
                userspace_addr=address,
                flags=flags,
                **fields,
            )

    def delete_memory_region(self, slot: int) -> None:
        """Delete a memslot; its gpas are MMIO from then on.

        >>> vm.delete_memory_region(0)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` if there is no such slot

        Source: KVM_SET_USER_MEMORY_REGION with a size of 0.
        """
        self.set_memory_region(slot, 0, 0, 0)

    def create_guest_memfd(self, n_bytes: int, flags: int = 0) -> GuestMemfd:
        """Create memory that belongs to this VM and that others may not map.

        >>> memory = vm.create_guest_memfd(1 << 20)  # doctest: +SKIP

        :param flags: ``GUEST_MEMFD_FLAG_MMAP`` and ``_INIT_SHARED`` where
            KVM_CAP_GUEST_MEMFD_FLAGS has them
        :raises IoctlError: ``ENOTTY`` before Linux 6.8, ``EINVAL`` for flags or a size
            that is not whole pages

        Source: KVM_CREATE_GUEST_MEMFD.
        """
        request = "KVM_CREATE_GUEST_MEMFD"
        fd = self._make(request, "kvm_create_guest_memfd", size=n_bytes, flags=flags)
        return GuestMemfd(fd, n_bytes)

    def set_memory_attributes(self, gpa: int, n_bytes: int, attributes: int) -> None:
        """Set the attributes of a range of guest memory, with or without slots.

        >>> vm.set_memory_attributes(0, 4096, lib.KVM_MEMORY_ATTRIBUTE_PRIVATE)  # doctest: +SKIP

        :param attributes: ``KVM_MEMORY_ATTRIBUTE_PRIVATE``, or 0 for shared
        :raises IoctlError: ``ENOTTY`` without KVM_CAP_MEMORY_ATTRIBUTES, ``EINVAL`` for
            attributes that this VM does not have

        Source: KVM_SET_MEMORY_ATTRIBUTES.
        """
        fields = {"address": gpa, "size": n_bytes, "attributes": attributes}
        self._make("KVM_SET_MEMORY_ATTRIBUTES", "kvm_memory_attributes", **fields)

    def get_dirty_log(self, slot: int, words: Words | None = None) -> Words:
        """Fetch the dirty bitmap of a memslot, and clear it unless protection is manual.

        >>> words = vm.get_dirty_log(0)  # doctest: +SKIP
        >>> vm.get_dirty_log(0, words)  # into the same array  # doctest: +SKIP

        Under ``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`` nothing is cleared.

        :param slot: memslot id, as given to :meth:`set_memory_region`
        :param words: ``uint64``, at least ``(ceil(n_pages / 64),)`` of the slot, overwritten;
            None: a new array
        :return: ``words``; bit ``i`` of word ``w`` is page ``64 * w + i`` of the slot
        :raises IoctlError: ``ENOENT`` if the slot does not log dirty pages,
            ``ENXIO`` if the VM uses the dirty ring
        :raises LayoutError: if ``words`` is too short for the slot

        Source: KVM_GET_DIRTY_LOG, Linux v6.12, virt/kvm/kvm_main.c.
        """
        n_pages = self._slot_bytes.get(slot, 0) // mmap.PAGESIZE
        wanted = max(1, -(-n_pages // 64))
        if words is None:
            words = _empty_words(wanted)
        # SAFETY: the view keeps words alive until the call returns. KVM writes as many whole
        # words as the slot has, which every slot of this VM was set through this object for.
        view = ffi.from_buffer("uint64_t[]", words, require_writable=True)
        if len(view) < wanted:
            raise LayoutError(
                f"get_dirty_log: {len(view)} words for slot {slot} of {n_pages} pages, "
                f"which needs {wanted}"
            )
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": view})
        self._pass("KVM_GET_DIRTY_LOG", log, slot=slot)
        return words

    def clear_dirty_log(self, slot: int, first_page: int, n_pages: int, words: Words) -> None:
        """Clear dirty bits of a memslot and write-protect those pages again.

        >>> vm.clear_dirty_log(0, 64, 64, np.array([1], np.uint64))  # doctest: +SKIP

        :param first_page: in the slot, a multiple of 64
        :param n_pages: a multiple of 64, or all that is left of the slot
        :param words: shape ``(ceil(n_pages / 64),)``, bit 0 is ``first_page``; only pages
            whose bit is 1 are cleared
        :raises IoctlError: ``EINVAL`` for a range that is none, or without
            ``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2``; ``ENOENT`` if the slot does not log
        :raises LayoutError: if ``words`` is too short for the range

        Source: KVM_CLEAR_DIRTY_LOG, Linux v6.12, virt/kvm/kvm_main.c.
        """
        # SAFETY: the view keeps words alive until the call returns; KVM only reads it.
        view = ffi.from_buffer("uint64_t[]", words)
        if len(view) * 64 < n_pages:
            raise LayoutError(f"clear_dirty_log: {len(view)} words for {n_pages} pages")
        fields = {"slot": slot, "num_pages": n_pages, "first_page": first_page}
        log = ffi.new("struct kvm_clear_dirty_log *", fields | {"dirty_bitmap": view})
        self._pass("KVM_CLEAR_DIRTY_LOG", log, **fields)

    def reset_dirty_rings(self) -> int:
        """Return the ring entries that were marked as harvested to KVM, for all vCPUs.

        >>> vm.reset_dirty_rings()  # doctest: +SKIP
        2

        :class:`~kvmhost.kvm.ring.DirtyRings` marks and resets in C.

        :return: how many entries that were
        :raises IoctlError: ``EINVAL`` without the ring

        Source: KVM_RESET_DIRTY_RINGS.
        """
        return self._call("KVM_RESET_DIRTY_RINGS")

    def set_nr_mmu_pages(self, n_pages: int) -> None:
        """Limit the pages that KVM may use for shadow page tables.

        >>> vm.set_nr_mmu_pages(1024)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` below 20

        Source: KVM_SET_NR_MMU_PAGES.
        """
        self._call("KVM_SET_NR_MMU_PAGES", n_pages, n_pages=n_pages)

    def get_nr_mmu_pages(self) -> int:
        """Return the limit on pages for shadow page tables.

        Source: KVM_GET_NR_MMU_PAGES; removed in Linux 6.4, ``ENOTTY`` since then.
        """
        return self._call("KVM_GET_NR_MMU_PAGES")

    def register_encrypted_region(self, host_address: int, n_bytes: int) -> None:
        """Pin host memory that may hold encrypted guest data (SEV).

        :raises IoctlError: ``ENOTTY`` where this VM is not encrypted

        Source: KVM_MEMORY_ENCRYPT_REG_REGION.
        """
        fields = {"addr": host_address, "size": n_bytes}
        self._make("KVM_MEMORY_ENCRYPT_REG_REGION", "kvm_enc_region", **fields)

    def unregister_encrypted_region(self, host_address: int, n_bytes: int) -> None:
        """Undo :meth:`register_encrypted_region`.

        Source: KVM_MEMORY_ENCRYPT_UNREG_REGION.
        """
        fields = {"addr": host_address, "size": n_bytes}
        self._make("KVM_MEMORY_ENCRYPT_UNREG_REGION", "kvm_enc_region", **fields)

    def memory_encrypt_op(self, command: Struct) -> None:
        """Make a request for encrypted memory: ``struct kvm_sev_cmd``, changed in place.

        :raises IoctlError: ``ENOTTY`` where this KVM has no encrypted VMs

        Source: KVM_MEMORY_ENCRYPT_OP.
        """
        self._pass("KVM_MEMORY_ENCRYPT_OP", command, id=command.id)
