"""The protocol that every tracker follows."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol

from kvmhost.bitmap import Words, YoungBitmap
from kvmhost.errors import LayoutError

__all__ = ["Support", "Tracker", "TrackerInfo", "check_range"]


@dataclasses.dataclass(frozen=True)
class Support:
    """Whether something works here, and why or why not."""

    works: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class TrackerInfo:
    """What a tracker sees.

    :param sees: of ``reads``, ``writes`` and ``order``
    :param granularity_bytes: the smallest range that it tells apart
    :param provenance: where a bit was learned
    :param guest_cost: what the guest pays for a re-armed page
    :param staleness: which touches a harvest misses or puts into the wrong window
    """

    sees: tuple[str, ...]
    granularity_bytes: int
    provenance: str
    guest_cost: str
    staleness: str


class Tracker(Protocol):
    """Learns which pages of one machine were touched. Methods are for one thread at a time."""

    name: ClassVar[str]
    info: ClassVar[TrackerInfo]
    table_format: str

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
        """Make the next touch of cleared pages show again.

        :param young: re-arm these pages of the range and those that earlier harvests
            cleared and nobody re-armed; None: every page of the range
        """

    def stop(self) -> None:
        """Let go of what the tracker holds. Idempotent."""


def check_range(gfn_start: int, n_pages: int) -> None:
    """Refuse what is no range of gfns.

    :raises LayoutError: for a negative start or length, or an end beyond 2**52
    """
    if gfn_start < 0 or n_pages < 0 or gfn_start + n_pages > 1 << 52:
        raise LayoutError(f"harvest: bad range of {n_pages} pages from gfn {gfn_start:#x}")
