"""Clears only a sample of the pages, to reduce the cost of re-arming for the guest.

A harvest with a sample mask reports every page that was touched since it was cleared
last, and clears one page in ``period``. Over ``period`` harvests every page is
cleared once. Each harvest costs the guest that much less and no touch is missed; a page
that is no longer touched keeps reading as young for up to ``period`` harvests.

Neighbours are cleared together, 64 at a time: every range that is zapped flushes
the TLBs of running vCPUs, and pages sampled one by one would cost a flush each.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, pack
from kvmhost.errors import LayoutError
from kvmhost.vm.harvest import MIN_FRACTION

__all__ = ["DEFAULT_FRACTION", "Sampler", "period_of", "sample_mask"]

#: The largest power of a half that keeps a guest's loss well under 3 %, measured by
#: ``kvmhost bench sampling`` (1 GiB, a tenth of it hot, one harvest a second).
DEFAULT_FRACTION = 1 / 8
_MAX_PERIOD = round(1 / MIN_FRACTION)
_BLOCK_SHIFT = 6
#: Ranges whose turns are kept; the least recently used one is dropped first.
_MAX_RANGES = 256


def sample_mask(n_pages: int, period: int, turn: int, gfn_start: int = 0) -> Words:
    """Return a mask for :meth:`Tracker.harvest` that holds one page in ``period``.

    The turn of a page depends only on its gfn; each aligned group of 64 pages shares one.

    :raises LayoutError: if ``period`` is not in [1, 65536]
    """
    if not 1 <= period <= _MAX_PERIOD:
        raise LayoutError(f"a sample of one page in {period}: need 1 to {_MAX_PERIOD}")
    return pack(_turns(n_pages, period, gfn_start) == np.uint16(turn % period))


@functools.lru_cache(maxsize=1)
def _turns(n_pages: int, period: int, gfn_start: int) -> npt.NDArray[np.uint16]:
    # Hashed, so that a strided workload is spread over all turns.
    with np.errstate(over="ignore"):
        gfns = np.arange(n_pages, dtype=np.uint64) + np.uint64(gfn_start)
        mixed = (gfns >> np.uint64(_BLOCK_SHIFT)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
    return (mixed * np.uint64(period) >> np.uint64(32)).astype(np.uint16)


def period_of(fraction: float) -> int:
    """Return the period that comes nearest to clearing a fraction of the pages.

    :raises LayoutError: if the fraction is not in [1/65536, 1]
    """
    if not MIN_FRACTION <= fraction <= 1:
        raise LayoutError(f"a sample of {fraction:g}: need a fraction from 1/{_MAX_PERIOD} to 1")
    return round(1 / fraction)


class Sampler:
    """Counts the turns per range, so that harvests of different ranges are independent."""

    def __init__(self) -> None:
        self._turns: dict[tuple[int, int], int] = {}

    def next_mask(self, gfn_start: int, n_pages: int, fraction: float) -> Words:
        """Return the mask for the next harvest of a range.

        :raises LayoutError: if the fraction is not in [1/65536, 1]
        """
        period = period_of(fraction)
        turn = self._turns.pop((gfn_start, n_pages), -1) + 1
        mask = sample_mask(n_pages, period, turn, gfn_start)
        self._turns[gfn_start, n_pages] = turn
        if len(self._turns) > _MAX_RANGES:
            del self._turns[next(iter(self._turns))]
        return mask
