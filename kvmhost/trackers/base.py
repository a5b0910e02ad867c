"""The protocol that every tracker implements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Protocol, Self

import numpy as np

from kvmhost.bitmap import Words, YoungBitmap, n_words, place_words, sub_words
from kvmhost.engine.base import Engine
from kvmhost.errors import StateError
from kvmhost.memory.guest import GuestMemory, Region, pieces
from kvmhost.pager.userfault import Userfault
from kvmhost.vm.checks import check_mask, check_range
from kvmhost.vm.names import EngineName

__all__ = [
    "BY_GPA",
    "Support",
    "TrackedVm",
    "Tracker",
    "TrackerInfo",
    "add_piece",
    "harvest_pieces",
    "need_started",
]


#: Trackers that look at guest physical addresses, and miss accesses through aliased memslots.
BY_GPA = ("guestpt", "dirty")


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether something works on this host, and why or why not."""

    works: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class TrackerInfo:
    """Properties of a tracker.

    :param sees: of ``reads``, ``writes`` and ``order``
    :param granularity_bytes: the smallest range that it distinguishes
    :param provenance: the source of its bits
    :param guest_cost: cost to the guest of a re-armed page
    :param staleness: which touches a harvest misses or puts into the wrong window
    """

    sees: tuple[str, ...]
    granularity_bytes: int
    provenance: str
    guest_cost: str
    staleness: str


@dataclasses.dataclass(frozen=True)
class TrackedVm:
    """The parts of a VM that trackers use.

    :param tables_gpa: root of the guest's page tables, if the VMM laid them out and the
        guest keeps them; None: the guest makes its own
    :param open_userfault: opens the VM's userfaultfd, or returns the open one; raises
        ``CapabilityError`` without userfaultfd
    """

    memory: GuestMemory
    engine: Engine
    tables_gpa: int | None
    open_userfault: Callable[[], Userfault]


class Tracker(Protocol):
    """Finds the touched pages of one VM. Methods are for one thread at a time."""

    name: ClassVar[str]
    info: ClassVar[TrackerInfo]
    table_format: str

    @classmethod
    def for_vm(cls, vm: TrackedVm) -> Self:
        """Make a tracker for a VM; it is not started yet.

        :raises CapabilityError: if it does not work on this VM or host
        """

    @classmethod
    def probe(cls, engine: EngineName = "auto") -> Support:
        """Try the tracker on an engine; report whether it works, and why it does not."""

    def start(self) -> None:
        """Begin the first window: nothing is young, everything is armed."""

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        """Return which pages of a range were touched in the window.

        :param clear: begin a new window for the pages that were young
        :param mask: shape ``(ceil(n_pages / 64),)``; only pages with a set bit are cleared
        """

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        """Make the next touch of cleared pages visible again.

        :param young: re-arm these pages of the range and those that earlier harvests
            cleared without re-arming; None: every page of the range
        """

    def stop(self) -> None:
        """Release the tracker's resources. Idempotent."""


def need_started(name: str, started: bool) -> None:
    """Refuse a call to a tracker before its start or after its stop.

    :raises StateError: if it is not started
    """
    if not started:
        raise StateError(f"tracker {name}", "is not started", "call start() first")


def harvest_pieces(
    memory: GuestMemory,
    gfn_start: int,
    n_pages: int,
    mask: Words | None,
    harvest_piece: Callable[[Region, int, int, Words | None], Words],
) -> Words:
    """Harvest a range region by region and put the bits together.

    :param harvest_piece: gets region, first gfn, pages and the piece's own mask (None:
        all); returns the piece's bits
    :raises LayoutError: if the range or the mask is invalid
    """
    check_range(gfn_start, n_pages, memory.gfn_end)
    check_mask(mask, n_pages)
    found: Words | None = None
    attached = [region for region in memory.regions if region.attached]
    for region, start, count in pieces(attached, gfn_start, n_pages):
        first = start - gfn_start
        wanted = None if mask is None else sub_words(mask, n_pages, first, count)
        words = harvest_piece(region, start, count, wanted)
        found = add_piece(found, n_pages, first, count, words)
    return np.zeros(n_words(n_pages), dtype=np.uint64) if found is None else found


def add_piece(whole: Words | None, n_pages: int, first: int, count: int, words: Words) -> Words:
    """Set the bits of pages ``[first, first + count)`` in a bitmap of ``n_pages``.

    :param whole: None: begin with an empty one; ``words`` itself if it covers everything
    """
    if whole is None:
        if count == n_pages:
            return words
        whole = np.zeros(n_words(n_pages), dtype=np.uint64)
    place_words(whole, first, words)
    return whole
