"""The kvm engine: guest code on /dev/kvm."""

from __future__ import annotations

from kvmhost._ffi import lib
from kvmhost.boot.longmode import CR0_WP, EntryState
from kvmhost.devices.bus import Bus
from kvmhost.engine.base import RearmKind, Vcpu
from kvmhost.errors import CapabilityError, IoctlError, LayoutError
from kvmhost.exits import Exit, MemoryFault
from kvmhost.kvm import Cap, DirtyRings, KvmVcpu, System
from kvmhost.kvm.structs import Struct
from kvmhost.memory.guest import GuestMemory, GuestMemslot, Region
from kvmhost.memory.layout import TSS_BYTES, TSS_GPA
from kvmhost.vm.names import Access, EngineName

__all__ = ["KvmEngine"]

_RING_ENTRY_BYTES = 16
_CODE_TYPE, _DATA_TYPE, _TSS_TYPE = 11, 3, 11


_CR4_PGE = 1 << 7


class KvmEngine:
    """A VM on /dev/kvm.

    :raises CapabilityError: if /dev/kvm cannot be used here
    """

    name: EngineName = "kvm"
    fixed_rearm: RearmKind | None = None

    def __init__(self) -> None:
        self._system = System()
        try:
            self.vm = self._system.create_vm()
        except BaseException:
            self._system.close()
            raise
        self._bus: Bus | None = None
        self._memory: GuestMemory | None = None
        self._cpuid: Struct | None = None
        self._memslots: dict[int, GuestMemslot] = {}
        self._slot_flags = 0
        #: The VM's dirty rings, if they were switched on.
        self.rings: DirtyRings | None = None
        #: The bare vCPUs, by index.
        self.cores: list[KvmVcpu] = []

    def attach(self, memory: GuestMemory, bus: Bus) -> None:
        """Create one memslot per region, on the guest mapping."""
        self._bus, self._memory = bus, memory
        for slot in memory.own_memslots():
            self.set_memslot(slot)
        if self.rings is not None:
            for region in memory.regions:
                self.rings.add_slot(region.n_pages)

    def enable_dirty_ring(self, n_entries: int) -> None:
        """Enable a dirty ring for every vCPU; once, before :meth:`attach`.

        KVM's dirty log is not available after that.

        :param n_entries: a power of two, from 256 (1024 with page-modification logging) to 65536
        :raises LayoutError: for an invalid number
        :raises CapabilityError: if this KVM has no ring, or none of that size
        """
        if not 256 <= n_entries <= 65536 or n_entries & (n_entries - 1):
            raise LayoutError(f"{n_entries} dirty ring entries: a power of two from 256 to 65536")
        # Architectures that need memory barriers have only the second; x86 has both.
        acquire = self._system.check_extension(Cap.DIRTY_LOG_RING_ACQ_REL)
        cap = Cap.DIRTY_LOG_RING_ACQ_REL if acquire else Cap.DIRTY_LOG_RING
        try:
            self.vm.enable_cap(cap, n_entries * _RING_ENTRY_BYTES)
        except IoctlError as error:
            raise CapabilityError(
                "dirty ring",
                f"a ring of {n_entries} entries a vCPU",
                str(error),
                "use Linux 5.11 or newer, or the dirty log",
            ) from error
        self.rings = DirtyRings(self.vm.fd, n_entries)

    def log_dirty_pages(self, on: bool) -> None:
        """Switch dirty logging of every memslot on or off; vCPUs may run.

        :raises IoctlError: if KVM refuses, for example with ``ENOMEM``
        """
        self._slot_flags = lib.KVM_MEM_LOG_DIRTY_PAGES if on else 0
        for slot in list(self._memslots.values()):
            self.set_memslot(slot)

    def set_memslot(self, slot: GuestMemslot) -> None:
        """Create a memslot, or move the one with its number; vCPUs may run.

        :raises IoctlError: ``EEXIST`` for an overlap, ``EINVAL`` above KVM_CAP_NR_MEMSLOTS
        """
        if self.rings is not None and slot.is_alias:
            raise CapabilityError(
                "aliased memslot",
                "a VM without dirty rings",
                "dirty rings",
                "make the machine without dirty_ring_entries",
            )
        self.vm.set_memory_region(
            slot.number, slot.gpa, slot.n_bytes, slot.guest_address, self._slot_flags
        )
        self._memslots[slot.number] = slot

    def delete_memslot(self, number: int) -> None:
        """Delete a memslot; its gpas are MMIO from then on; vCPUs may run."""
        self.vm.delete_memory_region(number)
        del self._memslots[number]

    def protect(self, region: Region, offset: int, n_bytes: int, access: Access) -> None:
        """Protect the guest mapping, which every memslot on that part uses."""
        region.protect(offset, n_bytes, access)

    def create_vcpu(self, index: int, state: EntryState) -> Vcpu:
        """Create a vCPU in 64-bit mode at privilege level 3."""
        core, vcpu = self._create_core(index)
        core.set_cpuid(self._supported_cpuid())
        _enter_long_mode(core, state)
        return vcpu

    def _create_core(self, index: int) -> tuple[KvmVcpu, Vcpu]:
        if self._bus is None or self._memory is None:
            raise RuntimeError("attach() comes before create_vcpu()")
        core = self.vm.create_vcpu(index)
        self.cores.append(core)
        if self.rings is not None:
            self.rings.add_vcpu(core.fd)
            # SAFETY: the rings are freed in close(), after the vCPUs.
            core.core.rings = self.rings.core
        return core, _EngineVcpu(core, self._bus, self._memory)

    def _supported_cpuid(self) -> Struct:
        if self._cpuid is None:
            self._cpuid = self._system.supported_cpuid()
        return self._cpuid

    def msr_indices(self) -> list[int]:
        """Return the indexes of the MSRs that this KVM saves."""
        return self._system.msr_index_list()

    def flush_tlbs(self) -> None:
        """Do nothing: KVM flushes when the guest mapping changes."""

    def max_vcpus(self) -> int:
        """Return KVM_CAP_MAX_VCPUS, or KVM_CAP_NR_VCPUS if it is not available."""
        return self._system.check_extension(Cap.MAX_VCPUS) or self._system.check_extension(
            Cap.NR_VCPUS
        )

    def close(self) -> None:
        """Close the VM. Idempotent."""
        if self.rings is not None:
            rings, self.rings = self.rings, None
            rings.close()
        self._memslots.clear()
        self.vm.close()
        self._system.close()


class _EngineVcpu:
    """A KVM vCPU with the VM's bus."""

    def __init__(self, core: KvmVcpu, bus: Bus, memory: GuestMemory) -> None:
        self._vcpu, self._bus, self._memory = core, bus, memory
        self.index = core.index

    def run(self) -> Exit:
        vm_exit = self._vcpu.run(self._bus.core)
        if isinstance(vm_exit, MemoryFault):
            from kvmhost.engine.memoryfault import located

            return located(vm_exit, self._vcpu, self._memory)
        return vm_exit

    def kick(self) -> None:
        self._vcpu.kick()

    def complete_read(self, data: bytes) -> None:
        self._vcpu.complete_read(data)

    def stop_at_doorbell(self, stop: bool) -> None:
        self._vcpu.core.stop_at_doorbell = int(stop)

    def set_doorbells(self, count: int) -> None:
        self._vcpu.core.doorbells = count

    def skip_faults(self, rip: int, n_bytes: int) -> None:
        lib.kh_vcpu_skip_faults(self._vcpu.core, rip, n_bytes)

    @property
    def faults(self) -> int:
        return int(self._vcpu.core.faults)

    def registers(self) -> dict[str, int]:
        regs, sregs = self._vcpu.get_regs(), self._vcpu.get_sregs()
        return regs.to_dict() | {
            "cr2": int(sregs.cr2),
            "cr3": int(sregs.cr3),
            "cs": sregs.cs.selector,
        }

    def reset_mmu(self) -> None:
        sregs = self._vcpu.get_sregs()
        sregs.cr0 ^= CR0_WP
        self._vcpu.set_sregs(sregs)

    def flush_guest_tlb(self) -> None:
        # KVM loads its root anew when CR4 changes, and flushes what was cached under it.
        sregs = self._vcpu.get_sregs()
        for _ in range(2):
            sregs.cr4 ^= _CR4_PGE
            self._vcpu.set_sregs(sregs)

    @property
    def exits(self) -> int:
        return int(self._vcpu.core.exits)

    @property
    def doorbells(self) -> int:
        return int(self._vcpu.core.doorbells)

    @property
    def epoch(self) -> int:
        return int(self._vcpu.core.doorbell_value)

    def close(self) -> None:
        self._vcpu.close()


def _enter_long_mode(vcpu: KvmVcpu, state: EntryState) -> None:
    sregs = vcpu.get_sregs()
    code = {"limit": 0xFFFFFFFF, "present": 1, "dpl": 3, "s": 1, "g": 1}
    _set(sregs.cs, code | {"selector": 0x23, "type": _CODE_TYPE, "l": 1})
    for name in ("ss", "ds", "es", "fs", "gs"):
        _set(getattr(sregs, name), code | {"selector": 0x1B, "type": _DATA_TYPE, "db": 1})
    _set(sregs.tr, {"base": TSS_GPA, "limit": TSS_BYTES - 1, "present": 1, "type": _TSS_TYPE})
    # No descriptor tables: an event that needs one is a triple fault.
    sregs.gdt.limit = sregs.idt.limit = 0
    sregs.update(cr0=state.cr0, cr3=state.cr3, cr4=state.cr4, efer=state.efer)
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.update(rip=state.rip, rsp=state.rsp, rflags=state.rflags, rdi=state.rdi, rsi=state.rsi)
    vcpu.set_regs(regs)


def _set(segment: Struct, fields: dict[str, int]) -> None:
    for name in ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g"):
        setattr(segment, name, fields.get(name, 0))
