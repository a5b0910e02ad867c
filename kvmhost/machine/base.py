"""A machine: memory, engine, vCPUs, devices and pager of one VM, put together.

>>> from kvmhost.machine.base import Machine
>>> from kvmhost.guests import image_path
>>> with Machine(image_path("hello"), mem_bytes=4 << 20) as machine:  # doctest: +SKIP
...     machine.start()
...     machine.wait(timeout=5)
...     machine.console_text()
0
'hello from vCPU 0x0 of 0x1\\n'
"""

from __future__ import annotations

import threading
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmhost import engine as engines
from kvmhost.boot.image import Image, read_image
from kvmhost.boot.longmode import entry_state, lay_out_tables, write_tss
from kvmhost.boot.params import GuestResult, read_result, resolve_params, write_params
from kvmhost.closing import Closing
from kvmhost.devices.bus import DEBUG_EXIT_PORT, DOORBELL_PORT, EXIT_PORT, FREE_PORT, Bus
from kvmhost.devices.freelist import FreeList
from kvmhost.devices.serial import Serial
from kvmhost.engine.base import Engine, Vcpu
from kvmhost.errors import (
    CapabilityError,
    GuestTimeout,
    KvmHostError,
    LayoutError,
    PagerError,
    UnexpectedExit,
)
from kvmhost.exits import (
    Debug,
    Exit,
    IoIn,
    IoOut,
    Kicked,
    MmioRead,
    MmioWrite,
)
from kvmhost.machine.failures import outside_memory, registers_line, unexpected
from kvmhost.machine.runner import Runner, Step
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.memory.layout import (
    MAX_TINY_VCPUS,
    PAGE_BYTES,
    PAGE_SHIFT,
    Layout,
    TinyLayout,
)

if typing.TYPE_CHECKING:
    from kvmhost.pager import Pager, Userfault
    from kvmhost.pager.options import StoreOptions
    from kvmhost.trackers import Tracker
    from kvmhost.trackers.harvesting import Harvest, Harvester

__all__ = ["Machine"]


class NamedImage(typing.Protocol):
    """Any image: where it came from."""

    @property
    def path(self) -> str:
        """The file, for messages."""


class Machine(Closing):
    """One VM with a tiny guest in it.

    :param image: path of an image, or a parsed one
    :param mem_bytes: guest memory, a multiple of 4 KiB
    :param engine: ``auto``, ``kvm`` or ``emulated``
    :param params: values for the image's parameters
    :param console_fd: descriptor that gets the guest's serial output; -1: none
    :param store: what the pager's store is to be
    :param dirty_ring_entries: give each vCPU a dirty ring of so many entries, which the
        tracker ``dirty`` then uses instead of the dirty log; 0: none
    :raises ImageError: if the image cannot be used
    :raises LayoutError: if sizes, counts or parameters do not fit
    :raises CapabilityError: if the engine is not to be had
    """

    def __init__(
        self,
        image: Path | str | Image,
        *,
        mem_bytes: int = 64 << 20,
        n_vcpus: int = 1,
        engine: str = "auto",
        params: Mapping[str, int] | None = None,
        console_fd: int = -1,
        name: str = "",
        store: StoreOptions | None = None,
        dirty_ring_entries: int = 0,
    ) -> None:
        self.name = name
        self.n_vcpus = n_vcpus
        self.params: dict[str, int] = {}
        self._plan(image, mem_bytes, params or {})
        self._store_options = store
        self._statuses: dict[int, int] = {}
        self._error: BaseException | None = None
        self._userfault: Userfault | None = None
        self._pager: Pager | None = None
        self._tracker: Tracker | None = None
        self._lock = threading.RLock()
        self._harvesting = threading.Lock()
        self._harvester: Harvester | None = None
        self._started_ns = 0
        self._closed = False
        self.vcpus: list[Vcpu] = []
        self.engine = self._choose_engine(engine)
        try:
            self.memory = GuestMemory(
                [Region(gpa, n_bytes, name or "guest") for gpa, n_bytes in self.layout.regions]
            )
            if dirty_ring_entries:
                self._enable_dirty_ring(dirty_ring_entries)
            if n_vcpus > self.engine.max_vcpus():
                raise LayoutError(
                    f"{n_vcpus} vCPUs: the {self.engine.name} engine has {self.engine.max_vcpus()}"
                )
            self.serial = Serial(console_fd)
            self.bus = Bus()
            self.bus.add_serial(self.serial)
            self._assemble()
        except BaseException:
            self.close()
            raise
        self._runner = Runner(self.vcpus, self._on_exit, self._on_error)

    #: Memory layout; a kind of machine has its own.
    layout: Layout
    #: The image, for reports.
    image: NamedImage

    def _plan(self, image: Path | str | Image, mem_bytes: int, params: Mapping[str, int]) -> None:
        """Check image, sizes and parameters before anything is made."""
        self._tiny = image if isinstance(image, Image) else read_image(Path(image))
        self._tiny_layout = TinyLayout(mem_bytes)
        self.image, self.layout = self._tiny, self._tiny_layout
        self.params = resolve_params(self._tiny, params)
        if not 1 <= self.n_vcpus <= MAX_TINY_VCPUS:
            raise LayoutError(f"{self.n_vcpus} vCPUs: a tiny guest takes 1 to {MAX_TINY_VCPUS}")

    def _choose_engine(self, name: str) -> Engine:
        return engines.choose(name)

    def _assemble(self) -> None:
        """Fill memory, put devices on the bus and create the vCPUs."""
        image, layout = self._tiny, self._tiny_layout
        self.bus.add_doorbell()
        self.bus.add_port(FREE_PORT, 4, FreeList(self))
        image.load(self.memory, layout.tables_gpa)
        write_params(self.memory, layout, image, self.n_vcpus, self.params)
        write_tss(self.memory)
        lay_out_tables(self.memory, layout)
        self.engine.attach(self.memory, self.bus)
        for index in range(self.n_vcpus):
            state = entry_state(layout, image.entry, index)
            self.vcpus.append(self.engine.create_vcpu(index, state))

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
        if paused:
            self._runner.pause_at_start()
        self._started_ns = time.monotonic_ns()
        self._runner.start()

    def pause(self) -> None:
        """Stop guest code on every vCPU; return when all stand still. Pauses nest."""
        self._runner.pause()

    def resume(self) -> None:
        """Undo one :meth:`pause`."""
        self._runner.resume()

    @property
    def paused(self) -> bool:
        """Whether the vCPUs are held back."""
        return self._runner.paused

    @property
    def running(self) -> bool:
        """Whether a vCPU has yet to end."""
        return self._started_ns > 0 and not self._runner.ended

    def step_by_doorbell(self, stop: bool = True) -> None:
        """Make each vCPU stop at its doorbells, for :meth:`run_epoch`."""
        for vcpu in self.vcpus:
            vcpu.stop_at_doorbell(stop)
        if not stop:
            self._runner.release()

    def run_epoch(self, timeout: float = 60.0) -> bool:
        """Run every vCPU to its next doorbell.

        Needs :meth:`step_by_doorbell`. The first call starts the machine.

        :return: False if the guest has ended instead
        :raises GuestTimeout: if a vCPU does not get there in time
        :raises GuestError: if the guest failed
        """
        if not self._started_ns:
            self.start()
        else:
            self._runner.release()
        if not self._runner.wait_held(timeout):
            raise GuestTimeout(timeout)
        self._raise_error()
        return not self._runner.ended

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the guest's end and return its status.

        :raises GuestTimeout: if it still runs after ``timeout`` seconds
        :raises GuestError: if a vCPU ended in a way that its contract does not know
        """
        if not self._runner.wait_ended(timeout):
            raise GuestTimeout(timeout or 0.0)
        self.serial.flush()
        self._raise_error()
        return self.status or 0

    @property
    def status(self) -> int | None:
        """The guest's exit status: the first that is not 0; None before any exit."""
        if not self._statuses:
            return None
        return next((s for _, s in sorted(self._statuses.items()) if s), 0)

    def describe_vcpu(self, index: int) -> str:
        """Return what a vCPU does and where; it must not run."""
        what = "ended" if index in self.ended_vcpus else "stands"
        return f"vCPU {index} {what}: {registers_line(self.vcpus[index].registers())}"

    def describe_vcpus(self) -> dict[int, str]:
        """Return :meth:`describe_vcpu` of all, by index; the machine must be paused."""
        return {vcpu.index: self.describe_vcpu(vcpu.index) for vcpu in self.vcpus}

    @property
    def statuses(self) -> dict[int, int]:
        """What vCPUs have reported so far, by index."""
        return dict(self._statuses)

    @property
    def ended_vcpus(self) -> set[int]:
        """Indexes of the vCPUs that have ended."""
        return self._runner.ended_vcpus

    def settle(self) -> None:
        """Finish what a paused vCPU has begun: the access that its last exit was about.

        Only then KVM's registers are whole. The machine must be paused.
        """
        for vcpu in self.vcpus:
            if vcpu.index not in self.ended_vcpus:
                vcpu.kick()
                while not isinstance(leaving := vcpu.run(), Kicked):
                    if self._on_exit(vcpu, leaving) in (Step.END, Step.END_ALL):
                        raise KvmHostError(f"vCPU {vcpu.index} ended while it was paused")

    def single_step(self, index: int = 0) -> Exit:
        """Run one instruction of a vCPU; the machine must be paused, on the kvm engine.

        :return: :class:`~kvmhost.exits.Debug`, or the exit that the instruction caused
            and that ends the guest
        :raises CapabilityError: on another engine
        """
        from kvmhost.engine.kvm import KvmEngine

        if not isinstance(self.engine, KvmEngine):
            raise CapabilityError(
                "single step", "the kvm engine", f"engine {self.engine.name}", "use --engine kvm"
            )
        core, vcpu = self.engine.cores[index], self.vcpus[index]
        core.single_step()
        try:
            while True:
                leaving = vcpu.run()
                if isinstance(leaving, Debug):
                    return leaving
                if not isinstance(leaving, Kicked) and self._on_exit(vcpu, leaving) in (
                    Step.END,
                    Step.END_ALL,
                ):
                    self._runner.request_stop()
                    return leaving
        finally:
            core.single_step(False)

    def adopt(self, ended: set[int], statuses: Mapping[int, int], doorbells: list[int]) -> None:
        """Take over from a snapshot what is not in KVM; before :meth:`start`."""
        self._runner.mark_ended(ended)
        self._statuses = dict(statuses)
        for vcpu, count in zip(self.vcpus, doorbells, strict=True):
            vcpu.set_doorbells(count)

    @property
    def error(self) -> BaseException | None:
        """What ended the guest against its will."""
        return self._error

    def fail(self, error: BaseException) -> None:
        """End the machine with an error; :meth:`wait` raises it. Any thread."""
        self._error = self._error or error
        self._runner.give_up()

    def stop(self) -> None:
        """End every vCPU, wherever it is.

        :raises KvmHostError: if a vCPU's thread does not come back
        """
        # After a fault that nobody serves there is no use in waiting long.
        if self._runner.stop(timeout=0.5 if isinstance(self._error, PagerError) else 5.0):
            return
        # A thread that waits in the kernel for a page that will not come: closing the
        # userfaultfd lets it go, and the stop request keeps it out of guest mode.
        if self._tracker is not None:
            self._tracker.stop()
        if self._userfault is not None:
            if self._pager is not None:
                self._pager.stop()
            self._userfault.close()
        if not self._runner.stop(timeout=5.0):
            raise KvmHostError("a vCPU thread does not come back from guest mode")

    def console_text(self) -> str:
        """Return what the guest printed, up to 64 KiB."""
        return self.serial.text()

    def result(self, vcpu: int = 0) -> GuestResult:
        """Return what a vCPU left in the parameter page."""
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

    # -- memory ---------------------------------------------------------------

    @property
    def userfault(self) -> Userfault:
        """The VM's userfaultfd, opened on first use.

        :raises CapabilityError: if it cannot be had
        """
        with self._lock:
            if self._userfault is None:
                from kvmhost.pager import Userfault

                self._userfault = Userfault()
            return self._userfault

    @property
    def pager(self) -> Pager:
        """The VM's pager, made on first use; live tables and parameters are pinned.

        :raises CapabilityError: if there is no userfaultfd
        """
        with self._lock:
            if self._pager is None:
                from kvmhost.pager import Pager

                pager = Pager(
                    self.memory,
                    self.userfault,
                    self._store_options,
                    on_failure=self.fail,
                )
                for gpa, n_bytes in self.layout.pinned_ranges:
                    pager.pin(gpa >> PAGE_SHIFT, -(-n_bytes // PAGE_BYTES))
                self._pager = pager
            return self._pager

    def drop(self, gfn: int, n_pages: int) -> int:
        """Forget pages that the guest declared free; return how many will read as zeros.

        Pinned pages stay as they are.

        :raises LayoutError: if the range is not in one region; then nothing was dropped
        """
        with self._lock:
            if self._pager is None:
                return self.memory.punch(gfn, n_pages, self.layout.pinned_ranges)
        return self._pager.drop(gfn, n_pages).dropped

    @property
    def has_pager(self) -> bool:
        """Whether anyone has asked for the pager yet."""
        return self._pager is not None

    def use_tracker(self, name: str = "auto") -> Tracker:
        """Return a started tracker; another one in use is stopped first.

        :raises CapabilityError: if it does not work here
        :raises LayoutError: for an unknown name
        """
        from kvmhost import trackers

        with self._lock:
            wanted = trackers.resolve(name, self)
            if self._tracker is not None and self._tracker.name != wanted:
                self._tracker.stop()
                self._tracker = None
            if self._tracker is None:
                tracker = trackers.create(wanted, self)
                try:
                    tracker.start()
                except BaseException:
                    tracker.stop()
                    raise
                self._tracker = tracker
            return self._tracker

    @property
    def tracker_name(self) -> str | None:
        """The tracker in use; None before the first."""
        return None if self._tracker is None else self._tracker.name

    def harvest(self, gfn_start: int, n_pages: int, **how: Any) -> Harvest:
        """Return the young pages of a range; one call works at a time.

        :param how: as :meth:`~kvmhost.trackers.harvesting.Harvester.harvest` has it
        :raises CapabilityError: if the tracker does not work here
        :raises LayoutError: if range, mask or names are wrong
        """
        from kvmhost.trackers.harvesting import Harvester

        with self._harvesting:
            self._harvester = self._harvester or Harvester(self)
            return self._harvester.harvest(gfn_start, n_pages, **how)

    # -- exits ----------------------------------------------------------------

    def _on_exit(self, vcpu: Vcpu, leaving: Exit) -> Step:
        if isinstance(leaving, IoOut):
            return self._port_write(vcpu, leaving)
        if isinstance(leaving, IoIn):
            return self._port_read(vcpu, leaving)
        if isinstance(leaving, MmioRead | MmioWrite):
            return self._mmio(vcpu, leaving)
        raise self._unexpected(vcpu, leaving)

    def _port_read(self, vcpu: Vcpu, leaving: IoIn) -> Step:
        vcpu.complete_read(self.bus.read_port(leaving))
        return Step.GO_ON

    def _port_write(self, vcpu: Vcpu, leaving: IoOut) -> Step:
        if leaving.port == EXIT_PORT:
            self._statuses[vcpu.index] = leaving.value & 0xFF
            return Step.END
        if leaving.port == DEBUG_EXIT_PORT:
            self._statuses[vcpu.index] = (leaving.value << 1 | 1) & 0xFF
            return Step.END_ALL
        if leaving.port == DOORBELL_PORT:
            return Step.HOLD
        self.bus.write_port(leaving)
        return Step.GO_ON

    def _mmio(self, vcpu: Vcpu, leaving: MmioRead | MmioWrite) -> Step:
        found = self.bus.mmio_handler(leaving.gpa)
        if found is None:
            raise outside_memory(vcpu, leaving)
        device, offset = found
        if isinstance(leaving, MmioRead):
            value = device.read(offset, leaving.size)
            vcpu.complete_read(value.to_bytes(leaving.size, "little"))
        else:
            device.write(offset, len(leaving.data), int.from_bytes(leaving.data, "little"))
        return Step.GO_ON

    def _unexpected(self, vcpu: Vcpu, leaving: Exit) -> UnexpectedExit:
        return unexpected(vcpu, leaving)

    def _on_error(self, vcpu: Vcpu, error: BaseException) -> None:
        self._error = self._error or error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # -- end ------------------------------------------------------------------

    def close(self) -> None:
        """Stop and free everything, in order. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_runner"):
            self.stop()
        if self._tracker is not None:
            self._tracker.stop()
        for vcpu in self.vcpus:
            vcpu.close()
        self.engine.close()
        if self._pager is not None:
            self._pager.close()
        if self._userfault is not None:
            self._userfault.close()
        if hasattr(self, "memory"):
            self.memory.close()
