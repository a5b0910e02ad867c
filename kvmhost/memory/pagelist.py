"""Lists of guest pages, checked once on entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.errors import LayoutError
from kvmhost.memory.guest import GuestMemory

__all__ = ["PageList", "page_list"]


@dataclasses.dataclass(frozen=True)
class PageList:
    """Pages of one :class:`~kvmhost.memory.guest.GuestMemory`, in the order given.

    Both arrays have shape ``(n,)``.

    :param gfns: each in a memory region
    :param indexes: each page's number over all regions
    """

    gfns: npt.NDArray[np.int64]
    indexes: npt.NDArray[np.uint32]


def page_list(memory: GuestMemory, gfns: PageList | Iterable[int] | npt.NDArray[Any]) -> PageList:
    """Find pages in memory; a list that was checked before is returned unchanged.

    :raises LayoutError: naming the first gfn that is in no region
    """
    if isinstance(gfns, PageList):
        return gfns
    values = gfns if isinstance(gfns, np.ndarray) else np.array(list(gfns), dtype=np.int64)
    wanted = np.ascontiguousarray(values, dtype=np.int64)
    indexes = np.full(wanted.size, -1, dtype=np.int64)
    first = 0
    for region in memory.regions:
        inside = (wanted >= region.gfn) & (wanted < region.gfn + region.n_pages)
        indexes[inside] = wanted[inside] - region.gfn + first
        first += region.n_pages
    if (indexes < 0).any():
        at = int(np.flatnonzero(indexes < 0)[0])
        bad = int(wanted[at]) % (1 << 64)
        raise LayoutError(f"gfn {bad:#x} is in no memory region", field=f"gfns[{at}]")
    return PageList(wanted, indexes.astype(np.uint32))
