"""GET /v1/residency: where pages are and what happened to them, over the control socket."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kvmhost.bitmap import unpack
from kvmhost.control.client import Client
from kvmhost.control.schema import LeaseRequest, Residency, problem_of_residency
from kvmhost.errors import LayoutError

GFN_HIGH = 0x4000


@pytest.fixture
def vm(serve):
    serve()
    with Client("fake", timeout_s=10) as client:
        yield client


def gfns_of(bits):
    words = np.frombuffer(bits, dtype="<u8")
    return np.flatnonzero(unpack(words, 64 * words.size)).tolist()


def pages_of(found, event):
    return np.frombuffer(found.gfns[event], dtype="<u8").tolist()


def test_a_vm_that_never_evicted(vm):
    found = vm.residency()
    assert (found.next, found.lost, sum(found.counts.values())) == (0, 0, 0)
    assert gfns_of(found.evicted) == []
    assert not any(found.gfns.values())


def test_pages_and_events_by_gfn_and_by_who_asked(vm):
    memory = vm.memory_map()
    every = [g for m in memory.memslots for g in range(m.gfn_start, m.gfn_start + m.n_pages)]
    vm.evict([7, 9, GFN_HIGH])
    with Client(vm.path) as daemon:
        daemon.take_lease(LeaseRequest("keeper"))
        daemon.evict([11, 12])
    vm.restore(9)
    vm.evict([9])
    first = vm.residency()
    assert gfns_of(first.evicted) == [7, 9, 11, 12, GFN_HIGH]
    assert gfns_of(first.resident) == [g for g in every if g not in (7, 9, 11, 12, GFN_HIGH)]
    assert first.counts["evicted_request"] == 4
    assert pages_of(first, "evicted_request") == [7, 9, GFN_HIGH]
    assert pages_of(first, "evicted_daemon") == [11, 12]
    assert sum(first.counts.values()) == first.next == 6
    vm.evict([13])
    later = vm.residency(first.next)
    assert pages_of(later, "evicted_request") == [13]
    assert later.counts["evicted_daemon"] == 0
    assert vm.residency(later.next).counts == dict.fromkeys(later.counts, 0)
    # Another reader, from the start.
    assert vm.residency().counts["evicted_request"] == 5


def test_a_reply_is_bounded(vm, machine):
    for _ in range(3):
        vm.evict(range(2, 1024))
        vm.restore(0, 1024)
    n_events = len(machine.open_pager().log)
    machine.open_pager().log *= 3
    found, counts = vm.residency(), 0
    assert found.left
    while True:
        counts += sum(found.counts.values())
        if not found.left:
            break
        found = vm.residency(found.next)
    assert counts == found.next == 3 * n_events


def test_a_bad_number_is_refused(vm):
    with pytest.raises(LayoutError, match="since"):
        vm.residency(-1)


def test_a_malformed_reply_is_refused(vm):
    found = vm.residency()
    n_pages = vm.memory_map().gfn_end
    assert problem_of_residency(found, n_pages) == ""
    for change in (
        {"resident": found.resident[:-8]},
        {"evicted": b""},
        {"gfns": {"dropped": bytes(7)}},
        {"next": -1},
        {"counts": {"dropped": -1}},
    ):
        bad: Residency = msgspec.structs.replace(found, **change)
        assert problem_of_residency(bad, n_pages)
