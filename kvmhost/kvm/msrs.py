"""Model-specific registers of a vCPU for snapshots: all that KVM takes, checked afterwards.

KVM_GET_MSR_INDEX_LIST names some hundred MSRs at most. KVM keeps more of a guest's state
than that: memory types (MTRRs), machine-check banks, TSC_AUX, performance counters and
others. So this module reads all ranges in which KVM has MSRs, on an idle vCPU with the
same CPUID, and every MSR that can be read is state.

A host can take a value and not keep it. Each MSR is read back after it was set; what
differs is returned and never passed over.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.kvm.system import System
from kvmhost.kvm.vcpu import KvmVcpu

__all__ = ["MAX_MSRS", "MSR_TSC", "MsrReport", "load_msrs", "read_msrs", "readable_msrs"]

#: MSRs of one vCPU in a snapshot.
MAX_MSRS = 4096
MSR_TSC = 0x10

#: Where KVM has MSRs: architectural ones, Hyper-V's, KVM's own, AMD's three blocks.
#: Source: kvm_set_msr_common and the vendor modules', Linux v6.12.
_RANGES = (
    (0x0, 0x1000),
    (0x4000_0000, 0x4000_0200),
    (0x4B56_4D00, 0x4B56_4D20),
    (0xC000_0000, 0xC000_0400),
    (0xC001_0000, 0xC001_0400),
    (0xC001_1000, 0xC001_1100),
)
#: Part of another structure of the snapshot: sregs, and the local APIC's registers.
_ELSEWHERE = frozenset({0x1B, 0xC000_0080, 0xC000_0100, 0xC000_0101}) | frozenset(
    range(0x800, 0x900)
)
#: Kept even if KVM accepts every MSR (module parameter ignore_msrs).
_NAMED = frozenset({0xC000_0103, 0x179, 0x17B, 0x2FF, 0xDA0}).union(
    range(0x200, 0x210), {0x250, 0x258, 0x259}, range(0x268, 0x270), range(0x280, 0x2A0)
)
_BANKS = range(0x400, 0x480)
#: What may lie between two readings of the TSC beside the time that passed.
_TSC_SLACK_S = 0.05


@dataclasses.dataclass(frozen=True)
class MsrReport:
    """What became of the MSRs of a snapshot.

    :ivar refused: KVM does not take them, and they are not what they were
    :ivar absent: KVM does not have them here; in the snapshot they were 0
    :ivar ignored: KVM took them and they are not what they were: ``(wanted, found)``
    :ivar tsc_ahead: cycles by which the TSC runs ahead of the snapshot; 0 if it was set
    """

    refused: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    ignored: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    tsc_ahead: int = 0


@functools.lru_cache(maxsize=4)
def readable_msrs(cpuid: bytes, irqchip: bool) -> list[int]:
    """Return the MSRs that make up a vCPU's state: KVM's list, then the rest, ascending.

    They are looked for on a vCPU of a VM that is thrown away; it has all machine-check
    banks there are, so a vCPU may have fewer of them.

    :param cpuid: ``struct kvm_cpuid2`` of the vCPU
    :param irqchip: whether the VM has an in-kernel irqchip
    """
    with System() as system, system.create_vm() as vm:
        if irqchip:
            vm.create_irqchip()
        with vm.create_vcpu(0) as core:
            core.set_cpuid(cpuid)
            return _find_msrs(core, system.msr_index_list())


def _find_msrs(core: KvmVcpu, listed: Iterable[int]) -> list[int]:
    first = list(dict.fromkeys(listed))
    table = ffi.new("struct kh_msr[]", MAX_MSRS)
    found: list[int] = []
    for start, end in _RANGES:
        count = lib.kh_msrs_scan(core.fd, start, end, table, MAX_MSRS)
        if count >= min(end - start, MAX_MSRS):
            # Every number answers: KVM makes these up. Keep what is known to be state.
            wanted = (_NAMED | frozenset(_BANKS)) & frozenset(range(start, end))
            found += sorted(wanted)
        else:
            found += [int(table[i].index) for i in range(count)]
    known = frozenset(first)
    return first + [index for index in found if index not in known | _ELSEWHERE]


def read_msrs(core: KvmVcpu, indices: list[int]) -> dict[int, int]:
    """Return the values of those MSRs that this vCPU has, in the order requested."""
    table = _table(dict.fromkeys(indices, 0))
    lib.kh_msrs_get(core.fd, table, len(table))
    return {int(m.index): int(m.value) for m in table if not m.status}


def load_msrs(core: KvmVcpu, values: Mapping[int, int], tsc_khz: int) -> MsrReport:
    """Set MSRs in the order of ``values`` and read each back.

    :param tsc_khz: frequency of the guest's TSC, to distinguish elapsed time from a TSC
        that was not set
    """
    before = read_msrs(core, list(values))
    # What is right already is left alone: much of that is read-only.
    wanted = {index: value for index, value in values.items() if before.get(index) != value}
    table = _table(wanted)
    start = time.monotonic()
    lib.kh_msrs_set(core.fd, table, len(table))
    failed = {int(m.index) for m in table if m.status}
    now = read_msrs(core, list(wanted))
    passed_s = time.monotonic() - start
    differing = {i: v for i, v in wanted.items() if now.get(i) != v}
    ahead = 0
    if MSR_TSC in differing and MSR_TSC in now:
        cycles = (now[MSR_TSC] - differing.pop(MSR_TSC)) % (1 << 64)
        if cycles > (passed_s + _TSC_SLACK_S) * tsc_khz * 1000:
            ahead = cycles
    return MsrReport(
        tuple(i for i in differing if i in failed and not (i not in now and values[i] == 0)),
        tuple(i for i in differing if i in failed and i not in now and values[i] == 0),
        {i: (v, now[i]) for i, v in differing.items() if i not in failed and i in now},
        ahead,
    )


def _table(values: Mapping[int, int]) -> Any:
    return ffi.new("struct kh_msr[]", [(index, 0, value) for index, value in values.items()])
