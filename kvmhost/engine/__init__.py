"""Engines: what runs vCPUs.

========= ============================================= =========================
engine    runs                                          for
========= ============================================= =========================
kvm       guest code on /dev/kvm                        normal use
emulated  the same guest code under Unicorn             hosts without /dev/kvm
soft      access traces in C, against mmu tables        stress, ablation, scale
========= ============================================= =========================

``soft`` runs no images and cannot be passed to :func:`choose`; see
:mod:`kvmhost.mmu.soft`.

:func:`choose` picks one by name; ``auto`` takes ``kvm`` where a VM can be made.
"""

from __future__ import annotations

from kvmhost.engine.base import Engine, RearmKind, Vcpu
from kvmhost.errors import CapabilityError
from kvmhost.vm.names import ENGINES, EngineName, check_name

__all__ = ["Engine", "RearmKind", "Vcpu", "choose"]


def choose(name: EngineName = "auto") -> Engine:
    """Return an engine by name.

    :raises LayoutError: for an unknown name
    :raises CapabilityError: if the engine cannot run here
    """
    # Each engine is imported when chosen: the emulator alone costs more than a VM.
    check_name("engine", name, ENGINES, "engine")
    if name in ("auto", "kvm"):
        try:
            from kvmhost.engine.kvm import KvmEngine

            return KvmEngine()
        except CapabilityError:
            if name == "kvm":
                raise
    from kvmhost.engine.emulated import EmulatedEngine

    return EmulatedEngine()
