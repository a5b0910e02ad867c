"""One page: its addresses, and its history in a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kvmhost.errors import LayoutError
from kvmhost.reclaim.record.clock import elapsed_s
from kvmhost.reclaim.record.meta import Memslot
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.young.bits import runs

__all__ = ["GfnHistory", "Place", "Stretch", "find_place", "history_of", "place_of_gfn"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A guest address in all its forms. ``hva`` is None if it is unknown."""

    gfn: int
    gpa: int
    slot: int
    slot_offset_bytes: int
    hva: int | None


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Windows ``[first, end)`` in which a page was young in all, or in none."""

    first: int
    end: int
    young: bool
    since_s: float
    until_s: float


@dataclasses.dataclass(frozen=True)
class GfnHistory:
    """The history of one page in a record.

    :param age_windows: windows since it was last young, 1 for the last window; None: never
    :param longest_idle: the largest number of windows between two touches
    """

    gfn: int
    place: Place | None
    windows: int
    young_windows: int
    coarse_windows: int
    first_young: int | None
    last_young: int | None
    age_windows: int | None
    longest_idle: int | None
    stretches: list[Stretch]

    def __repr__(self) -> str:
        last = "never young" if self.last_young is None else f"last in window {self.last_young}"
        return (
            f"GfnHistory(gfn {self.gfn:#x}, young in {self.young_windows} of {self.windows} "
            f"windows, {last})"
        )


def place_of_gfn(gfn: int, memslots: Sequence[Memslot], page_bytes: int = 4096) -> Place | None:
    """Return the addresses of a gfn, None if it is in no memslot."""
    for slot in memslots:
        if slot.gfn <= gfn < slot.gfn + slot.n_pages:
            offset = (gfn - slot.gfn) * page_bytes
            hva = slot.hva + offset if slot.hva else None
            return Place(gfn, gfn * page_bytes, slot.slot, offset, hva)
    return None


def find_place(
    value: int, kind: str, memslots: Sequence[Memslot], page_bytes: int = 4096, slot: int = 0
) -> Place:
    """Return all forms of an address.

    :param kind: ``gfn``, ``gpa``, ``hva`` or ``offset`` (in bytes, of ``slot``)
    :raises LayoutError: if it is in no memslot
    """
    inside = 0
    gfn: int | None = None
    if kind == "gfn":
        gfn = value
    elif kind == "gpa":
        gfn, inside = divmod(value, page_bytes)
    else:
        for one in memslots:
            known = one.hva if kind == "hva" else 0
            fits = one.slot == slot if kind == "offset" else bool(one.hva)
            if fits and known <= value < known + one.n_pages * page_bytes:
                pages, inside = divmod(value - known, page_bytes)
                gfn = one.gfn + pages
    found = None if gfn is None else place_of_gfn(gfn, memslots, page_bytes)
    if found is None:
        shown = ", ".join(_shown(one, page_bytes) for one in memslots) or "none"
        raise LayoutError(f"{kind} {value:#x} is in no memslot; memslots: {shown}")
    return dataclasses.replace(
        found,
        gpa=found.gpa + inside,
        slot_offset_bytes=found.slot_offset_bytes + inside,
        hva=None if found.hva is None else found.hva + inside,
    )


def history_of(record: YoungRecord, gfn: int) -> GfnHistory:
    """Return the history of a page.

    :raises LayoutError: if the record does not contain it
    """
    young = record.history(gfn)
    touched = np.flatnonzero(young)
    ends = elapsed_s(record)
    starts = np.concatenate([[0.0], ends])[: ends.size]
    stretches = [
        Stretch(int(a), int(b), kind, float(starts[a]), float(ends[b - 1]))
        for kind, bits in ((True, young), (False, ~young))
        for a, b in zip(*runs(bits), strict=True)
    ]
    idle = np.diff(touched)
    return GfnHistory(
        gfn=gfn,
        place=place_of_gfn(gfn, record.memslots(), record.metadata.page_bytes),
        windows=len(record),
        young_windows=int(touched.size),
        coarse_windows=int(record.history(gfn, "coarse").sum()),
        first_young=int(touched[0]) if touched.size else None,
        last_young=int(touched[-1]) if touched.size else None,
        age_windows=int(len(record) - touched[-1]) if touched.size else None,
        longest_idle=int(idle.max()) if idle.size else None,
        stretches=sorted(stretches, key=lambda stretch: stretch.first),
    )


def _shown(slot: Memslot, page_bytes: int) -> str:
    hva = f" at hva {slot.hva:#x}" if slot.hva else ""
    end = slot.gfn + slot.n_pages
    return (
        f"slot {slot.slot} gfns [{slot.gfn:#x}, {end:#x}), {slot.n_pages * page_bytes} bytes{hva}"
    )
