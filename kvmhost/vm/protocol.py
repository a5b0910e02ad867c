"""What can be asked of a VM: :class:`Vm` is implemented by a machine and by its client.

>>> from kvmhost.control.client import Client
>>> from kvmhost.machine import Machine
>>> issubclass(Machine, Vm), issubclass(Client, Vm)
(True, True)

A program that takes a ``Vm`` works in the VM's process and over its control socket. Methods
of the same name take the same arguments and return the same types; errors of the machine cross
the socket with class, message and attributes. A client raises two more:
:class:`~kvmhost.errors.VmGoneError` if nothing answers, and
:class:`~kvmhost.errors.ControlError` for a refusal of the socket itself.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from kvmhost.vm.harvest import Harvest
from kvmhost.vm.names import DEFAULT_VIEW, Actuator, Rearm, TableFormat

if typing.TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvmhost.bitmap import Words
    from kvmhost.vm.answers import (
        Counters,
        EvictReport,
        LimitState,
        MemoryMap,
        Page,
        RearmCost,
        RestoreReport,
        RunState,
        VmState,
    )

__all__ = ["SourceState", "Vm", "YoungSource"]


class SourceState(Protocol):
    """The part of a state that names what runs there, and the tracker in use."""

    @property
    def image(self) -> str:
        """Path of the guest image, or of the program."""

    @property
    def tracker(self) -> str | None:
        """The tracker in use; None before the first harvest."""


@typing.runtime_checkable
class YoungSource(Protocol):
    """What can be harvested: a :class:`Vm`, or another process
    (:class:`~kvmhost.process.attach.Attached`).
    """

    def state(self) -> SourceState:
        """Return the state."""

    def memory_map(self) -> MemoryMap:
        """Return the memslots and the pinned ranges."""

    def harvest(
        self,
        gfn_start: int = 0,
        n_pages: int | None = None,
        *,
        tracker: str = "auto",
        clear: bool = True,
        rearm: Rearm = "young",
        fraction: float | None = None,
        mask: Words | None = None,
        table_format: TableFormat | None = None,
        view: str = DEFAULT_VIEW,
        max_age_s: float = 0.0,
        force: bool = False,
    ) -> Harvest:
        """Return the young pages, see :meth:`~kvmhost.vm.harvest.Harvestable.harvest`."""


@typing.runtime_checkable
class Vm(YoungSource, Protocol):
    """A VM, in this process or over its control socket. Methods are for any thread."""

    def state(self) -> VmState:
        """Return the state."""

    def counters(self) -> Counters:
        """Return all counters."""

    def rearm_cost(self) -> RearmCost:
        """Return what the touch of a re-armed page costs the guest; measured."""

    def page(self, gfn: int) -> Page:
        """Return the state of one page."""

    def resident(self, gfn_start: int = 0, n_pages: int | None = None) -> npt.NDArray[np.bool_]:
        """Return which pages the memfds hold: ``[i]`` is gfn ``gfn_start + i``."""

    def close_view(self, name: str) -> bool:
        """End a view of this process; return whether it was open."""

    def evict(
        self,
        gfns: Iterable[int] | npt.NDArray[Any],
        each: bool = False,
        *,
        actuator: Actuator = "store",
    ) -> EvictReport:
        """Evict pages in the given order; partial success is normal."""

    def restore(self, gfn_start: int, n_pages: int = 1) -> RestoreReport:
        """Restore the evicted pages of a range; a failure does not stop the others."""

    def drain(self) -> RestoreReport:
        """Restore all pages, remove the limit and the victim list; the VM keeps running."""

    def set_limit(self, resident_max_bytes: int) -> int:
        """Limit the resident bytes, 0 for no limit; return what is in force now."""

    def shrink(self, resident_max_bytes: int) -> LimitState:
        """Set the limit and evict down to it at once; return the resulting state."""

    def set_victims(self, gfns: Iterable[int] | npt.NDArray[Any]) -> int:
        """Set the pages to evict first at the limit; return their number."""

    def pause(self) -> RunState:
        """Stop guest code on every vCPU. Pauses nest; a client's ends after 60 s by default."""

    def resume(self) -> RunState:
        """Undo the last pause."""

    def stop(self) -> RunState:
        """End the guest."""

    def snapshot(self, path: str | Path, stop: bool = False) -> int:
        """Write a snapshot to a file; return the bytes of memory in it."""

    def close(self) -> None:
        """End the machine, or the connection of a client. Idempotent."""
