"""The state in which a tiny guest starts: 64-bit mode at privilege level 3.

Level 3, because a KVM that shadows page tables emulates level-0 code one
instruction at a time. The guest may still use ports: IOPL is 3, and the
I/O permission bitmap of its task state segment allows every port, because a KVM
that runs level-3 code natively may take the flags, IOPL included, from the host
processor. There is no GDT and no IDT: an exception is a triple fault, which ends
the run.

Register and bit names: Intel SDM vol. 3A, 2.5 (control registers), 4.5 (4-level
paging); segment attributes as in ``struct kvm_segment``.
"""

from __future__ import annotations

import dataclasses

from kvmhost._ffi import check, ffi, lib
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import (
    PARAMS_GPA,
    STACK_BYTES,
    STACKS_GPA,
    TSS_BYTES,
    TSS_GPA,
    TinyLayout,
)
from kvmhost.units import PAGE_BYTES

__all__ = ["CR0_WP", "EntryState", "entry_state", "lay_out_tables", "write_tss"]

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
EFER_LME, EFER_LMA = 1 << 8, 1 << 10

RFLAGS_FIXED, RFLAGS_IOPL3 = 1 << 1, 3 << 12


@dataclasses.dataclass(frozen=True)
class EntryState:
    """Registers at the first instruction; everything not named here is 0.

    ``rdi`` is the vCPU's index, ``rsi`` the gpa of the parameter page.
    """

    rip: int
    rsp: int
    rdi: int
    rsi: int
    cr3: int
    rflags: int = RFLAGS_FIXED | RFLAGS_IOPL3
    cr0: int = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG
    cr4: int = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    efer: int = EFER_LME | EFER_LMA


def entry_state(layout: TinyLayout, entry: int, vcpu: int) -> EntryState:
    """Return how vCPU ``vcpu`` starts at ``entry``."""
    # The stack is aligned as a function expects it: rsp + 8 divisible by 16.
    top = STACKS_GPA + (vcpu + 1) * STACK_BYTES
    return EntryState(rip=entry, rsp=top - 8, rdi=vcpu, rsi=PARAMS_GPA, cr3=layout.tables_gpa)


def lay_out_tables(memory: GuestMemory, layout: TinyLayout) -> int:
    """Write the guest's page tables: virtual address = gpa.

    Leaves are of 4 KiB in ``layout.mapped_ranges`` and of 2 MiB in ``layout.huge_ranges``.
    Page 0 is not mapped, and neither are the tables themselves.

    :return: gpa of the root
    :raises IoctlError: ``ENOSPC`` if ``layout.tables_bytes`` is too small
    """
    region = memory.region_at(layout.tables_gpa, layout.tables_bytes)
    tables = ffi.new(
        "struct kh_tables *",
        {
            "alias": region.alias_address + layout.tables_gpa - region.gpa,
            "pa": layout.tables_gpa,
            "n_pages": layout.tables_bytes // PAGE_BYTES,
        },
    )
    for start, end in layout.mapped_ranges:
        n_pages = (end - start) // PAGE_BYTES
        result = lib.kh_tables_identity(tables, start, n_pages)
        check(result, "kh_tables_identity", start=start, end=end)
    for start, end in layout.huge_ranges:
        result = lib.kh_tables_identity_huge(tables, start, end - start)
        check(result, "kh_tables_identity_huge", start=start, end=end)
    return layout.tables_gpa


def write_tss(memory: GuestMemory) -> None:
    """Write a task state segment whose bitmap allows every port.

    Source: Intel SDM vol. 1, 19.5.2 ("I/O permission bit map").
    """
    tss = bytearray(TSS_BYTES)
    tss[102:104] = (104).to_bytes(2, "little")
    tss[-1] = 0xFF
    memory[TSS_GPA : TSS_GPA + TSS_BYTES] = tss
