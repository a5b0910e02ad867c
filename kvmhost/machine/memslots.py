"""The memslots of one VM, changed while its vCPUs run.

Every region has a memslot of its own, which can be moved, and deleted and restored, unless it
holds pinned pages (parameters, page tables). A deleted slot hides the memory from the guest;
the memory stays, and can be evicted. Further memslots may show parts of a region at other
gpas: aliases. A page goes by one gfn in pager, trackers and views, that of its region, and
what the guest does through an alias counts there.

The pager numbers pages by region, so what it holds follows a move. The views of the trackers
follow it too: the pages that were young at the old gfns are young at the new ones. A harvest
waits for a change, and a change for a harvest.
"""

from __future__ import annotations

import itertools
import threading
import typing
from collections.abc import Callable, Sequence

from kvmhost.engine.base import Engine
from kvmhost.errors import InUseError, LayoutError, StateError
from kvmhost.machine.paging import Paging
from kvmhost.memory.guest import GuestMemory, GuestMemslot, Region
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.names import Access

if typing.TYPE_CHECKING:
    from kvmhost.trackers.harvesting import Harvester

__all__ = ["Memslots"]

#: As ``trackers.base.BY_GPA``, which imports numpy: what sees no access through an alias.
_BY_GPA = ("guestpt", "dirty")


class Memslots:
    """The memslots of one machine. Methods are for any thread; vCPUs may run.

    :param pinned_ranges: ``(gpa, n_bytes)`` whose region stays where it is
    :param harvester: returns the machine's harvester, if it has one
    """

    def __init__(
        self,
        memory: GuestMemory,
        engine: Engine,
        paging: Paging,
        pinned_ranges: Sequence[tuple[int, int]],
        harvester: Callable[[], Harvester | None],
    ) -> None:
        self._memory, self._engine, self._paging = memory, engine, paging
        self._pinned, self._harvester = pinned_ranges, harvester
        self._starts = [region.gpa for region in memory.regions]
        self._lock = threading.RLock()

    def list(self) -> list[GuestMemslot]:
        """Return the memslots that exist now, by number."""
        return [*self._memory.own_memslots(), *self._memory.aliases]

    @property
    def changed(self) -> bool:
        """Whether they differ from those that the machine was made with."""
        starts = [region.gpa for region in self._memory.regions if region.attached]
        return bool(self._memory.aliases) or starts != self._starts

    def add_alias(self, gpa: int, n_bytes: int, source_gpa: int) -> GuestMemslot:
        """Show ``[source_gpa, source_gpa + n_bytes)`` of a region at another gpa as well.

        :raises LayoutError: if the ranges are not whole pages, the source is not in one region,
            or the gpas have memory
        :raises InUseError: while a tracker is in use that sees no access through an alias
        :raises CapabilityError: if the VM has dirty rings
        :raises IoctlError: if KVM has no memslot left
        """
        if n_bytes <= 0 or any(value % PAGE_BYTES for value in (gpa, n_bytes, source_gpa)):
            raise LayoutError(f"alias [{gpa:#x}, {gpa + n_bytes:#x}): not whole pages of 4 KiB")
        with self._lock:
            region = self._memory.region_at(source_gpa, n_bytes)
            self._check_free(gpa, n_bytes)
            harvester = self._harvester()
            tracker = None if harvester is None else harvester.tracker_name
            if tracker in _BY_GPA:
                raise InUseError(
                    f"tracker {tracker}",
                    "is in use, and sees no access through an alias",
                    "use pagemap",
                )
            slot = GuestMemslot(
                self._free_number(), gpa, n_bytes, region, source_gpa - region.gpa, True
            )
            self._engine.set_memslot(slot)
            self._memory.aliases.append(slot)
            return slot

    def move(self, number: int, gpa: int) -> GuestMemslot:
        """Move a memslot to other gpas; its memory and contents stay the same.

        A region keeps its place in the order of the regions.

        :raises LayoutError: if there is no such slot, it is pinned, or the gpas have memory
        """
        if gpa % PAGE_BYTES or gpa < 0:
            raise LayoutError(f"gpa {gpa:#x} is not at a page of 4 KiB")
        with self._lock:
            slot = self._find(number)
            self._check_free(gpa, slot.n_bytes, but=slot)
            if slot.is_alias:
                moved = GuestMemslot(number, gpa, slot.n_bytes, slot.region, slot.offset, True)
                self._engine.set_memslot(moved)
                self._memory.aliases[self._memory.aliases.index(slot)] = moved
                return moved
            self._check_movable(slot.region)
            self._check_order(slot.region, gpa)
            moved = GuestMemslot(number, gpa, slot.n_bytes, slot.region)

            def change() -> None:
                self._engine.set_memslot(moved)
                slot.region.gpa = gpa

            self._change(slot.region, change)
            return moved

    def delete(self, number: int) -> None:
        """Delete a memslot: an access of the guest there is MMIO from then on.

        The memory of a region stays and can be evicted; :meth:`restore` shows it again.

        :raises LayoutError: if there is no such slot, or it is pinned
        """
        with self._lock:
            slot = self._find(number)
            if slot.is_alias:
                self._engine.delete_memslot(number)
                self._memory.aliases.remove(slot)
                return
            self._check_movable(slot.region)

            def change() -> None:
                self._engine.delete_memslot(number)
                slot.region.attached = False

            self._change(slot.region, change)

    def restore(self, number: int) -> GuestMemslot:
        """Create the deleted memslot of a region again, where it was.

        :raises LayoutError: if no region had that number, its slot exists, or the gpas have memory
        """
        with self._lock:
            regions = self._memory.regions
            if not 0 <= number < len(regions) or regions[number].attached:
                raise LayoutError(f"memslot {number} was not deleted", field="slot")
            region = regions[number]
            self._check_free(region.gpa, region.n_bytes)
            slot = GuestMemslot(number, region.gpa, region.n_bytes, region)

            def change() -> None:
                self._engine.set_memslot(slot)
                region.attached = True

            self._change(region, change)
            return slot

    def protect(self, gpa: int, n_bytes: int, access: Access) -> None:
        """Set what the guest may do with memory, through every memslot that shows it.

        What it may not is the exit :class:`~kvmhost.exits.MemoryFault`.

        :raises LayoutError: if the range is not whole pages of one region
        """
        with self._lock:
            region = self._memory.region_at(gpa, n_bytes)
            region.address_of(gpa - region.gpa, n_bytes)
            self._engine.protect(region, gpa - region.gpa, n_bytes, access)

    def unmap(self, gpa: int, n_bytes: int) -> None:
        """Unmap memory under the guest; the contents stay in the memfd.

        :raises LayoutError: if the range is not whole pages of one region
        :raises StateError: while the pager serves faults, whose registration would be lost
        """
        with self._lock:
            if self._paging.is_armed:
                raise StateError("guest memory", "is served by the pager", "use protect()")
            region = self._memory.region_at(gpa, n_bytes)
            region.address_of(gpa - region.gpa, n_bytes)
            self._engine.protect(region, gpa - region.gpa, n_bytes, "none")
            region.vacate(gpa - region.gpa, n_bytes)

    def remap(self, gpa: int, n_bytes: int) -> None:
        """Undo :meth:`unmap`.

        :raises LayoutError: if the range is not whole pages of one region
        """
        with self._lock:
            region = self._memory.region_at(gpa, n_bytes)
            region.remap(gpa - region.gpa, n_bytes)
            self._engine.protect(region, gpa - region.gpa, n_bytes, "write")

    def _free_number(self) -> int:
        """Return the lowest number that no region and no alias has: KVM's numbers are limited."""
        taken = {slot.number for slot in self._memory.aliases}
        numbers = itertools.count(len(self._memory.regions))
        return next(number for number in numbers if number not in taken)

    def _change(self, region: Region, change: Callable[[], None]) -> None:
        harvester = self._harvester()
        if harvester is None:
            change()
            region.zap(region.gfn, region.n_pages)
        else:
            harvester.change_region(region, change)

    def _find(self, number: int) -> GuestMemslot:
        for slot in self.list():
            if slot.number == number:
                return slot
        raise LayoutError(f"there is no memslot {number}", field="slot")

    def _check_free(self, gpa: int, n_bytes: int, but: GuestMemslot | None = None) -> None:
        for slot in self.list():
            is_other = but is None or slot.number != but.number
            if is_other and slot.gpa < gpa + n_bytes and gpa < slot.end:
                raise LayoutError(
                    f"gpa range [{gpa:#x}, {gpa + n_bytes:#x}) overlaps memslot {slot.number} at "
                    f"[{slot.gpa:#x}, {slot.end:#x})",
                    field="gpa",
                )

    def _check_movable(self, region: Region) -> None:
        for gpa, n_bytes in self._pinned:
            if gpa < region.end and region.gpa < gpa + n_bytes:
                raise LayoutError(
                    f"{region!r} holds pinned pages at gpa {gpa:#x}: its memslot stays",
                    field="slot",
                )

    def _check_order(self, region: Region, gpa: int) -> None:
        regions = self._memory.regions
        at = regions.index(region)
        low = regions[at - 1].end if at else 0
        high = regions[at + 1].gpa if at + 1 < len(regions) else None
        if gpa < low or (high is not None and gpa + region.n_bytes > high):
            limit = "" if high is None else f" up to {high:#x}"
            raise LayoutError(
                f"gpa {gpa:#x}: the region keeps its place in the order, from {low:#x}{limit}",
                field="gpa",
            )
