"""All state of a vCPU and of a board, from KVM and back into it.

The structures are the kernel's, small, and opaque here. The order in which
they are set matters: machine-check banks and processor mode before the local APIC, that
before the MSRs (the timer's deadline is one), pending events last.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Annotated

import msgspec

from kvmhost.errors import IoctlError
from kvmhost.kvm import KvmVcpu
from kvmhost.kvm.msrs import MAX_MSRS, MsrReport, load_msrs, read_msrs

if typing.TYPE_CHECKING:
    from kvmhost.kvm.vm import KvmVm

__all__ = ["BoardState", "SavedVcpu", "load_board", "load_vcpu", "save_board", "save_vcpu"]

#: Structures of a vCPU in the order of restoring; MSRs come before the last.
_ORDER = ("regs", "sregs", "xsave", "xcrs", "debugregs", "lapic", "vcpu_events")
_CHIPS = (0, 1, 2)
_MCG_CAP = 0x179
#: Tolerance for measurements of the same TSC frequency, in parts per million.
_SAME_KHZ_PPM = 250

#: Maximum size of a kernel structure. The largest is XSAVE's area with AMX tiles, 11 KiB.
Raw = Annotated[bytes, msgspec.Meta(max_length=1 << 16)]
_Index = Annotated[str, msgspec.Meta(pattern="^0x[0-9a-f]{1,8}$")]
_Unsigned = Annotated[int, msgspec.Meta(ge=0)]
_Msrs = Annotated[dict[_Index, _Unsigned], msgspec.Meta(max_length=MAX_MSRS)]


class SavedVcpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One vCPU. The bytes are base64 in JSON; ``lapic`` is for VMs with an irqchip."""

    cpuid: Raw
    regs: Raw
    sregs: Raw
    xsave: Raw
    xcrs: Raw
    debugregs: Raw
    vcpu_events: Raw
    lapic: Raw | None
    mp_state: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    tsc_khz: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    msrs: _Msrs


class BoardState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PICs, I/O APIC, PIT, and the clock in ns."""

    chips: Annotated[list[Raw], msgspec.Meta(min_length=3, max_length=3)]
    pit: Raw
    clock_ns: _Unsigned


def save_vcpu(core: KvmVcpu, msrs: list[int], irqchip: bool) -> SavedVcpu:
    """Return the state of a vCPU that does not run.

    :param msrs: the MSRs to read, see :func:`~kvmhost.kvm.msrs.readable_msrs`
    :param irqchip: whether the VM has an in-kernel irqchip
    """
    parts = {
        name: bytes(getattr(core, f"get_{name}")()) for name in _ORDER if irqchip or name != "lapic"
    }
    return SavedVcpu(
        cpuid=bytes(core.get_cpuid()),
        lapic=parts.pop("lapic", None),
        mp_state=core.get_mp_state(),
        tsc_khz=_tsc_khz(core),
        msrs={f"{index:#x}": value for index, value in read_msrs(core, msrs).items()},
        **parts,
    )


def load_vcpu(core: KvmVcpu, state: SavedVcpu, irqchip: bool) -> tuple[MsrReport, list[str]]:
    """Put a state into a fresh vCPU.

    :return: the result for the MSRs, and other differences on this host
    :raises IoctlError: if KVM refuses the state
    :raises ValueError: if a structure is not of its size, or one is missing
    """
    if irqchip and state.lapic is None:
        raise ValueError("lapic is missing")
    remarks: list[str] = []
    core.set_cpuid(state.cpuid)
    _set_tsc_khz(core, state.tsc_khz, remarks)
    values = {int(index, 16): value for index, value in state.msrs.items()}
    mcg_cap = values.get(_MCG_CAP, 0)
    if mcg_cap and mcg_cap != read_msrs(core, [_MCG_CAP]).get(_MCG_CAP):
        core.setup_mce(mcg_cap)
    core.set_mp_state(state.mp_state)
    report = MsrReport()
    for name in _ORDER:
        if name == "vcpu_events":
            report = load_msrs(core, values, _tsc_khz(core))
        if irqchip or name != "lapic":
            set_it: Callable[[bytes], None] = getattr(core, f"set_{name}")
            set_it(getattr(state, name))
    return report, remarks


def save_board(vm: KvmVm) -> BoardState:
    """Return the state of PICs, I/O APIC, PIT and clock."""
    chips = [bytes(vm.get_irqchip(chip)) for chip in _CHIPS]
    return BoardState(chips, bytes(vm.get_pit2()), int(vm.get_clock().clock))


def load_board(vm: KvmVm, state: BoardState) -> None:
    """Put a state from :func:`save_board` into a fresh VM.

    :raises IoctlError: if KVM refuses it
    """
    for chip in state.chips:
        vm.set_irqchip(chip)
    vm.set_pit2(state.pit)
    vm.set_clock({"clock": state.clock_ns})


def _tsc_khz(core: KvmVcpu) -> int:
    try:
        return core.get_tsc_khz()
    except IoctlError:
        return 0  # Unknown on a host without a stable TSC.


def _set_tsc_khz(core: KvmVcpu, khz: int, remarks: list[str]) -> None:
    here = _tsc_khz(core)
    if not khz or not here or abs(khz - here) * 1_000_000 <= here * _SAME_KHZ_PPM:
        return
    try:
        core.set_tsc_khz(khz)
    except IoctlError:
        remarks.append(f"the TSC runs at {here} kHz, in the snapshot at {khz} kHz")
