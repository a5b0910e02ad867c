"""Where the pages of a machine are, and what happened to them: one reply for recorders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import n_words, pack
from kvmhost.control.schema import Residency
from kvmhost.machine.base import BaseMachine
from kvmhost.pager.results import PageEvent, PageEvents, PageState

__all__ = ["most_events", "residency_bytes", "residency_of"]

#: Memory for one event: as the pager has it, by kind, as text.
_EVENT_BYTES = 48

_EVICTED = (PageState.EVICTED, PageState.LOST, PageState.SWAPPED)


def most_events(machine: BaseMachine) -> int:
    """Return how many events one reply has at most: half as many as there are pages."""
    return max(machine.memory.n_pages // 2, 4096)


def residency_bytes(machine: BaseMachine) -> int:
    """Return the memory that one reply takes while it is made."""
    memory = machine.memory
    return _EVENT_BYTES * most_events(machine) + 8 * memory.n_pages + 2 * memory.gfn_end


def residency_of(machine: BaseMachine, since: int) -> Residency:
    """Return the residency of all pages, and the events from number ``since`` on.

    Events are read before the states: a page whose eviction is listed can be back by then.
    """
    memory = machine.memory
    nothing = np.zeros(0, dtype=np.int64)
    events = PageEvents(nothing, nothing.astype(np.uint8), 0, 0)
    if machine.has_pager:
        events = machine.open_pager().events(since, most_events(machine))
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
        left=events.left,
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
