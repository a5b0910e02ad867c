"""What every policy does: it is told what pages did, and says which should go.

A policy sees pages as gfns from 0 up to a fixed end. It acts on nothing, knows no VM,
reads no clock and no file: the same calls give the same answers, so that a recorded
run can be replayed (:mod:`kvmhost.reclaim.policy.replay`). What it says is an opinion that
others may drop.

One pass, in this order:

1. :meth:`Policy.plan`: which accessed bits the coming harvest should clear;
2. :meth:`Policy.refaulted`: pages that came in since the pass before, for the first
   time or back; a policy that wants to tell these apart remembers what went;
3. :meth:`Policy.age` with the harvest;
4. :meth:`Policy.victims`, as often as pages have to go; what the caller did about the
   answer comes back through :meth:`Policy.evicted`.

Bitmaps of the young are 64-bit words as in :mod:`kvmhost.bitmap`, from gfn 0 on. Sets
of pages that the caller keeps anyway are boolean arrays of shape ``(n_pages,)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words
from kvmhost.errors import LayoutError

__all__ = [
    "Everything",
    "Gfns",
    "HarvestPlan",
    "Mask",
    "Policy",
    "Probe",
    "check_mask",
    "check_words",
]

Mask = npt.NDArray[np.bool_]
Gfns = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class HarvestPlan:
    """What a policy wants of the next harvest.

    A caller that cannot do it clears everything in one batch: that costs more and
    teaches a policy more, never less.

    :param pages: test and clear these only; None: all pages
    :param batched: False asks for one page at a time under the MMU lock
    """

    pages: Words | None = None
    batched: bool = True


#: Test and clear all pages in a batch.
Everything = HarvestPlan()


class Probe(Protocol):
    """Looks at accessed bits of single pages between two harvests, and clears them.

    Who offers it sees to re-arming.
    """

    def clear_young(self, pages: Words) -> Words:
        """Test and clear the pages of a bitmap in one batch, without a lock.

        :return: same shape; which of them were young
        """

    def clear_flush_young(self, gfn: int) -> bool:
        """Test and clear one page under the MMU lock, with a flush."""


class Policy(Protocol):
    """Decides which pages go first. Times are of one monotonic clock, in ns."""

    name: str

    @property
    def n_pages(self) -> int:
        """Pages it knows of: gfns from 0 up to this."""

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Say what the next harvest should clear.

        :param tables_young: one bit a 512-page table, set where the walker's non-leaf
            accessed bits say that something below may be young; None: not known
        """

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Take note that these pages came in (back, or for the first time)."""

    def age(self, young: Words, now_ns: int) -> None:
        """Take one harvest: the pages that were touched since they were last cleared."""

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return up to ``n`` of the candidates, the best to evict first.

        Fewer come back where the policy protects the rest.
        """

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Take note that these pages went."""

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return (generation, how many of the pages are in it), the oldest first."""

    def counters(self) -> Mapping[str, float]:
        """Return what it counted and how its controllers stand, by name."""

    def explain(self, gfn: int) -> Mapping[str, int | float | str]:
        """Return what it knows of one page, by name."""


def check_mask(mask: Mask, n_pages: int) -> None:
    """Refuse what is no boolean array over all pages.

    :raises LayoutError: for another shape or type
    """
    if mask.shape != (n_pages,) or mask.dtype != np.bool_:
        raise LayoutError(
            f"mask of shape {mask.shape} and type {mask.dtype}: need booleans for {n_pages} pages"
        )


def check_words(words: Words, n_pages: int) -> None:
    """Refuse what is no bitmap over all pages.

    :raises LayoutError: for another shape or type
    """
    if words.shape != (n_words(n_pages),) or words.dtype != np.uint64:
        raise LayoutError(
            f"bitmap of shape {words.shape} and type {words.dtype}: need "
            f"{n_words(n_pages)} 64-bit words for {n_pages} pages"
        )
