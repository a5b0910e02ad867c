"""The phases: what the host does between two rendezvous, the times, and what has to hold.

Between two phases every vCPU waits at its doorbell. A phase is timed from the release of the
vCPUs to the arrival of the last one, as in the kernel's test; what the host does to memory
meanwhile is part of it.
"""

from __future__ import annotations

import dataclasses
import time
import typing
from collections.abc import Callable

import numpy as np

from kvmhost.errors import GuestTimeout
from kvmhost.memory.layout import HIGH_GPA
from kvmhost.tools.stress.machine import MARKER, PROBED, StressMachine
from kvmhost.units import PAGE_BYTES

__all__ = ["PHASES", "Check", "StressPhase", "run_phases"]

#: In order; the first five are those of the kernel's test.
PHASES = {
    "run1": "write all of memory",
    "reset": "change registers so that KVM drops all roots",
    "run2": "write all of memory again",
    "ro": "mprotect read-only while vCPUs read and then write",
    "ro-check": "one pass of writes, each of which has to fault",
    "rw": "mprotect writable, write all of memory",
    "slots": "delete every other memslot while vCPUs write the rest",
    "unmap": "unmap half of the piece while vCPUs write",
    "unmap-check": "one pass of writes, which have to fault in that half",
    "remap": "map it again, write all",
    "release": "close the VM with its memory mapped",
}


@dataclasses.dataclass(frozen=True)
class StressPhase:
    """One phase that was run.

    :param n_faults: times that KVM_RUN failed with EFAULT
    """

    name: str
    taken_s: float
    n_faults: int = 0


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that has to hold, and whether it did.

    :param detail: what was found
    """

    name: str
    ok: bool
    detail: str


class _Run:
    """Runs the phases on one machine."""

    def __init__(self, machine: StressMachine, timeout_s: float) -> None:
        self.machine, self.sizes = machine, machine.sizes
        self.phases: list[StressPhase] = []
        self.checks: list[Check] = []
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s

    def timed(self, name: str, meanwhile: Callable[[], None] | None = None) -> list[int]:
        """Release the vCPUs, do something, wait for all; return the faults by vCPU."""
        machine = self.machine
        before, start = machine.faults(), time.perf_counter()
        machine.runner.release()
        if meanwhile is not None:
            meanwhile()
        self.arrive()
        return self.note(name, start, before)

    def note(self, name: str, start: float, before: list[int]) -> list[int]:
        """Note a phase that ends now; return its faults by vCPU."""
        taken = time.perf_counter() - start
        faults = [now - then for now, then in zip(self.machine.faults(), before, strict=True)]
        self.phases.append(StressPhase(name, taken, sum(faults)))
        return faults

    def arrive(self) -> None:
        """Wait until every vCPU is at its doorbell.

        :raises GuestTimeout: if one is not there in time
        :raises GuestError: if the guest failed
        """
        self._wait(self.machine.runner.wait_held)
        if self.machine.error is not None:
            raise self.machine.error

    def arrive_in_faults(self) -> None:
        """Wait until every vCPU waits in a memory fault; raises as :meth:`arrive`."""
        self._wait(self.machine.wait_for_memory_faults)
        if self.machine.error is not None:
            raise self.machine.error

    def _wait(self, wait: Callable[[float], bool]) -> None:
        if not wait(max(0.0, self._deadline - time.monotonic())):
            raise GuestTimeout(self._timeout_s)

    def check(self, name: str, ok: bool, detail: str) -> None:
        """Note whether something holds."""
        self.checks.append(Check(name, ok, detail))

    def check_faults(self, name: str, found: list[int], **which: int) -> None:
        """Check that each vCPU had one fault for each page of a kind."""
        wanted = [self.sizes.n_pages(vcpu, **which) for vcpu in range(self.sizes.n_vcpus)]
        self.check(name, found == wanted, f"{sum(found):,} faults of {sum(wanted):,} writes")


def run_phases(
    machine: StressMachine, timeout_s: float, say: Callable[[str], None] = lambda name: None
) -> tuple[list[StressPhase], list[Check]]:
    """Run all phases; the machine is closed at the end of the last one.

    :param say: called with the name of each step
    :raises GuestTimeout: if they take longer
    :raises GuestError: if the guest failed
    """
    run = _Run(machine, timeout_s)
    for step in (_write_twice, _read_only, _slots, _unmap, _release):
        say(step.__name__.removeprefix("_").replace("_", " "))
        step(run)
    return run.phases, run.checks


def _write_twice(run: _Run) -> None:
    machine = run.machine
    machine.step_by_doorbell()
    start, before = time.perf_counter(), machine.faults()
    machine.start()
    run.arrive()
    run.note("run1", start, before)
    start = time.perf_counter()
    with machine.stopped_vcpus():
        for vcpu in machine.vcpus:
            vcpu.reset_mmu()
    run.note("reset", start, machine.faults())
    run.timed("run2")
    run.check("run2 arrived", *_all_written(machine))


def _read_only(run: _Run) -> None:
    if run.machine.stops:
        _stop_at_first_fault(run)
    else:
        _skip_faults(run)
    run.check("rw arrived", *_all_written(run.machine))


def _protect(machine: StressMachine, access: typing.Literal["read", "write"]) -> None:
    machine.memslots.protect(HIGH_GPA, machine.sizes.slot_bytes, access)


def _skip_faults(run: _Run) -> None:
    machine = run.machine
    machine.skip_stores()

    def protect() -> None:
        _protect(machine, "read")
        machine.set_argument("ro_done", 1)

    run.timed("ro", protect)
    run.check_faults("ro: every write faults", run.timed("ro-check"))
    marked = int((_words(machine) == MARKER).sum())
    run.check("ro: no write arrived", marked == 0, f"{marked:,} pages were written")
    machine.skip_stores(False)
    machine.waits_in_memory_faults = True

    def unprotect() -> None:
        _protect(machine, "write")
        machine.retry_memory_faults()

    run.timed("rw", unprotect)
    machine.waits_in_memory_faults = False


def _stop_at_first_fault(run: _Run) -> None:
    machine = run.machine
    before, start = machine.faults(), time.perf_counter()
    machine.runner.release()
    _protect(machine, "read")
    machine.set_argument("ro_done", 1)
    run.arrive_in_faults()
    run.note("ro", start, before)
    stopped = machine.memory_faults
    for vcpu, fault in sorted(stopped.items()):
        low, high = run.sizes.part(vcpu)
        gpa = -1 if fault.gpa is None else fault.gpa - HIGH_GPA
        ok = low <= gpa < high and fault.is_write is True and fault.rip == machine.result(0).word
        run.check(f"ro: vCPU {vcpu} stopped at a write of its own", ok, repr(fault))
    run.check("ro: every vCPU stopped", len(stopped) == run.sizes.n_vcpus, f"{len(stopped)}")
    before, start = machine.faults(), time.perf_counter()
    _protect(machine, "write")
    machine.retry_memory_faults()
    run.arrive()
    run.note("rw", start, before)
    machine.waits_in_memory_faults = False


def _slots(run: _Run) -> None:
    machine = run.machine

    def delete() -> None:
        for slot in machine.memslots.list():
            if slot.is_alias and (slot.gpa - HIGH_GPA) // run.sizes.slot_bytes % 2:
                machine.memslots.delete(slot.number)
        machine.set_argument("slots_done", 1)

    faults = run.timed("slots", delete)
    run.check("slots: no fault in the others", sum(faults) == 0, f"{sum(faults):,} faults")
    if machine.probe_gpa:
        found = {machine.result(vcpu).found for vcpu in range(run.sizes.n_vcpus)}
        ok = found == {PROBED} and machine.n_probes == run.sizes.n_vcpus
        run.check("slots: a deleted one is gone", ok, f"{machine.n_probes} exits for MMIO")


def _unmap(run: _Run) -> None:
    machine, n_bytes = run.machine, run.sizes.unmapped_bytes
    by_pager = machine.paging.is_armed

    def unmap() -> None:
        if by_pager:  # unmapping would end its registration
            machine.memslots.protect(HIGH_GPA, n_bytes, "none")
        else:
            machine.memslots.unmap(HIGH_GPA, n_bytes)
        machine.set_argument("unmap_done", 1)

    def remap() -> None:
        if by_pager:
            machine.memslots.protect(HIGH_GPA, n_bytes, "write")
        else:
            machine.memslots.remap(HIGH_GPA, n_bytes)

    machine.skip_stores()
    run.timed("unmap", unmap)
    checked = run.timed("unmap-check")
    which = {"every_other": 1, "unmapped": 1, "stride": run.sizes.stride}
    run.check_faults("unmap: every write faults", checked, **which)
    # Before the release: how far a vCPU comes before the mapping is back is not determined.
    remap()
    faults = run.timed("remap")
    run.check("remap: no fault", sum(faults) == 0, f"{sum(faults):,} faults")
    run.check("remap arrived", *_all_written(machine))


def _release(run: _Run) -> None:
    start = time.perf_counter()
    run.machine.close()
    run.phases.append(StressPhase("release", time.perf_counter() - start))


def _words(machine: StressMachine) -> np.ndarray[typing.Any, np.dtype[np.uint64]]:
    """Return a copy of the first word of each page of the piece."""
    n_pages = machine.sizes.slot_bytes // PAGE_BYTES
    whole = machine.memory.array(HIGH_GPA, (n_pages, PAGE_BYTES // 8), "<u8")
    return np.array(whole[:, 0])


def _all_written(machine: StressMachine) -> tuple[bool, str]:
    """Whether each page of the piece holds the gpa of one of its aliases."""
    words, sizes = _words(machine), machine.sizes
    pages = np.arange(words.size, dtype=np.uint64) * np.uint64(PAGE_BYTES)
    offsets = words - np.uint64(HIGH_GPA)
    right = (offsets < np.uint64(sizes.span_bytes)) & (
        offsets % np.uint64(sizes.slot_bytes) == pages
    )
    # Pages that no vCPU has: what is left where the span is not divisible by the vCPUs.
    end = sizes.part(sizes.n_vcpus - 1)[1]
    if end < sizes.slot_bytes:
        right[end // PAGE_BYTES :] = True
    n_wrong = int((~right).sum())
    return n_wrong == 0, f"{n_wrong:,} pages hold something else"
