"""The ``pc`` machine: what small kernels and test images expect of a PC.

In the kernel: PICs, I/O APIC, local APICs, PIT (and port 0x61). In C: the serial port.
Here: fw_cfg, clock, ACPI registers, reset and exit ports, the test device. There is no
PCI bus, no disk and no display. The guest runs at privilege level 0.

>>> from kvmhost.boot.loaders import load_image
>>> from kvmhost.machine.pc import PcMachine
>>> with PcMachine(load_image(Path("hello.flat"))) as machine:  # doctest: +SKIP
...     machine.start()
...     machine.wait(timeout=5)
1
"""

from __future__ import annotations

import dataclasses
import struct
import threading
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from kvmhost.boot.acpi import (
    ACPI_DISABLE,
    ACPI_ENABLE,
    PM_EVENT_PORT,
    SMI_PORT,
)
from kvmhost.boot.firmware import lay_out_long_tables, write_firmware
from kvmhost.boot.image import Image
from kvmhost.boot.pcboot import BootRequest, Mode, Module, PcImage
from kvmhost.devices import board
from kvmhost.devices.bus import DEBUG_EXIT_PORT, Bus, Handler
from kvmhost.devices.clock import CMOS_PORT, Clock
from kvmhost.devices.fwcfg import FWCFG_PORT, FWCFG_PORTS, MAX_CPUS, NB_CPUS, RAM_SIZE, FwCfg
from kvmhost.engine.base import Engine, Vcpu
from kvmhost.engine.kvmpc import MP_HALTED, MP_RUNNABLE, MP_STATES, KvmPcEngine
from kvmhost.errors import CapabilityError, GuestTimeout, LayoutError, UnexpectedExit
from kvmhost.exits import Exit, InternalError, IoIn, IoOut, MmioRead, MmioWrite
from kvmhost.machine.base import Machine
from kvmhost.machine.failures import registers_line
from kvmhost.machine.internalerror import internal_error
from kvmhost.machine.runner import Step
from kvmhost.memory.pclayout import PcLayout

__all__ = ["PcMachine", "PcOptions"]

SERIAL_IRQ = 4
TEST_IO_PORT, TEST_FLUSH_PORT, TEST_BYTE_PORT, TEST_IRQ_PORT = 0xE0, 0xE4, 0xE8, 0x2000
TEST_MEMORY_GPA, TEST_MEMORY_BYTES = 0xFF00_0000, 0x1_0000
_ISA_LINES = 16
#: How often a machine in which nothing moves is looked at more closely, at first.
_LOOK_S, _LOOK_MAX_S = 0.25, 2.0


class Device(Handler, typing.Protocol):
    """A device that a snapshot can hold."""

    def save(self) -> dict[str, typing.Any]:
        """Return its state as JSON takes it."""

    def load(self, state: Mapping[str, typing.Any]) -> None:
        """Take a state from :meth:`save`."""


@dataclasses.dataclass(frozen=True)
class PcOptions:
    """What a ``pc`` is given beside its image.

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
        """Names what was given, for messages; empty if nothing was."""
        words = [
            ("--append", bool(self.append)),
            ("--initrd", bool(self.modules)),
            ("--fw-cfg", bool(self.fw_cfg)),
            ("--cpu", self.cpu != "plain"),
        ]
        return ", ".join(name for name, value in words if value)


class PcMachine(Machine):
    """One VM that looks like a PC.

    :param image: a checked image, see :mod:`kvmhost.boot.loaders`
    :param options: command line, modules, fw_cfg files
    :param common: as for :class:`~kvmhost.machine.base.Machine`
    """

    def __init__(
        self, image: PcImage, options: PcOptions | None = None, **common: typing.Any
    ) -> None:
        self._pc_image = image
        self._options = options or PcOptions()
        self._device_lock = threading.Lock()
        self._ending = ""
        #: Devices by name, for snapshots.
        self.devices: dict[str, Device] = {}
        common.setdefault("mem_bytes", 128 << 20)
        super().__init__(Path(image.path), **common)

    @property
    def pc_engine(self) -> KvmPcEngine:
        """The engine, which knows the interrupt hardware."""
        return typing.cast(KvmPcEngine, self.engine)

    @property
    def options(self) -> PcOptions:
        """What it was given beside its image."""
        return self._options

    @property
    def ending(self) -> str:
        """How the guest ended itself: ``debug exit``, ``reset``, ``power off``, or nothing."""
        return self._ending

    def _plan(self, image: Path | str | Image, mem_bytes: int, params: Mapping[str, int]) -> None:
        if params:
            raise LayoutError(f"{image} takes no parameters; use --append")
        if self.n_vcpus < 1:
            raise LayoutError(f"{self.n_vcpus} vCPUs: a pc takes 1 or more")
        self.image = self._pc_image
        self._pc_layout = PcLayout(mem_bytes)
        self.layout = self._pc_layout
        command_line = f"{self._pc_image.path} {self._options.append}"
        request = BootRequest(self._pc_layout, command_line, self._options.modules)
        self._boot = self._pc_image.plan(request)

    def _choose_engine(self, name: str) -> Engine:
        if name == "emulated":
            raise CapabilityError(
                "machine pc", "the kvm engine", "--engine emulated", "use a host with /dev/kvm"
            )
        return KvmPcEngine(self._options.cpu)

    def _assemble(self) -> None:
        layout, entry = self._pc_layout, self._boot.entry
        write_firmware(self.memory, layout, self.n_vcpus)
        self._boot.load(self.memory, layout)
        cr3 = lay_out_long_tables(self.memory, layout) if entry.mode is Mode.LONG else 0
        self.pc_engine.attach(self.memory, self.bus)
        self._add_devices(self.bus)
        for index in range(self.n_vcpus):
            self.vcpus.append(self.pc_engine.create_processor(index, self.n_vcpus, entry, cr3))
        self.pc_engine.set_up_interrupts()
        self.serial.connect(self.pc_engine.vm.fd, SERIAL_IRQ)

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
        echo = board.TestMemory(4)
        ports: list[tuple[str, int, int, Device]] = [
            ("keyboard", 0x60, 1, board.Keyboard(reset)),
            ("clock", CMOS_PORT, 2, Clock(layout, self.n_vcpus)),
            ("delay", 0x80, 1, board.Scratch()),
            ("system control", 0x92, 1, board.SystemControl(reset)),
            ("smi", SMI_PORT, 2, board.SmiCommand(power, ACPI_ENABLE, ACPI_DISABLE)),
            ("test ports", TEST_IO_PORT, 4, echo),
            ("test flush", TEST_FLUSH_PORT, 4, board.Scratch(0)),
            ("fw_cfg", FWCFG_PORT, FWCFG_PORTS, FwCfg(items, files, self.memory)),
            ("power", PM_EVENT_PORT, 12, power),
            ("pci", 0xCF8, 8, board.PciConfig(reset)),
            ("test lines", TEST_IRQ_PORT, _ISA_LINES, board.TestIrqs(self.pc_engine.set_line)),
        ]
        for name, port, count, device in ports:
            bus.add_port(port, count, device)
            self.devices[name] = device
        bus.add_port(TEST_BYTE_PORT, 4, echo)  # The same bytes once more.
        # The keyboard controller has two ports with others in between.
        bus.add_port(0x64, 1, _At(self.devices["keyboard"], 4))
        memory = board.TestMemory(TEST_MEMORY_BYTES)
        bus.add_mmio(TEST_MEMORY_GPA, TEST_MEMORY_BYTES, memory)
        self.devices["test memory"] = memory

    def _ends(self, how: str) -> Callable[[], None]:
        def end() -> None:
            self._ending = self._ending or how

        return end

    # -- exits ----------------------------------------------------------------

    def _port_read(self, vcpu: Vcpu, leaving: IoIn) -> Step:
        if DEBUG_EXIT_PORT <= leaving.port < DEBUG_EXIT_PORT + 4:
            vcpu.complete_read(bytes(leaving.size * leaving.count))
            return Step.GO_ON
        with self._device_lock:
            return super()._port_read(vcpu, leaving)

    def _port_write(self, vcpu: Vcpu, leaving: IoOut) -> Step:
        with self._device_lock:
            if self._ending:
                return Step.END_ALL
            if DEBUG_EXIT_PORT <= leaving.port < DEBUG_EXIT_PORT + 4:
                self._ending = "debug exit"
                self._statuses[vcpu.index] = (leaving.value << 1 | 1) & 0xFF
            else:
                self.bus.write_port(leaving)
            return Step.END_ALL if self._ending else Step.GO_ON

    def _mmio(self, vcpu: Vcpu, leaving: MmioRead | MmioWrite) -> Step:
        with self._device_lock:
            if self.bus.mmio_handler(leaving.gpa) is not None:
                return super()._mmio(vcpu, leaving)
        # Nothing there: reads as zero, as the PC that most images are tested on.
        if isinstance(leaving, MmioRead):
            vcpu.complete_read(bytes(leaving.size))
        return Step.GO_ON

    def _unexpected(self, vcpu: Vcpu, leaving: Exit) -> UnexpectedExit:
        if isinstance(leaving, InternalError):
            core = self.pc_engine.cores[vcpu.index]
            return internal_error(vcpu.index, leaving, core, self.memory)
        return super()._unexpected(vcpu, leaving)

    # -- the end --------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the guest's end and return its status: that of the debug exit, else 0.

        :raises GuestTimeout: if it still runs after ``timeout`` seconds
        :raises GuestError: if it triple-faulted, met an instruction that KVM cannot
            emulate, or all its processors halted for ever
        """
        deadline = time.monotonic() + timeout if timeout is not None else None
        look_s, spent = _LOOK_S, -1.0
        while True:
            left = deadline - time.monotonic() if deadline is not None else look_s
            if self._runner.wait_ended(max(0.0, min(look_s, left))):
                return super().wait(0)
            if deadline is not None and time.monotonic() >= deadline:
                raise GuestTimeout(timeout or 0.0)
            now = self._runner.cpu_seconds()
            if now == spent and not self.paused:
                self._fail_if_halted()
            spent, look_s = now, min(2 * look_s, _LOOK_MAX_S)

    def _fail_if_halted(self) -> None:
        """Fail if no processor can ever run again: halted, and interrupts off."""
        self.pause()
        try:
            dead = not self._runner.ended and all(self._is_dead(v.index) for v in self.vcpus)
            if dead:
                state = "; ".join(self.describe_vcpu(vcpu.index) for vcpu in self.vcpus)
                self.fail(UnexpectedExit(0, "all vCPUs halted with interrupts off", state))
        finally:
            self.resume()

    def _is_dead(self, index: int) -> bool:
        state = self.pc_engine.mp_state(index)
        if state == MP_HALTED:
            return not self.pc_engine.interrupts_open(index)
        return state != MP_RUNNABLE and index > 0

    def describe_vcpu(self, index: int) -> str:
        """Return what a processor does and where; it must not run."""
        state = MP_STATES.get(self.pc_engine.mp_state(index), "unknown state")
        return f"vCPU {index} {state}: {registers_line(self.vcpus[index].registers())}"


class _At:
    """A device seen from another port: offsets count on from ``start``."""

    def __init__(self, device: Handler, start: int) -> None:
        self._device, self._start = device, start

    def read(self, offset: int, size: int) -> int:
        return self._device.read(self._start + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._device.write(self._start + offset, size, value)
