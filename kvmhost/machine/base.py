"""Base of all machines: what can be asked of one VM of any kind.

A kind of machine is one module with a subclass of :class:`BaseMachine`:
:mod:`kvmhost.machine.tiny` and :mod:`kvmhost.machine.pc` are the two that exist. Its
constructor checks image, sizes and options, and gives image, layout and engine to
:class:`BaseMachine`. It implements :meth:`BaseMachine.assemble` and overrides the
``handle_`` methods for the exits that mean something of their own on this kind.

The control server calls the methods of this module too, so that a client gets the same
results and errors as the process of the machine.
"""

from __future__ import annotations

import os
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from kvmhost.errors import StateError
from kvmhost.machine.runner import PAUSE_TIMEOUT_S
from kvmhost.machine.running import RunnableMachine
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT
from kvmhost.vm.checks import check_gfns, check_resident_max, check_view, range_within
from kvmhost.vm.harvest import Harvest, Harvestable, HarvestRequest
from kvmhost.vm.names import ACTUATORS, Actuator, check_name

if typing.TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvmhost.machine.memslots import Memslots
    from kvmhost.pager.pager import Gfns, Pager
    from kvmhost.pager.results import PageEvent, RestoreResult
    from kvmhost.pager.userfault import Userfault
    from kvmhost.trackers.base import TrackedVm, Tracker
    from kvmhost.trackers.harvesting import Harvester
    from kvmhost.trackers.views import ViewStatus
    from kvmhost.vm.answers import (
        Counters,
        DropReport,
        EvictReport,
        LimitState,
        MemoryMap,
        Page,
        RearmCost,
        RestoreReport,
        RunState,
        ViewInfo,
        VmState,
    )

__all__ = ["BaseMachine"]


class BaseMachine(RunnableMachine, Harvestable):
    """One VM of any kind; it implements :class:`~kvmhost.vm.protocol.Vm`.

    The constructor is that of :class:`~kvmhost.machine.running.RunnableMachine`.
    """

    _harvester: Harvester | None = None
    _memslots: Memslots | None = None

    # -- running ----------------------------------------------------------------

    def pause(self, timeout_s: float = PAUSE_TIMEOUT_S) -> RunState:
        """Stop guest code on every vCPU; return when all have stopped. Pauses nest.

        Works before :meth:`start` and after the end. Any thread.

        :raises PauseTimeout: if a vCPU does not stop in time; then nothing is paused
        """
        self._check_open()
        self.runner.pause(timeout_s)
        return self.run_state()

    def resume(self) -> RunState:
        """Undo one :meth:`pause`."""
        self._check_open()
        self.runner.resume()
        return self.run_state()

    def stop(self) -> RunState:
        """End the guest, in any state.

        :raises KvmHostError: if a vCPU's thread does not end
        """
        self.end_vcpus()
        return self.run_state()

    def run_state(self) -> RunState:
        """Return whether the guest runs, and whether it is paused."""
        from kvmhost.vm.answers import RunState

        return RunState(self.running, self.paused)

    def snapshot(
        self,
        path: str | Path,
        stop: bool = False,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Write a snapshot to a file; the machine is paused meanwhile and then resumes.

        The file appears whole or not at all.

        :param stop: end the guest instead, where the snapshot was taken
        :param cancelled: called between pieces of memory; if true, no file is written
        :return: bytes of memory in the file
        :raises CapabilityError: if the machine does not run on KVM
        :raises StateError: while its memslots differ from those that it was made with
        :raises PauseTimeout: if a vCPU does not stop in time
        :raises HostError: if the file cannot be written
        :raises LayoutError: if something that is not a regular file has its name
        :raises PagerError: if a page is lost; names its gfn
        """
        self._check_open()
        if self._memslots is not None and self._memslots.changed:
            raise StateError(
                self._title, "has other memslots than a restored one would", "put them back"
            )
        from kvmhost.machine.snapshot import save_machine

        return save_machine(self, Path(path), cancelled=cancelled, stop=stop)

    # -- state ------------------------------------------------------------------

    def state(self) -> VmState:
        """Return the state of the VM; of paused vCPUs also what they do."""
        self._check_open()
        return self.state_with(self.describe_vcpus() if self.still else {})

    def state_with(self, doing: Mapping[int, str]) -> VmState:
        """Return the state of the VM without asking the vCPUs what they do.

        :param doing: what :meth:`describe_vcpus` returned
        """
        self._check_open()
        from kvmhost.vm.answers import VcpuStatus, VmState

        return VmState(
            name=self.name,
            pid=os.getpid(),
            engine=self.engine.name,
            image=self.image.path,
            params=dict(self.params),
            running=self.running,
            paused=self.paused,
            status=self.status,
            error=None if self.error is None else str(self.error),
            uptime_s=self.uptime_s,
            vcpus=[
                VcpuStatus(v.index, v.exits, v.doorbells, v.epoch, doing.get(v.index))
                for v in self.vcpus
            ],
            exits=self.exits,
            doorbells=self.doorbells,
            mem_bytes=self.memory.n_pages * PAGE_BYTES,
            resident_bytes=self.memory.resident_bytes(),
            resident_max_bytes=self.resident_max_bytes,
            tracker=self.tracker_name,
            views=self._view_infos(),
        )

    def _view_infos(self) -> list[ViewInfo]:
        if self._harvester is None:
            return []
        from kvmhost.trackers.views import view_infos

        return view_infos(self._harvester.views(), time.monotonic_ns())

    def memory_map(self) -> MemoryMap:
        """Return the memslots and the pinned ranges."""
        self._check_open()
        from kvmhost.vm.answers import MemoryMap, MemslotInfo, PageRange

        memslots = [
            MemslotInfo(slot, r.gpa, r.n_bytes, r.gfn, r.n_pages, r.guest_address)
            for slot, r in enumerate(self.memory.regions)
            if r.attached
        ]
        pinned = [
            PageRange(gpa >> PAGE_SHIFT, -(-n_bytes // PAGE_BYTES))
            for gpa, n_bytes in self.layout.pinned_ranges
        ]
        return MemoryMap(PAGE_BYTES, self.memory.gfn_end, memslots, pinned)

    @property
    def memslots(self) -> Memslots:
        """The memslots: aliases, moves, deletions and protection under running vCPUs."""
        self._check_open()
        with self._opening:
            if self._memslots is None:
                from kvmhost.machine.memslots import Memslots

                pinned = self.layout.pinned_ranges
                self._memslots = Memslots(
                    self.memory, self.engine, self.paging, pinned, lambda: self._harvester
                )
            return self._memslots

    def counters(self) -> Counters:
        """Return all counters."""
        self._check_open()
        from kvmhost.vm.answers import Counters, HarvestTotals, MachineCounters

        machine = MachineCounters(
            self.exits,
            self.doorbells,
            self.uptime_s,
            self.memory.resident_bytes(),
            self.serial.n_bytes,
            self.serial.lost_bytes,
            self.runner.cpu_seconds(),
        )
        totals = HarvestTotals(0, 0, 0, 0, 0)
        if self._harvester is not None:
            totals = self._harvester.totals
        return Counters(machine, totals, self.open_pager().counters() if self.has_pager else None)

    def resident(self, gfn_start: int = 0, n_pages: int | None = None) -> npt.NDArray[np.bool_]:
        """Return which pages the memfds hold: ``[i]`` is gfn ``gfn_start + i``.

        :raises LayoutError: if the range ends beyond the memory
        """
        self._check_open()
        gfn_start, n_pages = range_within(gfn_start, n_pages, self.memory.gfn_end)
        return self.memory.resident_gfns(gfn_start, n_pages)

    def page(self, gfn: int) -> Page:
        """Return the state of one page.

        :raises LayoutError: if no memslot holds it
        """
        self._check_open()
        from kvmhost.vm.answers import Page

        self.memory.index_of_gfn(gfn)
        slot, region = next(
            (i, r) for i, r in enumerate(self.memory.regions) if r.gfn <= gfn < r.gfn + r.n_pages
        )
        offset = (gfn - region.gfn) << PAGE_SHIFT
        state, stored = "resident", 0
        if self.has_pager:
            state = self.open_pager().state(gfn).name.lower()
            stored = self.open_pager().stored_bytes(gfn)
        return Page(
            gfn=gfn,
            gpa=gfn << PAGE_SHIFT,
            slot=slot,
            slot_offset_bytes=offset,
            hva=region.guest_address + offset,
            pinned=any(
                gpa >> PAGE_SHIFT <= gfn < -(-(gpa + n_bytes) // PAGE_BYTES)
                for gpa, n_bytes in self.layout.pinned_ranges
            ),
            resident=bool(self.memory.resident_gfns(gfn, 1)[0]),
            state=state,
            stored_bytes=stored,
        )

    # -- harvests -----------------------------------------------------------------

    def tracked_vm(self) -> TrackedVm:
        """Return the parts of this VM that trackers use."""
        self._check_open()
        from kvmhost.trackers.base import TrackedVm

        return TrackedVm(self.memory, self.engine, self.tables_gpa, self.paging.open_userfault)

    def harvester(self) -> Harvester:
        """Return this VM's harvester, which owns its tracker; created at the first call."""
        self._check_open()
        with self._opening:
            if self._harvester is None:
                from kvmhost.trackers.harvesting import Harvester

                self._harvester = Harvester(self.tracked_vm(), self.paging.note_young)
            return self._harvester

    def use_tracker(self, name: str = "auto", *, force: bool = False) -> Tracker:
        """Return a started tracker; another one in use is stopped first.

        :param force: also while named views are open; what the tracker itself clears is missing
            in them
        :raises InUseError: if named views are open and another tracker is in use
        :raises CapabilityError: if it does not work on this host
        :raises LayoutError: for an unknown name
        """
        return self.harvester().use(name, force=force)

    @property
    def tracker_name(self) -> str | None:
        """The tracker in use; None before the first."""
        return None if self._harvester is None else self._harvester.tracker_name

    def run_harvest(self, asked: HarvestRequest, owner: int | None = None) -> Harvest:
        """Do a harvest, see :meth:`harvest`.

        :param owner: process that reads the view; None: this one
        """
        return self.harvester().harvest(asked, owner)

    def views(self) -> list[ViewStatus]:
        """Return the state of the views, the default one first; empty before the first harvest."""
        self._check_open()
        return [] if self._harvester is None else self._harvester.views()

    def rearm_cost(self) -> RearmCost:
        """Return what the touch of a re-armed page costs the guest, with the tracker in use.

        It is measured with a small VM of its own, and again when the figure is a minute old.

        :raises StateError: before the first harvest, when no tracker is in use
        """
        return self.harvester().rearm_cost()

    def close_view(self, name: str, owner: int | None = None) -> bool:
        """End a view; return whether it was open. A tracker that it forced is put back.

        :param owner: process that reads the view; None: this one
        """
        self._check_open()
        check_view(name)
        return self._harvester is not None and self._harvester.close_view(name, owner)

    def _release_trackers(self, closing: bool = False) -> None:
        """Stop the tracker, from any thread; with ``closing`` no harvest begins again."""
        if self._harvester is not None:
            if closing:
                self._harvester.close()
            else:
                self._harvester.stop()

    # -- pager --------------------------------------------------------------------

    @property
    def tables_gpa(self) -> int | None:
        """Root of the guest's page tables, if the VMM laid them out; None: the guest's own."""
        return None

    def open_userfault(self) -> Userfault:
        """Open the VM's userfaultfd, or return the open one.

        :raises CapabilityError: if the kernel has none, or forbids it
        """
        self._check_open()
        return self.paging.open_userfault()

    def open_pager(self) -> Pager:
        """Open the VM's pager, or return the open one; live tables and parameters are pinned.

        :raises CapabilityError: if there is no userfaultfd, or no such codec
        :raises LayoutError: if the store's file cannot be made
        """
        self._check_open()
        return self.paging.open_pager()

    @property
    def has_pager(self) -> bool:
        """Whether the pager is open."""
        return self.paging.has_pager

    def evict(
        self,
        gfns: Gfns,
        each: bool = False,
        *,
        actuator: Actuator = "store",
        event: PageEvent | None = None,
    ) -> EvictReport:
        """Evict pages in the given order; partial success is normal.

        :param each: also return every page's outcome
        :param actuator: ``store``, the pager's own, or ``swap``, the host's
        :param event: who decided so, for the pager's log of events; None: a request
        :raises LayoutError: if a gfn is in no memslot; then nothing was evicted
        :raises CapabilityError: if there is no userfaultfd, or no swap
        """
        self._check_open()
        check_name("actuator", actuator, ACTUATORS, "actuator")
        from kvmhost.memory.pagelist import page_list
        from kvmhost.pager.results import PageEvent
        from kvmhost.vm.answers import EvictReport

        pages = page_list(self.memory, gfns)
        pager = self.open_pager()
        if actuator == "swap":
            result = pager.page_out(pages)
        else:
            event = PageEvent.EVICTED_REQUEST if event is None else event
            result = pager.evict(pages, event=event)
        outcomes = result.outcomes.tobytes() if each else None
        return EvictReport(int(pages.gfns.size), result.by_name(), outcomes)

    def restore(self, gfn_start: int, n_pages: int = 1) -> RestoreReport:
        """Restore the evicted pages of a range; a failure does not stop the others.

        :raises LayoutError: if the range is not in one memslot
        """
        self._check_open()
        check_gfns(gfn_start, n_pages, least=1)
        self.memory.region_at(gfn_start << PAGE_SHIFT, n_pages << PAGE_SHIFT)
        return _report(self.open_pager().restore(gfn_start, n_pages))

    def drain(self) -> RestoreReport:
        """Restore all pages, remove the limit and the victim list; the VM keeps running."""
        self._check_open()
        from kvmhost.vm.answers import RestoreReport

        return _report(self.open_pager().drain()) if self.has_pager else RestoreReport(0)

    def drop(self, gfn_start: int, n_pages: int = 1) -> DropReport:
        """Discard pages that the guest declared free; they read as zeros.

        Pinned pages stay as they are. A client cannot ask for it: the pages' data is lost.

        :raises LayoutError: if the range is not in one memslot; then nothing was dropped
        """
        self._check_open()
        check_gfns(gfn_start, n_pages, least=1)
        from kvmhost.vm.answers import DropReport

        return DropReport(*self.paging.drop_by_outcome(gfn_start, n_pages))

    @property
    def resident_max_bytes(self) -> int:
        """The resident limit; 0: none."""
        self._check_open()
        return self.open_pager().resident_max_bytes if self.has_pager else 0

    def set_limit(self, resident_max_bytes: int) -> int:
        """Limit the resident bytes, 0 for no limit; return what is in force now.

        The limit acts at the next faults; it is rounded down to pages.

        :raises LayoutError: for less than a page
        """
        self._check_open()
        check_resident_max(resident_max_bytes)
        pager = self.open_pager()
        pager.set_limit(resident_max_bytes)
        return pager.resident_max_bytes

    def shrink(self, resident_max_bytes: int) -> LimitState:
        """Set the limit and evict down to it at once; return the resulting state.

        :raises LayoutError: for less than a page
        :raises PagerError: if it fails; then the old limit holds
        """
        self._check_open()
        from kvmhost.vm.answers import LimitState

        before = self.resident_max_bytes
        limit = self.set_limit(resident_max_bytes)
        try:
            result = self.open_pager().shrink()
        except BaseException:
            self.open_pager().set_limit(before)
            raise
        return LimitState(limit, result.evicted, result.over_pages)

    def set_victims(self, gfns: Gfns) -> int:
        """Set the pages to evict first at the limit, best candidates first; return their number.

        :raises LayoutError: if a gfn is in no memslot
        """
        self._check_open()
        from kvmhost.memory.pagelist import page_list

        pages = page_list(self.memory, gfns)
        self.open_pager().set_victims(pages)
        return int(pages.gfns.size)


def _report(result: RestoreResult) -> RestoreReport:
    from kvmhost.vm.answers import RestoreReport

    return RestoreReport(result.restored, result.lost, result.left)
