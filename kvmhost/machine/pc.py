"""The ``pc`` machine: the PC hardware that small kernels and test images expect.

In the kernel: PICs, I/O APIC, local APICs, PIT (and port 0x61). In C: the serial port.
Here: fw_cfg, clock, ACPI registers, reset and exit ports, the test device. There is no
PCI bus, no disk and no display. The guest runs at privilege level 0.

>>> from kvmhost.boot.loaders import load_image
>>> from kvmhost.machine.pc import PcMachine
>>> with PcMachine(load_image(Path("hello.flat"))) as machine:  # doctest: +SKIP
...     machine.start()
...     machine.wait(timeout_s=5)
1
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import threading
import time
import typing
from collections.abc import Callable, Mapping

from kvmhost.boot.acpi import (
    ACPI_DISABLE,
    ACPI_ENABLE,
    PM_EVENT_PORT,
    SMI_PORT,
)
from kvmhost.boot.firmware import lay_out_long_tables, write_firmware
from kvmhost.boot.pcboot import BootRequest, Mode, Module, PcImage
from kvmhost.devices import board
from kvmhost.devices.bus import DEBUG_EXIT_PORT, Bus, BusDevice
from kvmhost.devices.clock import CMOS_PORT, Clock
from kvmhost.devices.fwcfg import FWCFG_PORT, FWCFG_PORTS, MAX_CPUS, NB_CPUS, RAM_SIZE, FwCfg
from kvmhost.engine.base import Vcpu
from kvmhost.engine.kvmpc import MP_HALTED, MP_RUNNABLE, MP_STATES, KvmPcEngine
from kvmhost.errors import CapabilityError, GuestTimeout, LayoutError, PauseTimeout, UnexpectedExit
from kvmhost.exits import Exit, InternalError, IoIn, IoOut, MmioRead, MmioWrite
from kvmhost.machine.base import BaseMachine
from kvmhost.machine.failures import internal_error, registers_line
from kvmhost.machine.parts import MachineParts
from kvmhost.machine.runner import Step
from kvmhost.memory.dma import GuestDma
from kvmhost.memory.pclayout import PcLayout
from kvmhost.vm.names import EngineName

__all__ = ["DEFAULT_MEM_BYTES", "PcMachine", "PcOptions"]

DEFAULT_MEM_BYTES = 128 << 20

SERIAL_IRQ = 4
TEST_IO_PORT, TEST_FLUSH_PORT, TEST_BYTE_PORT, TEST_IRQ_PORT = 0xE0, 0xE4, 0xE8, 0x2000
TEST_MEMORY_GPA, TEST_MEMORY_BYTES = 0xFF00_0000, 0x1_0000
_ISA_LINES = 16
#: Initial interval at which an idle machine is checked for a permanent halt.
_LOOK_S, _LOOK_MAX_S = 0.25, 2.0


class SnapshotDevice(BusDevice, typing.Protocol):
    """A device that a snapshot can hold."""

    def save(self) -> dict[str, typing.Any]:
        """Return its state as JSON takes it."""

    def load(self, state: Mapping[str, typing.Any]) -> None:
        """Take a state from :meth:`save`."""


@dataclasses.dataclass(frozen=True)
class PcOptions:
    """Options of a ``pc`` beside its image.

    :ivar append: arguments; the command line is the image's name and these
    :ivar modules: files for the boot protocol's module list
    :ivar fw_cfg: files for fw_cfg, by name
    :ivar cpu: what it sees of its processors, see :mod:`kvmhost.engine.cpumodel`
    """

    append: str = ""
    modules: tuple[Module, ...] = ()
    fw_cfg: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    cpu: str = "plain"

    @property
    def given(self) -> str:
        """The names of the options in use, for messages; empty if there are none."""
        words = [
            ("--append", bool(self.append)),
            ("--initrd", bool(self.modules)),
            ("--fw-cfg", bool(self.fw_cfg)),
            ("--cpu", self.cpu != "plain"),
        ]
        return ", ".join(name for name, value in words if value)


class PcMachine(BaseMachine):
    """One VM that looks like a PC.

    :param image: a checked image, see :mod:`kvmhost.boot.loaders`
    :param options: command line, modules, fw_cfg files
    :param engine: ``auto`` or ``kvm``
    :param params: must be empty: a pc takes a command line
    :param common: as for :class:`~kvmhost.machine.base.BaseMachine`
    """

    def __init__(
        self,
        image: PcImage,
        options: PcOptions | None = None,
        *,
        mem_bytes: int = DEFAULT_MEM_BYTES,
        n_vcpus: int = 1,
        engine: EngineName = "auto",
        params: Mapping[str, int | str] | None = None,
        **common: typing.Any,
    ) -> None:
        if params:
            raise LayoutError(f"{image.path} takes no parameters; use --append")
        if n_vcpus < 1:
            raise LayoutError(f"{n_vcpus} vCPUs: a pc takes 1 or more")
        self._options = options or PcOptions()
        self._pc_layout = PcLayout(mem_bytes)
        command_line = f"{image.path} {self._options.append}"
        request = BootRequest(self._pc_layout, command_line, self._options.modules)
        self._boot = image.plan(request)
        self._device_lock = threading.Lock()
        self._ending = ""
        #: Devices by name, for snapshots.
        self.devices: dict[str, SnapshotDevice] = {}
        if engine == "emulated":
            raise CapabilityError(
                "machine pc", "the kvm engine", "--engine emulated", "use a host with /dev/kvm"
            )
        #: The engine, with access to the interrupt hardware.
        self.pc_engine = KvmPcEngine(self._options.cpu)
        super().__init__(image, self._pc_layout, self.pc_engine, n_vcpus=n_vcpus, **common)

    kind: typing.ClassVar[str] = "pc"

    @property
    def options(self) -> PcOptions:
        """Its options beside the image."""
        return self._options

    @property
    def ending(self) -> str:
        """How the guest ended itself: ``debug exit``, ``reset``, ``power off``, or nothing."""
        return self._ending

    def snapshot_parts(self) -> MachineParts:
        """Return its command line, its files and the state of its devices."""
        devices = {name: device.save() for name, device in self.devices.items()}
        return MachineParts("pc", self._options.append, self._options.fw_cfg, devices)

    def assemble(self) -> list[Vcpu]:
        """Lay out firmware and image, add the devices, connect the interrupt lines."""
        layout, entry = self._pc_layout, self._boot.entry
        write_firmware(self.memory, layout, self.n_vcpus)
        self._boot.load(self.memory, layout)
        cr3 = lay_out_long_tables(self.memory, layout) if entry.mode is Mode.LONG else 0
        self.pc_engine.attach(self.memory, self.bus)
        self._add_devices(self.bus)
        vcpus: list[Vcpu] = [
            self.pc_engine.create_processor(index, self.n_vcpus, entry, cr3)
            for index in range(self.n_vcpus)
        ]
        self.pc_engine.set_up_interrupts()
        self.serial.connect(self.pc_engine.vm.fd, SERIAL_IRQ)
        return vcpus

    # -- devices --------------------------------------------------------------

    def _add_devices(self, bus: Bus) -> None:
        layout = self._pc_layout
        reset = self._ends("reset")
        power = board.PowerManagement(self._ends("power off"))
        cpus = struct.pack("<H", self.n_vcpus)
        items = {NB_CPUS: cpus, MAX_CPUS: cpus, RAM_SIZE: struct.pack("<Q", layout.mem_bytes)}
        e820 = b"".join(
            struct.pack("<QQI", entry.gpa, entry.n_bytes, entry.kind)
            for entry in layout.memory_map()
        )
        files = {"etc/e820": e820} | dict(self._options.fw_cfg)
        dma = GuestDma(self.memory, self.paging.drop, layout.pinned_ranges)
        echo = board.TestMemory(4)
        ports: list[tuple[str, int, int, SnapshotDevice]] = [
            ("keyboard", 0x60, 1, board.Keyboard(reset)),
            ("clock", CMOS_PORT, 2, Clock(layout, self.n_vcpus)),
            ("delay", 0x80, 1, board.Scratch()),
            ("system control", 0x92, 1, board.SystemControl(reset)),
            ("smi", SMI_PORT, 2, board.SmiCommand(power, ACPI_ENABLE, ACPI_DISABLE)),
            ("test ports", TEST_IO_PORT, 4, echo),
            ("test flush", TEST_FLUSH_PORT, 4, board.Scratch(0)),
            ("fw_cfg", FWCFG_PORT, FWCFG_PORTS, FwCfg(items, files, dma)),
            ("power", PM_EVENT_PORT, 12, power),
            ("pci", 0xCF8, 8, board.PciConfig(reset)),
            ("test lines", TEST_IRQ_PORT, _ISA_LINES, board.TestIrqs(self.pc_engine.set_line)),
        ]
        for name, port, count, device in ports:
            bus.add_port(port, count, device)
            self.devices[name] = device
        bus.add_port(TEST_BYTE_PORT, 4, echo)  # The same bytes at a second port.
        # The two ports of the keyboard controller are not adjacent.
        bus.add_port(0x64, 1, _At(self.devices["keyboard"], 4))
        memory = board.TestMemory(TEST_MEMORY_BYTES)
        bus.add_mmio(TEST_MEMORY_GPA, TEST_MEMORY_BYTES, memory)
        self.devices["test memory"] = memory

    def _ends(self, how: str) -> Callable[[], None]:
        def end() -> None:
            self._ending = self._ending or how

        return end

    # -- exits ----------------------------------------------------------------

    def handle_port_read(self, vcpu: Vcpu, vm_exit: IoIn) -> Step:
        """Complete a port read, one vCPU at a time; the debug exit port reads as zero."""
        if DEBUG_EXIT_PORT <= vm_exit.port < DEBUG_EXIT_PORT + 4:
            vcpu.complete_read(bytes(vm_exit.size * vm_exit.count))
            return Step.GO_ON
        with self._device_lock:
            return super().handle_port_read(vcpu, vm_exit)

    def handle_port_write(self, vcpu: Vcpu, vm_exit: IoOut) -> Step:
        """Carry out a port write, one vCPU at a time; it may end the machine."""
        with self._device_lock:
            if self._ending:
                return Step.END_ALL
            if DEBUG_EXIT_PORT <= vm_exit.port < DEBUG_EXIT_PORT + 4:
                self._ending = "debug exit"
                self.report_status(vcpu, vm_exit.value << 1 | 1)
            else:
                self.bus.write_port(vm_exit)
            return Step.END_ALL if self._ending else Step.GO_ON

    def handle_mmio(self, vcpu: Vcpu, vm_exit: MmioRead | MmioWrite) -> Step:
        """Carry out an access to a device, one vCPU at a time."""
        with self._device_lock:
            if self.bus.mmio_handler(vm_exit.gpa) is not None:
                return super().handle_mmio(vcpu, vm_exit)
        # An address without a device reads as zero, as on the PC that most images are tested on.
        if isinstance(vm_exit, MmioRead):
            vcpu.complete_read(bytes(vm_exit.size))
        return Step.GO_ON

    def describe_failure(self, vcpu: Vcpu, vm_exit: Exit) -> UnexpectedExit:
        """Return the error for an exit that no method handles, with the instruction."""
        if isinstance(vm_exit, InternalError):
            core = self.pc_engine.cores[vcpu.index]
            return internal_error(vcpu.index, vm_exit, core, self.memory)
        return super().describe_failure(vcpu, vm_exit)

    # -- the end --------------------------------------------------------------

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the guest's end and return its status: that of the debug exit, else 0.

        :raises GuestTimeout: if it still runs after ``timeout_s``
        :raises GuestError: if it triple-faulted, met an instruction that KVM cannot
            emulate, or all its processors halted for ever
        """
        self._check_started()
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        look_s, spent = _LOOK_S, -1.0
        while True:
            left = deadline - time.monotonic() if deadline is not None else look_s
            if self.runner.wait_ended(max(0.0, min(look_s, left))):
                return super().wait(0)
            if deadline is not None and time.monotonic() >= deadline:
                raise GuestTimeout(timeout_s or 0.0)
            now = self.runner.cpu_seconds()
            if now == spent and not self.paused:
                self._fail_if_halted()
            spent, look_s = now, min(2 * look_s, _LOOK_MAX_S)

    def _fail_if_halted(self) -> None:
        """Fail if no processor can ever run again: halted, and interrupts off."""
        # A vCPU that does not stop in time waits for something other than an interrupt.
        with contextlib.suppress(PauseTimeout), self.runner.hold(_LOOK_S):
            dead = not self.runner.ended and all(self._is_dead(v.index) for v in self.vcpus)
            if dead:
                state = "; ".join(self.describe_vcpu(vcpu.index) for vcpu in self.vcpus)
                self.fail(UnexpectedExit(0, "all vCPUs halted with interrupts off", state))

    def _is_dead(self, index: int) -> bool:
        state = self.pc_engine.mp_state(index)
        if state == MP_HALTED:
            return not self.pc_engine.interrupts_open(index)
        return state != MP_RUNNABLE and index > 0

    def describe_vcpu(self, vcpu: int) -> str:
        """Return the state of a processor and its address; it must not run."""
        self._check_open()
        state = MP_STATES.get(self.pc_engine.mp_state(vcpu), "unknown state")
        return f"vCPU {vcpu} {state}: {registers_line(self.vcpus[vcpu].registers())}"


class _At:
    """A device seen from another port: offsets begin at ``start``."""

    def __init__(self, device: BusDevice, start: int) -> None:
        self._device, self._start = device, start

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._start + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._start + offset, size, value)
