"""Where the pages of a machine are, and what happened to them: one reply for recorders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import n_words, pack
from kvmhost.control.schema import Residency
from kvmhost.machine.base import BaseMachine
from kvmhost.pager.results import PageEvent, PageEvents, PageState

__all__ = ["residency_of"]

_EVICTED = (PageState.EVICTED, PageState.LOST, PageState.SWAPPED)


def residency_of(machine: BaseMachine, since: int) -> Residency:
    """Return the residency of all pages, and the events from number ``since`` on.

    Events are read before the states: a page whose eviction is listed can be back by then.
    """
    memory = machine.memory
    nothing = np.zeros(0, dtype=np.int64)
    events = PageEvents(nothing, nothing.astype(np.uint8), 0, 0)
    if machine.has_pager:
        events = machine.open_pager().events(since)
        states = machine.open_pager().states()
        resident, evicted = states == PageState.RESIDENT, np.isin(states, _EVICTED)
    else:
        resident = memory.resident()
        evicted = memory.held() & ~resident
    return Residency(
        resident=_by_gfn(machine, resident),
        evicted=_by_gfn(machine, evicted),
        counts={
            event.name.lower(): int(np.count_nonzero(events.events == event)) for event in PageEvent
        },
        gfns={
            event.name.lower(): np.unique(events.gfns[events.events == event])
            .astype("<u8")
            .tobytes()
            for event in PageEvent
        },
        next=events.next,
        lost=events.lost,
    )


def _by_gfn(machine: BaseMachine, mask: npt.NDArray[np.bool_]) -> bytes:
    """Return the bitmap by gfn of a mask by page number, which has no holes."""
    memory = machine.memory
    bits = np.zeros(64 * n_words(memory.gfn_end), dtype=bool)
    first = 0
    for region in memory.regions:
        part = mask[first : first + region.n_pages]
        bits[region.gfn : region.gfn + region.n_pages] = part
        first += region.n_pages
    return pack(bits).astype("<u8").tobytes()
