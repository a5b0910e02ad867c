"""The protocol of an engine: memory, vCPUs, and re-arming of accessed bits."""

from __future__ import annotations

import enum
from typing import Protocol

from kvmhost.boot.longmode import EntryState
from kvmhost.devices.bus import Bus
from kvmhost.exits import Exit
from kvmhost.memory.guest import GuestMemory, GuestMemslot, Region
from kvmhost.vm.names import Access, EngineName

__all__ = ["Engine", "RearmKind", "Vcpu"]


class RearmKind(enum.Enum):
    """What makes the processor set an accessed bit again after it was cleared.

    A translation that is still cached sets no bit. Which of these is needed is
    determined by experiment, see :mod:`kvmhost.trackers.calibration`.
    """

    NONE = "none"  # the bit is set again without help
    ZAP = "zap"  # zap the guest mapping, so that KVM drops its shadow entries
    TLB_FLUSH = "tlb-flush"  # make the emulator drop its cached translations


class Vcpu(Protocol):
    """One vCPU. :meth:`run` belongs to one thread; the rest is for any thread."""

    index: int

    def run(self) -> Exit:
        """Run guest code until an exit that the bus does not answer in C."""

    def kick(self) -> None:
        """Make :meth:`run` return ``Kicked``, now or at its next call."""

    def complete_read(self, data: bytes) -> None:
        """Answer the pending ``IoIn`` or ``MmioRead``, little-endian."""

    def stop_at_doorbell(self, stop: bool) -> None:
        """Return at each doorbell instead of only counting it."""

    def set_doorbells(self, count: int) -> None:
        """Set how many doorbells were rung so far: it continues from a snapshot."""

    def skip_faults(self, rip: int, n_bytes: int) -> None:
        """Skip the instruction of ``n_bytes`` at ``rip`` where it would be a ``MemoryFault``.

        ``n_bytes`` 0: return that exit again.
        """

    @property
    def faults(self) -> int:
        """Touches of memory that the host could not provide, the skipped ones included."""

    def registers(self) -> dict[str, int]:
        """Return general registers, rip, rflags, cr2 and cr3; the vCPU must not run."""

    def reset_mmu(self) -> None:
        """Toggle CR0.WP, so that KVM drops the roots of its tables; it must not run.

        An emulator drops its cached translations instead.
        """

    def flush_guest_tlb(self) -> None:
        """Drop the translations that the processor caches for the guest; it must not run.

        As a guest does that toggles CR4.PGE: entries that KVM shadows stay.
        """

    @property
    def exits(self) -> int:
        """Number of exits from guest mode."""

    @property
    def doorbells(self) -> int:
        """Doorbells rung so far."""

    @property
    def epoch(self) -> int:
        """Value of the last doorbell: for the tiny guests, the epoch that ended."""

    def close(self) -> None:
        """Free the vCPU. Idempotent."""


class Engine(Protocol):
    """Runs the vCPUs of one VM over its guest memory."""

    name: EngineName
    #: How to re-arm, if that is a property of the engine; None: calibrate.
    fixed_rearm: RearmKind | None

    def attach(self, memory: GuestMemory, bus: Bus) -> None:
        """Give the engine its memory and bus; once, before any vCPU."""

    def set_memslot(self, slot: GuestMemslot) -> None:
        """Create a memslot, or move the one with its number; vCPUs may run."""

    def delete_memslot(self, number: int) -> None:
        """Delete a memslot; its gpas are MMIO from then on; vCPUs may run."""

    def protect(self, region: Region, offset: int, n_bytes: int, access: Access) -> None:
        """Set what the guest may do with a part of a region, in every memslot that shows it."""

    def create_vcpu(self, index: int, state: EntryState) -> Vcpu:
        """Create a vCPU that starts in ``state``."""

    def flush_tlbs(self) -> None:
        """Drop cached translations of all vCPUs, where the engine keeps them itself."""

    def max_vcpus(self) -> int:
        """Maximum number of vCPUs of a VM."""

    def close(self) -> None:
        """Free everything; the vCPUs must be closed. Idempotent."""
