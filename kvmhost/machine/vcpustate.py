"""All state of a vCPU and of a board, from KVM and back into it, as base64 text.

The structures are the kernel's own, opaque here; they are small. The order in which
they are set matters and is that of :data:`_ORDER`: processor mode before the local APIC,
that before the MSRs (the timer's deadline is one), pending events last.
"""

from __future__ import annotations

import base64
import typing
from collections.abc import Callable, Mapping
from typing import Any

from kvmhost.errors import IoctlError
from kvmhost.kvm import KvmVcpu

if typing.TYPE_CHECKING:
    from kvmhost.kvm.vm import Vm

__all__ = ["load_board", "load_vcpu", "save_board", "save_vcpu"]

#: Structures of a vCPU in the order of restoring; the last two need the irqchip.
_ORDER = ("regs", "sregs", "xsave", "xcrs", "debugregs", "lapic", "vcpu_events")
_NEED_IRQCHIP = {"lapic"}
_CHIPS = (0, 1, 2)


def save_vcpu(core: KvmVcpu, msrs: list[int], irqchip: bool) -> dict[str, Any]:
    """Return the state of a vCPU that does not run.

    :param msrs: those that this KVM saves, see ``System.msr_index_list``
    :param irqchip: whether the VM has an in-kernel irqchip
    """
    state: dict[str, Any] = {"cpuid": _text(core.get_cpuid())}
    for name in _ORDER:
        if irqchip or name not in _NEED_IRQCHIP:
            state[name] = _text(getattr(core, f"get_{name}")())
    state["mp_state"] = core.get_mp_state()
    state["msrs"] = {f"{index:#x}": value for index, value in _get_msrs(core, msrs).items()}
    return state


def load_vcpu(core: KvmVcpu, state: Mapping[str, Any], irqchip: bool) -> list[str]:
    """Put a state into a fresh vCPU.

    :return: names of MSRs that KVM refuses, and that are not what they were
    :raises IoctlError: if KVM refuses the state
    :raises ValueError, KeyError: if it is damaged
    """
    core.set_cpuid(_bytes(state["cpuid"]))
    core.set_mp_state(int(state["mp_state"]))
    refused: list[str] = []
    for name in _ORDER:
        if name == "vcpu_events":
            values = {int(index, 16): int(value) for index, value in state["msrs"].items()}
            refused = _set_msrs(core, values)
        if irqchip or name not in _NEED_IRQCHIP:
            set_it: Callable[[bytes], None] = getattr(core, f"set_{name}")
            set_it(_bytes(state[name]))
    return refused


def save_board(vm: Vm) -> dict[str, Any]:
    """Return the state of PICs, I/O APIC, PIT and clock."""
    state: dict[str, Any] = {f"chip{chip}": _text(vm.get_irqchip(chip)) for chip in _CHIPS}
    return state | {"pit": _text(vm.get_pit2()), "clock_ns": int(vm.get_clock().clock)}


def load_board(vm: Vm, state: Mapping[str, Any]) -> None:
    """Put a state from :func:`save_board` into a fresh VM.

    :raises IoctlError: if KVM refuses it
    """
    for chip in _CHIPS:
        vm.set_irqchip(_bytes(state[f"chip{chip}"]))
    vm.set_pit2(_bytes(state["pit"]))
    vm.set_clock({"clock": int(state["clock_ns"])})


def _get_msrs(core: KvmVcpu, indices: list[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    left = list(indices)
    while left:
        got = core.get_msrs(left)
        found |= got
        # KVM stops at the first that this vCPU does not have.
        left = left[len(got) + 1 :]
    return found


def _set_msrs(core: KvmVcpu, values: dict[int, int]) -> list[str]:
    refused: list[str] = []
    left = dict(values)
    while left:
        try:
            core.set_msrs(left)
            break
        except IoctlError as error:
            bad = error.arguments.get("index")
            if bad not in left:
                raise
            names = list(left)
            if core.get_msrs([bad]).get(bad) != left[bad]:
                refused.append(f"{bad:#x}")
            left = {name: left[name] for name in names[names.index(bad) + 1 :]}
    return refused


def _text(structure: Any) -> str:
    return base64.b64encode(bytes(structure)).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
