"""The minimum of refaults, computed from a trace whose future is known.

Belady's rule, in the model of :mod:`kvmhost.reclaim.policy.replay`: after each window, the
resident pages in excess of the budget are evicted whose next touch is furthest in the
future. A window touches all its pages at once, so the choice between pages with the same
next touch makes no difference. It needs the whole trace and cannot run on a live VM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, unpack
from kvmhost.reclaim.policy.base import Everything, Gfns, HarvestPlan, Mask, Probe
from kvmhost.reclaim.policy.replay import ReplayResult, replay

__all__ = ["Belady", "belady"]

_NEVER = np.iinfo(np.int32).max


def belady(windows: Sequence[tuple[int, Words]], n_pages: int, budget_pages: int) -> ReplayResult:
    """Replay a trace under the optimal policy.

    :raises LayoutError: as :func:`~kvmhost.reclaim.policy.replay.replay`
    """
    optimum = Belady([words for _, words in windows], n_pages)
    return dataclasses.replace(replay(windows, optimum, budget_pages), policy=optimum.name)


class Belady:
    """The optimal policy for one replay of the trace that it was created from.

    Uses four bytes of memory for each touch of the trace.
    """

    name = "belady"

    def __init__(self, windows: Sequence[Words], n_pages: int) -> None:
        self._n_pages = n_pages
        self._window = -1
        #: For each window: the pages touched, and the window that touches each of them next.
        self._touches: list[tuple[Gfns, npt.NDArray[np.int32]]] = []
        coming = np.full(n_pages, _NEVER, dtype=np.int32)
        for number in range(len(windows) - 1, -1, -1):
            gfns = np.flatnonzero(unpack(windows[number], n_pages))
            self._touches.append((gfns, coming[gfns]))
            coming[gfns] = number
        self._touches.reverse()
        self._next = np.full(n_pages, _NEVER, dtype=np.int32)

    @property
    def n_pages(self) -> int:
        """Number of pages of the trace."""
        return self._n_pages

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Request all pages."""
        return Everything

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Do nothing: the trace already contains these touches."""

    def age(self, young: Words, now_ns: int) -> None:
        """Advance to the next window."""
        self._window += 1
        gfns, coming = self._touches[self._window]
        self._next[gfns] = coming

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return the ``n`` candidates that are touched again last."""
        pages = np.flatnonzero(candidates)
        return pages[np.argsort(_NEVER - self._next[pages], kind="stable")[: max(n, 0)]]

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Do nothing."""

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return all pages as one generation."""
        return [(0, int(pages.sum()))]

    def counters(self) -> dict[str, float]:
        """Return the current window."""
        return {"window": self._window}

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return the window that touches a page next."""
        return {"next_window": int(self._next[gfn])}
