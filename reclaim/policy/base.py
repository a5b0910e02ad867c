"""The protocol of policies: take notifications about pages, select pages to evict.

A policy sees pages as gfns from 0 up to a fixed end. It performs no eviction, holds no
reference to a VM, and reads neither clocks nor files: the same calls give the same
results, so that a recorded run can be replayed (:mod:`kvmhost.reclaim.policy.replay`).
Its selection is advice, which the caller may ignore.

One pass calls, in this order:

1. :meth:`Policy.plan`: which accessed bits the coming harvest should clear;
2. :meth:`Policy.refaulted`: pages that became resident since the previous pass, for the
   first time or again; a policy that distinguishes the two remembers evicted pages;
3. :meth:`Policy.age` with the harvest;
4. :meth:`Policy.victims`, each time pages must be evicted; the caller reports the pages
   that it evicted through :meth:`Policy.evicted`.

Young bitmaps are 64-bit words as in :mod:`kvmhost.bitmap`, starting at gfn 0. Other sets
of pages are boolean arrays of shape ``(n_pages,)``.
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
    """What a policy requests from the next harvest.

    A caller that does not support this clears all pages in one batch, which costs more
    and gives the policy at least the same information.

    :param pages: test and clear only these; None: all pages
    :param batched: False asks for one page at a time under the MMU lock
    """

    pages: Words | None = None
    batched: bool = True


#: Test and clear all pages in a batch.
Everything = HarvestPlan()


class Probe(Protocol):
    """Tests and clears accessed bits of individual pages between two harvests.

    The implementation is responsible for re-arming.
    """

    def clear_young(self, pages: Words) -> Words:
        """Test and clear the pages of a bitmap in one batch, without the MMU lock.

        :return: same shape; the pages that were young
        """

    def clear_flush_young(self, gfn: int) -> bool:
        """Test and clear one page under the MMU lock, with a flush."""


class Policy(Protocol):
    """Selects the pages to evict first. Times are of one monotonic clock, in ns."""

    name: str

    @property
    def n_pages(self) -> int:
        """Number of pages that the policy covers, from gfn 0."""

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Return which accessed bits the next harvest should clear.

        :param tables_young: one bit per table of 512 pages, set where the walker's non-leaf
            accessed bits show that an entry below may be young; None: unknown
        """

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Record that these pages became resident, again or for the first time."""

    def age(self, young: Words, now_ns: int) -> None:
        """Process one harvest: the pages that were touched since they were last cleared."""

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return up to ``n`` of the candidates, best victim first.

        Returns fewer if the policy protects the rest.
        """

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Record that these pages were evicted."""

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return (generation, number of the given pages in it), the oldest first."""

    def counters(self) -> Mapping[str, float]:
        """Return counters and the state of controllers, by name."""

    def explain(self, gfn: int) -> Mapping[str, int | float | str]:
        """Return the state that the policy keeps for one page, by name."""


def check_mask(mask: Mask, n_pages: int) -> None:
    """Check that a mask is a boolean array over all pages.

    :raises LayoutError: if its shape or type differs
    """
    if mask.shape != (n_pages,) or mask.dtype != np.bool_:
        raise LayoutError(
            f"mask of shape {mask.shape} and type {mask.dtype}: need booleans for {n_pages} pages"
        )


def check_words(words: Words, n_pages: int) -> None:
    """Check that words are a bitmap over all pages.

    :raises LayoutError: if its shape or type differs
    """
    if words.shape != (n_words(n_pages),) or words.dtype != np.uint64:
        raise LayoutError(
            f"bitmap of shape {words.shape} and type {words.dtype}: need "
            f"{n_words(n_pages)} 64-bit words for {n_pages} pages"
        )
