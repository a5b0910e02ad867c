"""KVM's dirty rings: which pages each vCPU wrote, in order, in shared memory.

KVM refuses to run a vCPU whose ring is full (KVM_EXIT_DIRTY_RING_FULL). The run loop
handles that in C: it collects all rings into bitmaps and continues, so that a guest never
stops for lack of a collector.

Source: Documentation/virt/kvm/api.rst, section 8.29, Linux v6.12.
"""

from __future__ import annotations

import typing
from typing import Any

from kvmhost._ffi import check, ffi, lib
from kvmhost.errors import KvmHostError

if typing.TYPE_CHECKING:
    from kvmhost.bitmap import Words

__all__ = ["DirtyRings"]


class DirtyRings:
    """The rings of one VM, with a bitmap for each memslot.

    :param vm_fd: a VM with the ring switched on and no vCPU yet
    :param n_entries: as given to KVM_CAP_DIRTY_LOG_RING, 16 bytes each
    """

    def __init__(self, vm_fd: int, n_entries: int) -> None:
        self.n_entries = n_entries
        # SAFETY: owned here; freed in close(), after the vCPUs that point to it.
        self.core = lib.kh_rings_new(vm_fd, n_entries)
        if self.core == ffi.NULL:
            raise KvmHostError("out of memory for the dirty rings")

    def add_slot(self, n_pages: int) -> None:
        """Keep a bitmap for the next memslot, counted from 0.

        :raises IoctlError: ``ENOSPC`` beyond 8 slots
        """
        check(lib.kh_rings_add_slot(self.core, n_pages), "kh_rings_add_slot", n_pages=n_pages)

    def add_vcpu(self, fd: int) -> None:
        """Map the ring of a vCPU.

        :raises IoctlError: ``EBADF`` for no descriptor, ``ENOSPC`` beyond 64 vCPUs. KVM
            also maps the ring of a VM that has none, and reading it is SIGBUS
        """
        check(lib.kh_rings_add_vcpu(self.core, fd), "mmap(dirty ring)", fd=fd)

    def harvest(
        self, slot: int, first: int, n_pages: int, clear: bool, mask: Words | None, words: Words
    ) -> None:
        """Collect the rings; return, and with ``clear`` reset, the bitmap of written pages.

        :param words: zeros at entry; bit 0 is page ``first`` of the slot
        :raises IoctlError: if the reset fails, or ``ERANGE`` for pages outside the slot
        """
        # SAFETY: both arrays live until the call returns.
        chosen = ffi.NULL if mask is None else ffi.from_buffer("uint64_t[]", mask)
        out = ffi.from_buffer("uint64_t[]", words, require_writable=True)
        check(
            lib.kh_rings_harvest(self.core, slot, first, n_pages, int(clear), chosen, out),
            "KVM_RESET_DIRTY_RINGS",
            slot=slot,
            first=first,
            n_pages=n_pages,
        )

    def forget(self) -> None:
        """Empty the rings and the bitmaps."""
        check(lib.kh_rings_forget(self.core), "KVM_RESET_DIRTY_RINGS")

    def counters(self) -> dict[str, int]:
        """Return entries taken, exits with a full ring, resets, foreign entries."""
        raw: Any = ffi.new("struct kh_ring_counts *")
        lib.kh_rings_counts(self.core, raw)
        return {name: int(getattr(raw, name)) for name, _ in ffi.typeof(raw[0]).fields}

    def close(self) -> None:
        """Unmap and free. Idempotent. No vCPU may run."""
        core, self.core = self.core, ffi.NULL
        lib.kh_rings_free(core)
