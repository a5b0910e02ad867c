"""Output of ``kvmhost stress``."""

from __future__ import annotations

from typing import Literal

from kvmhost.tools.outputs.base import Output

__all__ = ["CheckRow", "ReferenceRow", "StressOutput", "StressPhaseRow"]


class StressPhaseRow(Output, frozen=True, kw_only=True):
    """One phase."""

    name: str
    """run1, reset, run2, ro, ro-check, rw, slots, unmap, unmap-check, remap or release"""
    what: str
    """what happens in it"""
    taken_s: float
    """from the release of the vCPUs to the arrival of the last one"""
    of_run1_ratio: float
    """relative to that of the phase run1"""
    n_faults: int
    """touches of memory that the host did not provide: times that KVM_RUN failed with EFAULT"""


class CheckRow(Output, frozen=True, kw_only=True):
    """Something that has to hold."""

    name: str
    """what, beginning with its phase"""
    ok: bool
    """whether it holds"""
    detail: str
    """what was found"""


class ReferenceRow(Output, frozen=True, kw_only=True):
    """Times of the kernel's selftest."""

    name: str
    """where: selftest for the run of `--against`, else processor and year"""
    source: str
    """the command, or where the times were published"""
    taken_s: dict[str, float]
    """by phase, where they are known"""


class StressOutput(Output, frozen=True, kw_only=True):
    """What the phases took, and what holds."""

    ok: bool
    """whether every check holds"""
    engine: str
    """what ran the vCPUs"""
    n_vcpus: int
    """number of vCPUs"""
    mem_bytes: int
    """memory that the guest sees in the memslots"""
    slot_bytes: int
    """size of a memslot, and of the memory behind all of them"""
    n_slots: int
    """number of memslots"""
    huge: bool
    """whether huge pages back the memory"""
    on_fault: Literal["skip", "stop"]
    """what a vCPU does at a write to read-only memory"""
    phases: list[StressPhaseRow]
    """the phases in order"""
    checks: list[CheckRow]
    """what has to hold"""
    references: list[ReferenceRow]
    """times of others, for comparison"""
