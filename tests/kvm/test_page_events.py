"""The pager's log: each event of a page once, with who decided it, for any number of readers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.pager.pager import Pager
from kvmhost.pager.results import PageEvent
from kvmhost.units import PAGE_BYTES

pytestmark = pytest.mark.requires_uffd

START = 1024


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that is not started: only the test touches its memory."""
    with Machine(image_path("hotcold"), mem_bytes=48 << 20, engine="emulated") as found:
        yield found


def fill(machine: Machine, gfns: range) -> None:
    for gfn in gfns:
        machine.memory[gfn * PAGE_BYTES : gfn * PAGE_BYTES + 8] = gfn.to_bytes(8, "little")


def touch(machine: Machine, gfn: int) -> None:
    at = gfn * PAGE_BYTES
    assert bytes(machine.memory[at : at + 8]) == gfn.to_bytes(8, "little")


def listed(pager: Pager, since: int) -> list[tuple[int, PageEvent]]:
    found = pager.events(since)
    assert found.lost == 0
    assert found.next == since + found.gfns.size
    return [(int(g), PageEvent(e)) for g, e in zip(found.gfns, found.events, strict=True)]


def test_every_kind_of_event(machine: Machine) -> None:
    fill(machine, range(START, START + 64))
    pager = machine.open_pager()
    pager.evict([START, START + 5])
    pager.evict([START + 9], event=PageEvent.EVICTED_DAEMON)
    touch(machine, START + 5)
    pager.restore(START, 3)
    pager.evict([START])
    pager.drop(START, 2)
    assert listed(pager, 0) == [
        (START, PageEvent.EVICTED_REQUEST),
        (START + 5, PageEvent.EVICTED_REQUEST),
        (START + 9, PageEvent.EVICTED_DAEMON),
        (START + 5, PageEvent.REFAULTED),
        (START, PageEvent.RESTORED),
        (START, PageEvent.EVICTED_REQUEST),
        (START, PageEvent.DROPPED),
        (START + 1, PageEvent.DROPPED),
    ]
    assert listed(pager, 3)[0] == (START + 5, PageEvent.REFAULTED)
    assert listed(pager, 8) == []


def test_pages_that_are_refused_have_no_event(machine: Machine) -> None:
    fill(machine, range(START, START + 4))
    pager = machine.open_pager()
    pager.pin(START)
    pager.evict([START, START + 1, START + 1, START + 2000])
    assert listed(pager, 0) == [(START + 1, PageEvent.EVICTED_REQUEST)]
    with pytest.raises(LayoutError):
        pager.evict([1 << 40])
    assert listed(pager, 1) == []


def test_what_the_pager_chooses_at_its_limit(machine: Machine) -> None:
    fill(machine, range(START, START + 400))
    pager = machine.open_pager()
    pager.arm()
    resident = pager.counters()["resident_pages"]
    pager.set_limit((resident - 100) * PAGE_BYTES)
    assert pager.shrink().evicted >= 100
    found = pager.events(0)
    assert set(found.events.tolist()) == {PageEvent.EVICTED_LIMIT}
    assert found.gfns.size == pager.counters()["evictions"]
    # Pages that are touched again take the room there is; then others have to go.
    back = found.gfns[:40].tolist()
    for gfn in back:
        machine.memory.view(gfn * PAGE_BYTES, 8).tobytes()
    later = listed(pager, found.next)
    assert [gfn for gfn, event in later if event is PageEvent.REFAULTED][:40] == back
    assert {event for _, event in later} == {PageEvent.EVICTED_LIMIT, PageEvent.REFAULTED}


def test_what_is_overwritten_is_counted(machine: Machine) -> None:
    n_pages = 4000
    fill(machine, range(START, START + n_pages))
    pager = machine.open_pager()
    gfns = np.arange(START, START + n_pages)
    for _ in range(9):
        pager.evict(gfns)
        pager.restore(START, n_pages)
    total = 18 * n_pages
    found = pager.events(0)
    assert (found.next, found.gfns.size, found.lost) == (total, 1 << 16, total - (1 << 16))
    assert found.gfns[-1] == START + n_pages - 1
    assert found.events[-1] == PageEvent.RESTORED
    late = pager.events(total - 10)
    assert (late.gfns.size, late.lost) == (10, 0)
    assert late.gfns.tolist() == found.gfns[-10:].tolist()
    assert pager.events(total + 1000).gfns.size == 0
