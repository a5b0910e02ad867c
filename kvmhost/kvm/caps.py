"""KVM capabilities that this project asks about, by their kernel numbers."""

from __future__ import annotations

import enum

__all__ = ["Cap"]


class Cap(enum.IntEnum):
    """``KVM_CAP_*``. Source: include/uapi/linux/kvm.h, Linux v6.12."""

    IRQCHIP = 0
    HLT = 1
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    SYNC_MMU = 16
    INTERNAL_ERROR_DATA = 40
    MAX_VCPUS = 66
    READONLY_MEM = 81
    CHECK_EXTENSION_VM = 105
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    DIRTY_LOG_RING_ACQ_REL = 223
    MEMORY_FAULT_INFO = 232
    GUEST_MEMFD = 234
