"""What a VM answers: state, memory, counters, and the results of what was asked of it.

A machine returns these structures, and so does its client, over whose socket they go as JSON.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = [
    "Answer",
    "Counters",
    "DropReport",
    "EvictReport",
    "HarvestTotals",
    "LeaseInfo",
    "LimitState",
    "MachineCounters",
    "MemoryMap",
    "MemslotInfo",
    "Page",
    "PageRange",
    "RearmCost",
    "RestoreReport",
    "RunState",
    "VcpuStatus",
    "ViewInfo",
    "VmState",
]


class Answer(msgspec.Struct, frozen=True):
    """Base of the messages that a server sends; clients ignore fields of newer servers."""


class VcpuStatus(Answer, frozen=True):
    """One vCPU."""

    vcpu: int
    """its number"""
    exits: int
    """exits to the VMM"""
    doorbells: int
    """writes to the doorbell port"""
    epoch: int
    """the value of its last doorbell"""
    doing: str | None = None
    """its activity and registers while the VM is paused, else null"""


class LeaseInfo(Answer, frozen=True):
    """The holder of a VM's lease."""

    holder: str
    """its own description"""
    pid: int
    """its process"""
    socket: str
    """its own control socket; empty if it has none"""
    ttl_s: float
    """time without a request after which the lease ends"""
    held_s: float
    """time since it took the lease"""
    silent_s: float
    """time since its last request"""


class ViewInfo(Answer, frozen=True):
    """A view of the young pages: the window of one reader."""

    name: str
    """the view"""
    pid: int
    """the reader's process; 0 for the default view, which anyone may read"""
    process: str
    """name of that process"""
    window_s: float
    """time since its oldest window began"""
    n_young: int
    """pages that were swept in the window and not yet taken"""
    harvests: int
    """harvests of this view so far"""


class VmState(Answer, frozen=True):
    """Answer of ``GET /v1/state``."""

    name: str
    """the VM"""
    pid: int
    """its process"""
    engine: str
    """what runs its vCPUs: kvm or emulated"""
    image: str
    """the file that was loaded"""
    params: dict[str, int]
    """the guest's parameters"""
    running: bool
    """whether the guest has started and not ended"""
    paused: bool
    """whether its vCPUs are held"""
    status: int | None
    """its exit status; null before it exits"""
    error: str | None
    """why it failed, else null"""
    uptime_s: float
    """time since the start"""
    vcpus: list[VcpuStatus]
    """its vCPUs"""
    exits: int
    """exits to the VMM, of all vCPUs"""
    doorbells: int
    """writes to the doorbell port, of all vCPUs"""
    mem_bytes: int
    """guest memory"""
    resident_bytes: int
    """guest memory that the memfds hold now"""
    resident_max_bytes: int
    """the resident limit; 0 for none"""
    tracker: str | None
    """the tracker in use; null before the first harvest"""
    lease: LeaseInfo | None = None
    """the holder of the lease; null if it is free"""
    views: list[ViewInfo] = []
    """the readers: one view each"""


class PageRange(Answer, frozen=True):
    """Pages ``[gfn_start, gfn_start + n_pages)``."""

    gfn_start: int
    """the first page"""
    n_pages: int
    """number of pages"""


class MemslotInfo(Answer, frozen=True):
    """One memslot."""

    slot: int
    """its number"""
    gpa: int
    """its first guest physical address"""
    n_bytes: int
    """its size"""
    gfn_start: int
    """its first page"""
    n_pages: int
    """number of pages"""
    hva: int
    """its address in the guest mapping of the VM process"""


class MemoryMap(Answer, frozen=True):
    """Answer of ``GET /v1/memory``."""

    page_bytes: int
    """size of a page"""
    gfn_end: int
    """the first gfn above all memslots"""
    memslots: list[MemslotInfo]
    """the memslots, in order"""
    pinned: list[PageRange]
    """pages that are never evicted: live page tables and parameters"""


class Page(Answer, frozen=True):
    """Answer of ``GET /v1/pages/GFN``."""

    gfn: int
    """the page"""
    gpa: int
    """its guest physical address"""
    slot: int
    """its memslot"""
    slot_offset_bytes: int
    """where it lies in the memslot"""
    hva: int
    """its address in the guest mapping of the VM process"""
    pinned: bool
    """whether it is never evicted"""
    resident: bool
    """whether the memfd holds it now"""
    state: str
    """resident, evicted, lost, swapped, or fresh (never touched)"""
    stored_bytes: int
    """its size in the store; 0 if it is not there"""


class EvictReport(Answer, frozen=True):
    """Answer of ``POST /v1/evict``."""

    n_pages: int
    """pages of the request"""
    outcomes: dict[str, int]
    """pages by outcome: ``done``, ``pinned``, ``absent``, …"""
    each: bytes | None = None
    """with ``each=1`` one byte per page of the request, its ``EvictOutcome``; else null"""

    @property
    def done(self) -> int:
        """Pages that were evicted."""
        return self.outcomes.get("done", 0)


class RestoreReport(Answer, frozen=True):
    """Answer of ``POST /v1/restore`` and ``POST /v1/drain``: evicted pages of the range."""

    restored_pages: int
    """pages that are resident again"""
    lost_pages: int = 0
    """pages that the store could not give back; they are still evicted"""
    left_pages: int = 0
    """pages that are still evicted because the host had no memory for them"""


class DropReport(Answer, frozen=True):
    """Result of a drop: pages that the guest declared free."""

    dropped_pages: int
    """pages that read as zeros now"""
    pinned_pages: int = 0
    """pages that stay as they are: live page tables and parameters"""
    failed_pages: int = 0
    """pages that could not be discarded"""


class LimitState(Answer, frozen=True):
    """Answer of ``PUT /v1/limit``."""

    resident_max_bytes: int
    """the limit in force, rounded down to pages; 0 is no limit"""
    evicted_pages: int
    """pages that were evicted to reach the limit"""
    over_pages: int = 0
    """resident pages above the limit, because no further page can be evicted"""


class RunState(Answer, frozen=True):
    """Answer of ``POST /v1/pause``, ``resume`` and ``stop``."""

    running: bool
    """whether the guest has started and not ended"""
    paused: bool
    """whether its vCPUs are held"""
    pause: int | None = None
    """the number of the pause that was begun, else null"""


class MachineCounters(Answer, frozen=True):
    """Counts since the start of the VM."""

    exits: int
    """exits to the VMM, of all vCPUs"""
    doorbells: int
    """writes to the doorbell port, of all vCPUs"""
    uptime_s: float
    """time since the start"""
    resident_bytes: int
    """guest memory that the memfds hold now"""
    serial_bytes: int = 0
    """output of the serial port"""
    serial_lost_bytes: int = 0
    """output that was dropped because no reader read it in time"""
    vcpu_s: float = 0.0
    """processor time of the vCPU threads that have not ended"""


class HarvestTotals(Answer, frozen=True):
    """Number and total cost of the harvests of the VM."""

    harvests: int
    """number of harvests"""
    n_pages: int
    """sum of the pages tested"""
    n_young: int
    """sum of the young pages found"""
    harvest_ns: int
    """time spent testing and clearing"""
    rearm_ns: int
    """time spent re-arming"""
    sweeps: int = 0
    """harvests that cleared accessed bits, of all readers"""
    n_cleared: int = 0
    """pages that sweeps cleared: each costs the guest a fault if it is touched again"""
    n_retouched: int = 0
    """cleared pages that a later sweep found young again: each cost the guest a fault"""


class RearmCost(Answer, frozen=True):
    """Answer of ``GET /v1/rearm_cost``: what the touch of a re-armed page costs the guest."""

    tracker: str
    """the tracker that cleared the pages"""
    fault_ns: float
    """time of a vCPU for each page that is touched again, beyond that of a plain touch"""
    waits: bool
    """whether the fault is answered by another thread, so that the wait is part of the cost"""
    n_pages: int
    """pages of the guest that measured it, touched once in each try"""
    tries: int
    """tries; the cost is their median"""
    age_s: float
    """time since it was measured"""


class Counters(Answer, frozen=True):
    """Answer of ``GET /v1/counters``."""

    machine: MachineCounters
    """the VM"""
    harvest: HarvestTotals
    """its harvests"""
    pager: dict[str, Any] | None
    """counters of ``kvmhost/_core/pager.h``; null until something used the pager"""
