"""What every policy does: it is told what pages did, and says which should go.

A policy sees pages as gfns from 0 up to a fixed end. It acts on nothing and knows
no VM; what it says is an opinion that others may drop. Masks are boolean arrays by
gfn, of shape ``(n_pages,)``.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Gfns", "Mask", "Policy"]

Mask = npt.NDArray[np.bool_]
Gfns = npt.NDArray[np.int64]


class Policy(Protocol):
    """Decides which pages go first."""

    name: str

    def age(self, young: Mask) -> None:
        """Take one harvest: the pages that were touched since the one before."""

    def evicted(self, gfns: Gfns) -> None:
        """Take note that these pages went."""

    def refaulted(self, pages: Mask) -> None:
        """Take note that these pages came (back), and so are in use."""

    def victims(self, n: int, candidates: Mask) -> Gfns:
        """Return up to ``n`` of the candidates, the best to evict first.

        Fewer come back where the policy protects the rest.
        """

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return (generation, how many of the pages are in it), the oldest first."""
