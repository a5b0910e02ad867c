"""What a pager said about one window: where pages are, and what happened to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, n_words, pack, sub_words
from kvmhost.control.schema import Residency
from kvmhost.reclaim.record.meta import EVENTS, STATES

__all__ = ["WindowResidency", "residency_of_window"]


@dataclasses.dataclass(frozen=True)
class WindowResidency:
    """Residency at the end of a window, and the events in it.

    :param bits: by name of :data:`~.meta.STATES` and :data:`~.meta.EVENTS`: one bit per page
        of the record
    :param counts: by name of an event: how often; a page can have an event several times
    :param is_complete: no event is missing
    """

    bits: dict[str, Words]
    counts: dict[str, int]
    is_complete: bool = True

    def count(self, state: str) -> int:
        """Return the number of pages in a state at the end of the window."""
        return int(np.unpackbits(self.bits[state].view(np.uint8)).sum())


def residency_of_window(
    parts: Iterable[Residency], gfn_start: int, n_pages: int
) -> WindowResidency:
    """Combine the replies for one window; the last one has the states.

    :param parts: replies to requests, one after the other, until no event was left
    """
    parts = list(parts)
    bits = {
        name: _words(np.frombuffer(getattr(parts[-1], name), dtype="<u8"), gfn_start, n_pages)
        for name in STATES
    }
    for name in EVENTS:
        seen = np.zeros(n_pages, dtype=bool)
        for part in parts:
            gfns = np.frombuffer(part.gfns.get(name, b""), dtype="<u8")
            inside = (gfns >= gfn_start) & (gfns < gfn_start + n_pages)
            seen[(gfns[inside] - np.uint64(gfn_start)).astype(np.int64)] = True
        bits[name] = pack(seen)
    return WindowResidency(
        bits,
        {name: sum(part.counts.get(name, 0) for part in parts) for name in EVENTS},
        is_complete=not any(part.lost for part in parts),
    )


def _words(whole: npt.NDArray[np.uint64], gfn_start: int, n_pages: int) -> Words:
    """Return the bits of a range of pages of a bitmap that begins at gfn 0."""
    wanted = n_words(gfn_start + n_pages)
    padded = np.zeros(max(wanted, whole.size), dtype=np.uint64)
    padded[: whole.size] = whole
    return sub_words(padded, 64 * padded.size, gfn_start, n_pages)
