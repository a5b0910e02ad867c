"""The emulated engine: guest code under Unicorn, for hosts without /dev/kvm.

Each vCPU is a Unicorn instance of its own over one shared guest memory: the
guest mapping, so that zapping, eviction and fault-in work as under KVM. Unicorn
sets accessed and dirty bits in the guest's page tables when it fills its TLB;
cached translations set no bits until a flush, which is how bits are re-armed.

Differences from a processor:

- vCPUs run in turns of a few milliseconds, one at a time: Unicorn makes neither
  a locked instruction nor its setting of accessed and dirty bits atomic against
  another instance. A turn ends between blocks, so each instruction completes.
- An exception is a triple fault at once, as there is no IDT.
- Code is searched for port instructions before its first run. A guest that
  writes new ones over code that ran before ends with an InternalError.
- Code that was translated before runs without being read from memory again: after a
  flush its accessed bit is set as on a processor, but a zapped page of code stays away.
- ``rdtsc`` and ``cpuid`` return the emulator's values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.boot.longmode import EntryState
from kvmhost.devices.bus import Bus
from kvmhost.engine.base import RearmKind, Vcpu
from kvmhost.engine.outside import Replay
from kvmhost.engine.portinsn import PortInsn, candidates, decode
from kvmhost.engine.turns import Turns
from kvmhost.engine.unicorncpu import UnicornCpu
from kvmhost.exits import (
    Exit,
    InternalError,
    IoIn,
    IoOut,
    Kicked,
    MemoryFault,
    Shutdown,
    UnknownExit,
)
from kvmhost.memory.guest import GuestMemory, GuestMemslot, Region
from kvmhost.memory.layout import MAX_TINY_VCPUS
from kvmhost.vm.names import Access, EngineName

__all__ = ["EmulatedEngine"]

#: KVM_INTERNAL_ERROR_EMULATION: an instruction that cannot be emulated.
_EMULATION_FAILED = 1


class EmulatedEngine:
    """A VM under Unicorn.

    :raises CapabilityError: if Unicorn cannot be used (at import, or here)
    """

    name: EngineName = "emulated"
    fixed_rearm: RearmKind | None = RearmKind.TLB_FLUSH

    def __init__(self) -> None:
        self._memory: GuestMemory | None = None
        self._bus: Bus | None = None
        self._vcpus: list[EmulatedVcpu] = []
        self._memslots: dict[int, GuestMemslot] = {}
        self._turns = Turns()

    def attach(self, memory: GuestMemory, bus: Bus) -> None:
        """Set the memory and bus of later vCPUs."""
        self._memory, self._bus = memory, bus
        self._memslots = {slot.number: slot for slot in memory.own_memslots()}

    def create_vcpu(self, index: int, state: EntryState) -> Vcpu:
        """Create a vCPU in 64-bit mode at privilege level 3."""
        if self._memory is None or self._bus is None:
            raise RuntimeError("attach() comes before create_vcpu()")
        cpu = UnicornCpu(self._memory, state)
        vcpu = EmulatedVcpu(index, cpu, self._bus, self._turns, self._memory)
        self._vcpus.append(vcpu)
        return vcpu

    def set_memslot(self, slot: GuestMemslot) -> None:
        """Map a memslot in every processor, or move the one with its number; vCPUs may run."""
        before = self._memslots.get(slot.number)
        if before is not None:
            self._change(lambda cpu: cpu.unmap(before.gpa, before.n_bytes))
        self._memslots[slot.number] = slot
        self._change(lambda cpu: cpu.map(slot.gpa, slot.n_bytes, slot.guest_address))

    def delete_memslot(self, number: int) -> None:
        """Unmap a memslot in every processor; vCPUs may run."""
        slot = self._memslots.pop(number)
        self._change(lambda cpu: cpu.unmap(slot.gpa, slot.n_bytes))

    def protect(self, region: Region, offset: int, n_bytes: int, access: Access) -> None:
        """Protect every window on a part of a region, in the processors.

        The host's own mapping is not protected: the emulator would die of its signal.
        """
        for slot in list(self._memslots.values()):
            low, high = max(offset, slot.offset), min(offset + n_bytes, slot.offset + slot.n_bytes)
            if slot.region is region and low < high:
                gpa = slot.gpa + low - slot.offset
                self._change(partial(_protect, gpa=gpa, n_bytes=high - low, access=access))

    def _change(self, change: Callable[[UnicornCpu], None]) -> None:
        """Change every processor; return when no vCPU runs with the old state."""
        for vcpu in self._vcpus:
            vcpu.request_change(change)
        for vcpu in self._vcpus:
            vcpu.wait_flushed()

    def flush_tlbs(self) -> None:
        """Drop cached translations; return when no vCPU can use an old one.

        Also waits for a vCPU that waits for an evicted page.
        """
        for vcpu in self._vcpus:
            vcpu.request_flush()
        for vcpu in self._vcpus:
            vcpu.wait_flushed()

    def max_vcpus(self) -> int:
        """Return the maximum of a tiny guest; Unicorn has no limit."""
        return MAX_TINY_VCPUS

    def close(self) -> None:
        """Drop the references to the vCPUs. Idempotent."""
        self._vcpus.clear()


class EmulatedVcpu:
    """One Unicorn instance behind the protocol of :class:`~kvmhost.engine.base.Vcpu`."""

    def __init__(
        self, index: int, cpu: UnicornCpu, bus: Bus, turns: Turns, memory: GuestMemory
    ) -> None:
        self.index, self._memory = index, memory
        self._cpu, self._core, self._bus, self._turns = cpu, cpu.core, bus, turns
        # Protects state that other threads change: requests, and whether Unicorn runs.
        self._changed = threading.Condition()
        self._inside = self._kicked = self._flush = self._closed = False
        self._stop_at_doorbell = False
        self._reading: PortInsn | None = None  # waits for complete_read()
        self._string: int | None = None  # address of INS whose data are available
        self._replay: Replay | None = None
        self._exits = self._doorbells = self._epoch = self._faults = 0
        self._changes: list[Callable[[UnicornCpu], None]] = []
        self._skipped = (0, 0)  # rip and bytes of the store that is skipped where it faults

    def run(self) -> Exit:
        """Run guest code until an exit that the bus does not answer."""
        while True:
            # Before the turn: a vCPU that waits for one runs no code, and is flushed at once.
            with self._turns.turn(self._cpu.attend):
                if not self._go_in():
                    return Kicked()
                try:
                    vm_exit = self._once()
                finally:
                    self._come_out()
            if vm_exit is not None:
                return vm_exit

    def kick(self) -> None:
        """Make :meth:`run` return ``Kicked``, before its next block or at its next call."""
        with self._changed:
            self._kicked = True
            self._cpu.attend()

    def complete_read(self, data: bytes) -> None:
        """Answer the pending ``IoIn`` or ``MmioRead``, little-endian."""
        if self._reading is not None:
            insn, self._reading = self._reading, None
            self._finish_in(insn, data)
        elif self._replay is not None:
            self._replay.answer(data)

    def stop_at_doorbell(self, stop: bool) -> None:
        """Return at each doorbell instead of only counting it."""
        self._stop_at_doorbell = stop

    def set_doorbells(self, count: int) -> None:
        """Set how many doorbells were rung so far."""
        self._doorbells = count

    def skip_faults(self, rip: int, n_bytes: int) -> None:
        """Skip an instruction where it would be a memory fault; ``n_bytes`` 0: no longer."""
        self._skipped = (rip, n_bytes)

    @property
    def faults(self) -> int:
        """Accesses that the memory did not permit, the skipped ones included."""
        return self._faults

    def registers(self) -> dict[str, int]:
        """Return the general registers, rip, rflags, cr2, cr3 and cs."""
        return self._cpu.registers()

    def reset_mmu(self) -> None:
        """Drop the emulator's cached translations."""
        self.request_flush()

    def flush_guest_tlb(self) -> None:
        """Drop the emulator's cached translations."""
        self.request_flush()

    @property
    def exits(self) -> int:
        """Number of exits from emulation, including those handled here."""
        return self._exits

    @property
    def doorbells(self) -> int:
        """Doorbells rung so far."""
        return self._doorbells

    @property
    def epoch(self) -> int:
        """Value of the last doorbell."""
        return self._epoch

    def close(self) -> None:
        """Free the vCPU. Idempotent."""
        with self._changed:
            self._closed = True
        self._cpu.close()

    # -- requests of other threads --------------------------------------------

    def request_flush(self) -> None:
        """Request a TLB flush before guest code continues; flush at once if none runs."""
        with self._changed:
            self._flush = not self._closed
            if self._inside:
                self._cpu.attend()
            else:
                self._flush_now()

    def request_change(self, change: Callable[[UnicornCpu], None]) -> None:
        """Request a change of the processor's memory; make it at once if no guest code runs."""
        with self._changed:
            if not self._closed:
                self._changes.append(change)
            if self._inside:
                self._cpu.attend()
            else:
                self._flush_now()

    def wait_flushed(self) -> None:
        """Wait until requested flushes and changes are done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._flush and not self._changes)

    def _go_in(self) -> bool:
        with self._changed:
            # Cleared under the lock under which it is set: no request is lost.
            self._core.attention = 0
            if self._kicked:
                self._kicked = False
                return False
            self._inside = True
            return True

    def _come_out(self) -> None:
        with self._changed:
            self._inside = False
            self._flush_now()

    def _flush_now(self) -> None:
        if not self._flush and not self._changes:
            return
        changes, self._changes = self._changes, []
        for change in changes:
            change(self._cpu)
        if self._flush:
            self._cpu.flush_tlb()
            self._flush = False
        self._changed.notify_all()

    # -- guest code -----------------------------------------------------------

    def _once(self) -> Exit | None:
        """Run until a stop; return None if it was handled here."""
        if self._reading is not None:
            self.complete_read(b"\xff" * lib.KH_EMU_DATA)
        if self._string is not None:
            address, self._string = self._string, None
            return self._stopped(self._cpu.step_string(address), whole=True)
        if self._replay is not None:
            return self._run_outside(self._replay)
        return self._stopped(self._cpu.run())

    def _stopped(self, error: str, whole: bool = False) -> Exit | None:
        """Handle the reason for a stop; ``whole``: a stop after one instruction is expected."""
        core = self._core
        reason, address, size = core.reason, int(core.address), int(core.size)
        if reason == lib.KH_EMU_ATTENTION or (whole and reason == lib.KH_EMU_NONE and not error):
            return None
        if reason == lib.KH_EMU_NEW_BLOCK:
            starts, ends = candidates(self._cpu.code(address, size))
            self._cpu.watch((address + i for i in starts), (address + i for i in ends))
            return None
        self._exits += 1
        if reason == lib.KH_EMU_PORT:
            return self._port(address, size)
        if reason == lib.KH_EMU_OUTSIDE:
            return self._outside()
        if reason == lib.KH_EMU_PROTECTED:
            return self._protected(address, size)
        if reason == lib.KH_EMU_EXCEPTION:
            return Shutdown(f"exception {address}")
        if reason == lib.KH_EMU_UNFORESEEN:
            return self._not_emulated()
        return UnknownExit(reason, self._cpu.read("rip"))

    # -- ports ------------------------------------------------------------------

    def _port(self, address: int, n_bytes: int) -> Exit | None:
        insn = decode(self._cpu.code(address, n_bytes))
        if insn is None:
            return self._not_emulated()
        port = self._cpu.read("rdx") & 0xFFFF if insn.port is None else insn.port
        if insn.is_in:
            return self._read_port(insn, port)
        if not insn.is_string:
            value = self._cpu.read("rax").to_bytes(8, "little")[: insn.size]
            self._cpu.write("rip", address + insn.n_bytes)
            return self._write_port(port, insn.size, value)
        self._core.used = 0
        failed = self._stopped(self._cpu.step_string(address), whole=True)
        data = ffi.buffer(self._core.data, self._core.used)[:]
        return failed or (self._write_port(port, insn.size, data) if data else None)

    def _write_port(self, port: int, size: int, data: bytes) -> Exit | None:
        entry = self._core_port(port)
        if entry is None:
            return IoOut(port, size, data, len(data) // size)
        if entry.kind == lib.KH_PORT_SERIAL:
            for i, byte in enumerate(data):
                lib.kh_serial_out(entry.serial, port - entry.port + i % size, byte)
            return None
        self._epoch = int.from_bytes(data[:size], "little")
        self._doorbells += 1
        return IoOut(port, size, data, len(data) // size) if self._stop_at_doorbell else None

    def _read_port(self, insn: PortInsn, port: int) -> Exit | None:
        count = 1
        if insn.repeats:
            left = self._cpu.read("rcx") & ((1 << 32) - 1 if insn.narrow else (1 << 64) - 1)
            count = min(left, lib.KH_EMU_DATA // insn.size)
        entry = self._core_port(port)
        if entry is None and count:
            self._reading = insn
            return IoIn(port, insn.size, count)
        if entry is not None and entry.kind == lib.KH_PORT_SERIAL:
            first = port - entry.port
            wanted = (first + i % insn.size for i in range(insn.size * count))
            data = bytes(lib.kh_serial_in(entry.serial, offset) for offset in wanted)
        else:
            data = b"\xff" * (insn.size * count)
        self._finish_in(insn, data)
        return None

    def _finish_in(self, insn: PortInsn, data: bytes) -> None:
        address = self._cpu.read("rip")
        if insn.is_string:
            self._string = address
            self._core.used, self._core.done = len(data), 0
            ffi.memmove(self._core.data, data, min(len(data), lib.KH_EMU_DATA))
            return
        value = int.from_bytes(data[: insn.size].ljust(insn.size, b"\0"), "little")
        if insn.size < 4:  # 32 bits clear the upper half, less keeps it
            mask = (1 << 8 * insn.size) - 1
            value |= self._cpu.read("rax") & ~mask
        self._cpu.write("rax", value)
        self._cpu.write("rip", address + insn.n_bytes)

    def _core_port(self, port: int) -> Any:
        """Return the ``struct kh_port`` that C handles for KVM; None if Python handles it."""
        for entry in self._bus.core.ports[0 : self._bus.core.n_ports]:
            if entry.port <= port < entry.port + entry.n_ports:
                return entry
        return None

    # -- accesses outside memory --------------------------------------------------

    def _outside(self) -> Exit:
        core = self._core
        if core.type == UnicornCpu.FETCH_OUTSIDE:
            return self._not_emulated()
        self._replay = self._replay or Replay()
        is_write = core.type == UnicornCpu.WRITE_OUTSIDE
        return self._replay.ask(core.address, core.size, core.value if is_write else None)

    def _run_outside(self, replay: Replay) -> Exit | None:
        """Run the instruction again, with the known results of its accesses."""
        error, put_back = self._cpu.step_outside(replay.pages, replay.read, replay.write)
        missing = replay.take_missing()
        if missing is not None:
            put_back()
            self._exits += 1
            return missing
        failed = self._stopped(error, whole=True)
        if self._core.reason == lib.KH_EMU_OUTSIDE:
            put_back()
        else:
            self._replay = None
        return failed

    def _protected(self, gpa: int, size: int) -> Exit | None:
        rip, n_bytes = self._cpu.read("rip"), self._skipped[1]
        self._faults += 1
        if n_bytes and rip == self._skipped[0]:
            self._cpu.write("rip", rip + n_bytes)
            return None
        is_write = self._core.type == UnicornCpu.WRITE_PROTECTED
        return MemoryFault(gpa, self._memory.find_hva(gpa), is_write, rip, size)

    def _not_emulated(self) -> InternalError:
        code = self._cpu.code(self._cpu.read("rip"), 15)
        raw = (bytes([len(code)]) + code).ljust(24, b"\0")
        words = (int.from_bytes(raw[i : i + 8], "little") for i in range(0, 24, 8))
        return InternalError(_EMULATION_FAILED, (1, *words))


def _protect(cpu: UnicornCpu, gpa: int, n_bytes: int, access: Access) -> None:
    cpu.protect(gpa, n_bytes, access)
