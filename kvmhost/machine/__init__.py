"""Machines: one VM with all its parts.

======  ======================  ================================================
kind    class                   for
======  ======================  ================================================
tiny    :class:`Machine`        guests that enter in 64-bit mode at privilege
                                level 3, with page tables from the VMM
pc      ``pc.PcMachine``        multiboot, PVH, ELF and bare images, at
                                privilege level 0
======  ======================  ================================================

:func:`make_machine` chooses by image. :class:`BaseMachine` is their common base.
"""

from kvmhost.machine.base import BaseMachine
from kvmhost.machine.factory import make_machine
from kvmhost.machine.tiny import Machine

__all__ = ["BaseMachine", "Machine", "make_machine"]
