"""The control API as the daemon uses it: the same tests over a real VM and over its fake.

The daemon's own tests run over :class:`fake_vm.FakeVm`; what they rely on is shown here
for the real client as well.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from fake_vm import FakeVm

from kvmhost.bitmap import YoungBitmap
from kvmhost.control.client import Client
from kvmhost.control.schema import LeaseRequest
from kvmhost.vm import Harvest

DONE, PINNED, ABSENT = 0, 1, 2
METHODS = (
    "counters",
    "evict",
    "give_back_lease",
    "harvest",
    "lease",
    "memory_map",
    "rearm_cost",
    "resident",
    "set_limit",
    "set_victims",
    "shrink",
    "state",
    "take_lease",
)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.requires_kvm)])
def client(request):
    """A VM that has touched its pages and is paused, so that nothing changes by itself."""
    if request.param == "fake":
        fake = FakeVm()
        fake.harvest(0, fake.memory_map().gfn_end, tracker="auto", fraction=None)
        return fake
    vm = request.getfixturevalue("hotcold")("contract", cold=0, scan_every=0)
    vm.goes_on()
    vm.client.pause(0)
    return vm.client


def candidates(client):
    """Resident gfns that are not pinned."""
    memory = client.memory_map()
    movable = client.resident(0, memory.gfn_end).copy()
    for pinned in memory.pinned:
        movable[pinned.gfn_start : pinned.gfn_start + pinned.n_pages] = False
    return np.flatnonzero(movable)


def test_memory_has_memslots_and_pinned_pages_inside(client):
    memory = client.memory_map()
    assert memory.page_bytes == 4096
    pages = {g for m in memory.memslots for g in range(m.gfn_start, m.gfn_start + m.n_pages)}
    assert max(pages) + 1 == memory.gfn_end
    pinned = {g for p in memory.pinned for g in range(p.gfn_start, p.gfn_start + p.n_pages)}
    assert pinned
    assert pinned <= pages


def test_state_of_a_running_vm(client):
    state = client.state()
    assert state.running is True
    assert isinstance(state.paused, bool)
    assert len(state.vcpus) >= 1


def test_counters_have_the_fault_latency_of_the_pager(client):
    client.set_limit(0)
    pager = client.counters().pager
    assert pager["latency_sum_ns"] >= 0
    assert all(count >= 0 for count in pager["latency_ns"])


def test_a_harvest_returns_all_pages_and_its_cost(client):
    n_pages = client.memory_map().gfn_end
    found = client.harvest(
        0, n_pages, tracker="auto", clear=True, rearm="young", fraction=None, mask=None
    )
    assert isinstance(found, Harvest)
    young = found.young
    assert isinstance(young, YoungBitmap)
    assert (young.gfn_start, young.n_pages) == (0, n_pages)
    assert young.words.shape == (-(-n_pages // 64),)
    assert found.harvest_ns >= 0
    assert found.rearm_ns >= 0
    again = client.harvest(
        0, n_pages, tracker="auto", clear=True, rearm="young", mask=young.words
    ).young
    assert (again.gfn_start, again.n_pages) == (0, n_pages)


def test_residency_is_one_boolean_per_page(client):
    n_pages = client.memory_map().gfn_end
    resident = client.resident(0, n_pages)
    assert resident.shape == (n_pages,)
    assert resident.dtype == np.bool_
    assert resident.any()


def test_an_eviction_reports_each_page_in_order(client):
    first, second = candidates(client)[:2]
    pinned = client.memory_map().pinned[0].gfn_start
    done = client.evict(np.array([second]), each=True)
    assert (done.n_pages, done.outcomes["done"], list(done.each)) == (1, 1, [DONE])
    report = client.evict(np.array([pinned, second, first]), each=True)
    assert list(report.each) == [PINNED, ABSENT, DONE]
    counted = {name: n for name, n in report.outcomes.items() if n}
    assert counted == {"pinned": 1, "absent": 1, "done": 1}
    resident = client.resident(0, client.memory_map().gfn_end)
    assert not resident[[first, second]].any()
    assert client.evict(np.array([first])).each is None


def test_the_cost_of_a_fault_is_that_of_the_tracker_in_use(client):
    found = client.harvest(0, 16, tracker="auto", fraction=None)
    tracker = found.young.provenance.tracker
    cost = client.rearm_cost()
    assert cost.tracker == tracker
    assert cost.fault_ns >= 0
    assert cost.n_pages > 0
    assert cost.tries > 0


def test_a_limit_evicts_nothing_and_a_shrink_evicts_down_to_it(client):
    n_pages = client.memory_map().gfn_end
    before = int(client.resident(0, n_pages).sum())
    assert client.set_limit(before * 4096) == before * 4096
    assert int(client.resident(0, n_pages).sum()) == before
    target = before - 64
    assert client.shrink(target * 4096).evicted_pages >= 64
    assert int(client.resident(0, n_pages).sum()) <= target


def test_victims_are_counted(client):
    client.set_limit(client.memory_map().gfn_end * 4096)
    assert client.set_victims(candidates(client)[:7]) == 7


def test_a_lease_is_held_until_it_is_given_back(client):
    assert client.lease() is None
    client.take_lease(LeaseRequest(holder="contract", ttl_s=30.0))
    held = client.lease()
    assert (held.holder, held.ttl_s) == ("contract", 30.0)
    client.give_back_lease()
    assert client.lease() is None


@pytest.mark.parametrize("name", METHODS)
def test_the_fake_takes_no_argument_that_the_client_does_not(name):
    real = inspect.signature(getattr(Client, name)).parameters
    fake = inspect.signature(getattr(FakeVm, name)).parameters
    named = {n for n, p in fake.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    assert {n for n in named if n != "self"} - set(real) <= POSITIONAL.get(name, set())


#: Arguments that the daemon passes by position, under shorter names in the fake.
POSITIONAL = {"set_limit": {"n_bytes"}, "shrink": {"n_bytes"}}


def test_the_fake_has_every_public_method_that_is_compared():
    public = {
        name
        for name, member in vars(FakeVm).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    assert public == set(METHODS)
