"""A VM that can be run: its memory, engine, vCPUs and devices.

The vCPUs start, pause, step and stop here, and their exits are handled. What else is asked
of a machine is in :mod:`kvmhost.machine.base`.
"""

from __future__ import annotations

import abc
import contextlib
import threading
import time
import typing
from collections.abc import Iterator, Mapping
from typing import ClassVar

from kvmhost.boot.params import GuestResult, read_result
from kvmhost.closing import Closing
from kvmhost.devices.bus import Bus
from kvmhost.devices.serial import Serial
from kvmhost.engine.base import Engine, Vcpu
from kvmhost.errors import (
    CapabilityError,
    GuestTimeout,
    KvmHostError,
    LayoutError,
    PagerError,
    StateError,
    UnexpectedExit,
)
from kvmhost.exits import (
    Debug,
    Exit,
    IoIn,
    IoOut,
    Kicked,
    MemoryFault,
    MmioRead,
    MmioWrite,
)
from kvmhost.machine.failures import outside_memory, registers_line, unexpected
from kvmhost.machine.paging import Paging
from kvmhost.machine.parts import MachineParts
from kvmhost.machine.runner import PAUSE_TIMEOUT_S, Runner, Step
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.memory.layout import Layout
from kvmhost.timescale import scaled

if typing.TYPE_CHECKING:
    from kvmhost.kvm import KvmVcpu
    from kvmhost.pager.options import StoreOptions

__all__ = ["NamedImage", "RunnableMachine"]


#: Default time-out of an epoch, in seconds.
EPOCH_TIMEOUT_S = scaled(60.0)


class NamedImage(typing.Protocol):
    """Any image: where it came from."""

    @property
    def path(self) -> str:
        """The file, for messages."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Requests of the image that are not met, one line each."""


class RunnableMachine(Closing, abc.ABC):
    """The part of a machine that runs: see :class:`~kvmhost.machine.base.BaseMachine`.

    :ivar bus: its ports and MMIO ranges; add devices before the first run
    :ivar vcpus: its vCPUs by index, to read registers of while they are stopped
    :ivar memory: its guest memory
    :ivar waits_in_memory_faults: a vCPU that touches memory which the host cannot provide waits
        for :meth:`retry_memory_faults`, instead of ending the guest with an error
    :param image: what the guest was loaded from, for messages and reports
    :param layout: where its memory lies
    :param engine: what runs its vCPUs; the machine owns it from here on
    :param console_fd: descriptor that receives the guest's serial output; -1: none
    :param store: where the pager keeps evicted pages
    :param dirty_ring_entries: give each vCPU a dirty ring of this many entries, which the
        tracker ``dirty`` then uses instead of the dirty log; 0: none
    :raises LayoutError: if sizes or counts do not fit
    :raises CapabilityError: if the engine has no dirty ring
    """

    #: Name of the kind, as reports and snapshots have it.
    kind: ClassVar[str]
    waits_in_memory_faults = False

    def __init__(
        self,
        image: NamedImage,
        layout: Layout,
        engine: Engine,
        *,
        n_vcpus: int = 1,
        params: Mapping[str, int] | None = None,
        console_fd: int = -1,
        name: str = "",
        store: StoreOptions | None = None,
        dirty_ring_entries: int = 0,
    ) -> None:
        self.name = name
        self.image, self.layout, self.engine = image, layout, engine
        self.n_vcpus = n_vcpus
        self.params = dict(params or {})
        self.vcpus: list[Vcpu] = []
        self._statuses: dict[int, int] = {}
        self._error: BaseException | None = None
        # Held while the vCPUs are started or stepping by doorbell is switched.
        self._run_lock = threading.RLock()
        # Held while a vCPU is run or read outside of its thread.
        self._vcpu_access = threading.RLock()
        # Held while what is made at its first use is made.
        self._opening = threading.Lock()
        self._started_ns = 0
        self._closed = False
        try:
            self.memory = GuestMemory(
                [Region(gpa, n_bytes, name or "guest") for gpa, n_bytes in layout.regions]
            )
            self.paging = Paging(self.memory, layout.pinned_ranges, store, self.fail)
            if dirty_ring_entries:
                self._enable_dirty_ring(dirty_ring_entries)
            if n_vcpus > engine.max_vcpus():
                raise LayoutError(
                    f"{n_vcpus} vCPUs: the {engine.name} engine has {engine.max_vcpus()}"
                )
            self.serial = Serial(console_fd)
            self.bus = Bus()
            self.bus.add_serial(self.serial)
            self.vcpus += self.assemble()
        except BaseException:
            self.close()
            raise
        self.runner = Runner(self.vcpus, self._handle_exit, self._on_error)

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        plural = "s" if self.n_vcpus > 1 else ""
        return (
            f"<{type(self).__name__}{name} {self.image.path}: {self.n_vcpus} vCPU{plural}, "
            f"{self.layout.mem_bytes >> 20} MiB, engine {self.engine.name}, {self._run_state()}>"
        )

    def _run_state(self) -> str:
        if self._closed:
            return "closed"
        if not self._started_ns:
            return "not started"
        if not self.running:
            return "ended"
        return "paused" if self.paused else "running"

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called: methods that need the VM then raise ``StateError``."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise StateError(self._title)

    def _check_started(self) -> None:
        self._check_open()
        if not self._started_ns and not self.runner.ended:
            raise StateError(self._title, "is not started", "call start() first")

    @property
    def _title(self) -> str:
        return f"machine {self.name!r}" if self.name else "the machine"

    # -- methods that a kind of machine implements -------------------------------

    @abc.abstractmethod
    def assemble(self) -> list[Vcpu]:
        """Fill memory, put devices on the bus, attach the engine, create the vCPUs.

        Called once by the constructor: ``memory``, ``bus`` (with the serial port on it)
        and ``engine`` exist, nothing runs.

        :return: the vCPUs by index, each in the state in which it starts
        """

    def handle_port_read(self, vcpu: Vcpu, vm_exit: IoIn) -> Step:
        """Complete a port read, in the vCPU's thread. Here: from the bus."""
        vcpu.complete_read(self.bus.read_port(vm_exit))
        return Step.GO_ON

    def handle_port_write(self, vcpu: Vcpu, vm_exit: IoOut) -> Step:
        """Carry out a port write, in the vCPU's thread. Here: on the bus."""
        self.bus.write_port(vm_exit)
        return Step.GO_ON

    def handle_mmio(self, vcpu: Vcpu, vm_exit: MmioRead | MmioWrite) -> Step:
        """Carry out an access outside the memslots, in the vCPU's thread. Here: on the bus.

        :raises UnexpectedExit: if there is no device at that address
        """
        found = self.bus.mmio_handler(vm_exit.gpa)
        if found is None:
            raise outside_memory(vcpu, vm_exit)
        device, offset = found
        if isinstance(vm_exit, MmioRead):
            value = device.read(offset, vm_exit.size)
            vcpu.complete_read(value.to_bytes(vm_exit.size, "little"))
        else:
            device.write(offset, len(vm_exit.data), int.from_bytes(vm_exit.data, "little"))
        return Step.GO_ON

    def handle_memory_fault(self, vcpu: Vcpu, vm_exit: MemoryFault) -> Step:
        """Handle a touch of memory that the host cannot provide, in the vCPU's thread.

        ``Step.GO_ON`` repeats the access, ``Step.WAIT`` waits for :meth:`retry_memory_faults`.

        :raises UnexpectedExit: unless :attr:`waits_in_memory_faults`
        """
        if self.waits_in_memory_faults:
            return Step.WAIT
        raise self.describe_failure(vcpu, vm_exit)

    def describe_failure(self, vcpu: Vcpu, vm_exit: Exit) -> UnexpectedExit:
        """Return the error for an exit that no method handles; it ends the guest."""
        return unexpected(vcpu, vm_exit)

    def report_status(self, vcpu: Vcpu, status: int) -> None:
        """Note the exit status that a vCPU reported; for the ``handle_`` methods."""
        self._statuses[vcpu.index] = status & 0xFF

    def _enable_dirty_ring(self, n_entries: int) -> None:
        from kvmhost.engine.kvm import KvmEngine

        if not isinstance(self.engine, KvmEngine):
            raise CapabilityError(
                "dirty ring", "the kvm engine", f"engine {self.engine.name}", "use --engine kvm"
            )
        self.engine.enable_dirty_ring(n_entries)

    # -- running --------------------------------------------------------------

    def start(self, paused: bool = False) -> None:
        """Start the vCPUs' threads; with ``paused`` they wait for :meth:`resume`."""
        self._check_open()
        with self._run_lock:
            if paused:
                self.runner.pause_at_start()
            self._started_ns = time.monotonic_ns()
            self.runner.start()

    @contextlib.contextmanager
    def stopped_vcpus(self, timeout_s: float = PAUSE_TIMEOUT_S) -> Iterator[None]:
        """Use the vCPUs exclusively inside the context: none runs, no other thread uses them.

        A concurrent pause or resume takes effect after the context.

        :raises PauseTimeout: if a vCPU does not stop in time
        """
        self._check_open()
        with self._vcpu_access, self.runner.hold(timeout_s):
            yield

    @property
    def paused(self) -> bool:
        """Whether the vCPUs are paused."""
        return self.runner.paused

    @property
    def still(self) -> bool:
        """Whether the vCPUs are paused and none runs any more."""
        return self.runner.still

    @property
    def running(self) -> bool:
        """Whether a vCPU has yet to end."""
        return self._started_ns > 0 and not self.runner.ended

    def step_by_doorbell(self, stop: bool = True) -> None:
        """Make each vCPU stop at its doorbells, for :meth:`run_epoch`."""
        self._check_open()
        with self._run_lock:
            self.runner.set_stepping(stop)
            for vcpu in self.vcpus:
                vcpu.stop_at_doorbell(stop)

    def run_epoch(self, timeout_s: float = EPOCH_TIMEOUT_S) -> bool:
        """Run every vCPU to its next doorbell.

        Needs :meth:`step_by_doorbell`; returns early if that is switched off meanwhile.
        The first call starts the machine.

        :return: False if the guest has ended instead
        :raises StateError: without :meth:`step_by_doorbell`
        :raises GuestTimeout: if a vCPU does not get there in time
        :raises GuestError: if the guest failed
        """
        self._check_open()
        with self._run_lock:
            if not self.runner.stepping:
                raise StateError(
                    self._title, "does not stop at doorbells", "call step_by_doorbell() first"
                )
            if not self._started_ns:
                self.start()
            else:
                self.runner.release()
        if not self.runner.wait_held(timeout_s):
            raise GuestTimeout(timeout_s)
        self._raise_error()
        return not self.runner.ended

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the guest's end and return its status.

        :raises StateError: before :meth:`start`, or after :meth:`close`
        :raises GuestTimeout: if it still runs after ``timeout_s``
        :raises GuestError: if a vCPU ended abnormally
        """
        self._check_started()
        if not self.runner.wait_ended(timeout_s):
            raise GuestTimeout(timeout_s or 0.0)
        self.serial.flush()
        self._raise_error()
        return self.status or 0

    @property
    def status(self) -> int | None:
        """The guest's exit status: the first that is not 0; None before any exit."""
        if not self._statuses:
            return None
        return next((s for _, s in sorted(self._statuses.items()) if s), 0)

    def describe_vcpu(self, vcpu: int) -> str:
        """Return the state of a vCPU and its address; it must not run."""
        self._check_open()
        found = self._vcpu(vcpu)
        what = "ended" if vcpu in self.ended_vcpus else "stands"
        return f"vCPU {vcpu} {what}: {registers_line(found.registers())}"

    def _vcpu(self, number: int) -> Vcpu:
        if not 0 <= number < len(self.vcpus):
            raise LayoutError(f"no vCPU {number}: there are {len(self.vcpus)}", field="vcpu")
        return self.vcpus[number]

    def describe_vcpus(self) -> dict[int, str]:
        """Return :meth:`describe_vcpu` of all, by index; they are paused meanwhile.

        :raises PauseTimeout: if a vCPU does not stop in time
        """
        self._check_open()
        with self.runner.hold():
            return {vcpu.index: self.describe_vcpu(vcpu.index) for vcpu in self.vcpus}

    @property
    def statuses(self) -> dict[int, int]:
        """Exit statuses reported so far, by vCPU index."""
        return dict(self._statuses)

    @property
    def ended_vcpus(self) -> set[int]:
        """Indexes of the vCPUs that have ended."""
        return self.runner.ended_vcpus

    def settle(self) -> None:
        """Complete the access of a paused vCPU's last exit.

        KVM's registers are consistent only after that. Call it inside :meth:`stopped_vcpus`.
        """
        self._check_open()
        for vcpu in self.vcpus:
            if vcpu.index not in self.ended_vcpus:
                vcpu.kick()
                while not isinstance(vm_exit := vcpu.run(), Kicked):
                    if self._handle_exit(vcpu, vm_exit) in (Step.END, Step.END_ALL):
                        raise KvmHostError(f"vCPU {vcpu.index} ended while it was paused")

    def single_step(self, vcpu: int = 0) -> Exit:
        """Run one instruction of a vCPU while all others are stopped; on the kvm engine.

        A machine that is not paused resumes afterwards.

        :return: :class:`~kvmhost.exits.Debug`, or the exit that the instruction caused
            and that ends the guest
        :raises CapabilityError: on another engine
        :raises LayoutError: if there is no such vCPU
        """
        self._check_open()
        from kvmhost.engine.kvm import KvmEngine

        if not isinstance(self.engine, KvmEngine):
            raise CapabilityError(
                "single step", "the kvm engine", f"engine {self.engine.name}", "use --engine kvm"
            )
        stepped = self._vcpu(vcpu)
        with self.stopped_vcpus():
            return self._single_step(self.engine.cores[vcpu], stepped)

    def _single_step(self, core: KvmVcpu, vcpu: Vcpu) -> Exit:
        core.single_step()
        try:
            while True:
                vm_exit = vcpu.run()
                if isinstance(vm_exit, Debug):
                    return vm_exit
                if not isinstance(vm_exit, Kicked) and self._handle_exit(vcpu, vm_exit) in (
                    Step.END,
                    Step.END_ALL,
                ):
                    self.runner.request_stop()
                    return vm_exit
        finally:
            core.single_step(False)

    def adopt(self, ended: set[int], statuses: Mapping[int, int], doorbells: list[int]) -> None:
        """Set the state of a snapshot that KVM does not hold; before :meth:`start`."""
        self._check_open()
        self.runner.mark_ended(ended)
        self._statuses = dict(statuses)
        for vcpu, count in zip(self.vcpus, doorbells, strict=True):
            vcpu.set_doorbells(count)

    @property
    def memory_faults(self) -> dict[int, MemoryFault]:
        """The faults in which vCPUs wait now, by index; see :attr:`waits_in_memory_faults`."""
        waiting = self.runner.waiting.items()
        return {index: exit_ for index, exit_ in waiting if isinstance(exit_, MemoryFault)}

    def wait_for_memory_faults(self, timeout_s: float | None = None) -> bool:
        """Wait until every vCPU waits in a memory fault or has ended; False on timeout.

        :raises StateError: before :meth:`start`, or after :meth:`close`
        """
        self._check_started()
        return self.runner.wait_waiting(timeout_s)

    def retry_memory_faults(self) -> None:
        """Let the vCPUs that wait in memory faults repeat their access: the mapping is back.

        :raises StateError: after :meth:`close`
        """
        self._check_open()
        self.runner.retry()

    @property
    def error(self) -> BaseException | None:
        """The error that ended the guest, if any."""
        return self._error

    def fail(self, error: BaseException) -> None:
        """End the machine with an error; :meth:`wait` raises it. Any thread."""
        self._error = self._error or error
        self.runner.give_up()

    def end_vcpus(self) -> None:
        """End every vCPU, in any state.

        :raises KvmHostError: if a vCPU's thread does not end
        """
        # After a fault that cannot be served, a long wait is useless.
        if self.runner.stop(timeout=0.5 if isinstance(self._error, PagerError) else 5.0):
            return
        # A thread may wait in the kernel for a page that cannot be restored: closing the
        # userfaultfd wakes it, and the stop request keeps it out of guest mode.
        self._release_trackers()
        self.paging.abandon()
        if not self.runner.stop(timeout=5.0):
            raise KvmHostError("a vCPU thread does not come back from guest mode")

    def console_text(self) -> str:
        """Return the guest's console output, up to 64 KiB."""
        return self.serial.text()

    def result(self, vcpu: int = 0) -> GuestResult:
        """Return a vCPU's result from the parameter page.

        :raises LayoutError: if there is no such vCPU
        """
        self._check_open()
        self._vcpu(vcpu)
        return read_result(self.memory, vcpu)

    @property
    def doorbells(self) -> int:
        """Doorbells of all vCPUs: for the tiny guests, epochs finished."""
        return sum(vcpu.doorbells for vcpu in self.vcpus)

    @property
    def exits(self) -> int:
        """Exits of all vCPUs."""
        return sum(vcpu.exits for vcpu in self.vcpus)

    @property
    def uptime_s(self) -> float:
        """Seconds since the start; 0 before it."""
        return (time.monotonic_ns() - self._started_ns) / 1e9 if self._started_ns else 0.0

    # -- exits ----------------------------------------------------------------

    def _handle_exit(self, vcpu: Vcpu, vm_exit: Exit) -> Step:
        if isinstance(vm_exit, IoOut):
            return self.handle_port_write(vcpu, vm_exit)
        if isinstance(vm_exit, IoIn):
            return self.handle_port_read(vcpu, vm_exit)
        if isinstance(vm_exit, MmioRead | MmioWrite):
            return self.handle_mmio(vcpu, vm_exit)
        if isinstance(vm_exit, MemoryFault):
            return self.handle_memory_fault(vcpu, vm_exit)
        raise self.describe_failure(vcpu, vm_exit)

    def _on_error(self, vcpu: Vcpu, error: BaseException) -> None:
        self._error = self._error or error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _release_trackers(self, closing: bool = False) -> None:
        """Stop the tracker, from any thread; with ``closing`` no harvest begins again."""

    def snapshot_parts(self) -> MachineParts:
        """Return what a snapshot holds of this kind of machine; its vCPUs are stopped.

        :raises CapabilityError: if this kind cannot be saved
        """
        raise CapabilityError(
            "snapshot", "a tiny guest or a pc", f"machine {self.kind}", "boot it anew"
        )

    # -- end ------------------------------------------------------------------

    def close(self) -> None:
        """Stop and free everything, in order. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "runner"):
            self.end_vcpus()
        if hasattr(self, "serial"):
            self.serial.flush(stall_s=0.2, total_s=0.5)
            self.serial.close()
        self._release_trackers(closing=True)
        with self._vcpu_access:
            for vcpu in self.vcpus:
                vcpu.close()
            self.engine.close()
        if hasattr(self, "paging"):
            self.paging.close()
        if hasattr(self, "memory"):
            self.memory.close()
