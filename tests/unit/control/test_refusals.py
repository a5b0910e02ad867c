"""Refused means untouched, and no answer is larger than the VM."""

from __future__ import annotations

import json
import socket
import threading
import tracemalloc

import pytest
from raw_http import ask
from waiting import until

from kvmhost.control.client import Client
from kvmhost.errors import LayoutError, PagerError

GFN_END = 0x4000 + 256
N_PAGES = 1024 + 256


@pytest.fixture
def vm(serve):
    serve()
    with Client("fake", timeout_s=20) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "field"),
    [
        ("POST", "/v1/harvest?n_pages=268435456", "n_pages"),
        ("POST", "/v1/harvest?n_pages=1099511627776&table_format=ept", "n_pages"),
        ("POST", "/v1/harvest?gfn_start=4503599627370495&n_pages=1", "gfn_start"),
        ("POST", "/v1/harvest?gfn_start=4503599627370495", "gfn_start"),
        ("POST", f"/v1/harvest?gfn_start={GFN_END - 1}&n_pages=2", "n_pages"),
        ("GET", "/v1/resident?n_pages=268435456", "n_pages"),
        ("GET", "/v1/resident?gfn_start=4503599627370495", "gfn_start"),
    ],
)
def test_a_range_beyond_the_vm_costs_nothing(serve, machine, method, path, field):
    server = serve()
    machine.use_tracker().young = {5}
    assert ask(server, "GET", "/v1/state")[0] == 200
    tracemalloc.start()
    try:
        status, body = ask(server, method, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    problem = json.loads(body)["error"]
    assert (status, problem["field"]) == (400, field)
    assert f"memory ends at gfn {GFN_END:#x}" in problem["message"]
    assert peak < 4 << 20
    assert machine.tracker.young == {5}


def test_the_whole_vm_can_be_asked_for(vm):
    assert vm.harvest(0, GFN_END).young.n_pages == GFN_END
    assert vm.harvest(GFN_END).young.n_pages == 0
    assert vm.resident(GFN_END - 1).size == 1


@pytest.mark.parametrize("call", ["evict", "set_victims"])
def test_a_list_longer_than_the_vm_is_refused(vm, machine, call):
    with pytest.raises(LayoutError, match=f"the VM has {N_PAGES}"):
        getattr(vm, call)([5] * (N_PAGES + 1))
    assert (machine.has_pager, machine.open_pager().victims) == (False, [])
    getattr(vm, call)([5] * N_PAGES)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/limit", b'{"resident_max_bytes":1,"\xff":1}'),
        ("PUT", "/v1/lease", b'{"holder":"\xff"}'),
        ("PUT", "/v1/victims", b'{"gfns":' + b"[" * 10000),
        ("PUT", "/v1/lease", b'{"zz":' + b"[" * 10000),
    ],
)
def test_what_is_no_text_or_too_deep_is_refused(serve, method, path, body):
    assert ask(serve(), method, path, body)[0] == 400


def test_a_limit_that_cannot_be_reached_leaves_the_one_before(vm, machine):
    vm.set_limit(1 << 20)
    pager = machine.open_pager()

    def fail():
        raise PagerError("the store is full")

    pager.shrink = fail
    with pytest.raises(PagerError, match="store is full"):
        vm.shrink(1 << 16)
    assert pager.resident_max_bytes == 256 * 4096
    assert vm.state().resident_max_bytes == 1 << 20


def test_a_harvest_for_an_unknown_model_clears_nothing(serve, machine, monkeypatch):
    from kvmhost.mmu import feed

    def fail(*_):
        raise LayoutError("slots do not fit")

    monkeypatch.setattr(feed, "Feed", fail)
    machine.use_tracker().young = {5}
    status, _ = ask(serve(), "POST", "/v1/harvest?table_format=radix")
    assert (status, machine.tracker.young) == (400, {5})


def test_a_client_that_left_before_its_turn_is_not_served(serve, machine):
    server = serve()
    held, go = threading.Event(), threading.Event()
    calls = []

    def hold():
        calls.append(1)
        held.set()
        go.wait(60)

    machine.hold = hold
    first = threading.Thread(target=ask, args=(server, "POST", "/v1/harvest"))
    first.start()
    try:
        assert held.wait(60)
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as leaver:
                leaver.connect(str(server.path))
                leaver.sendall(b"POST /v1/harvest HTTP/1.1\r\nHost: vm\r\n\r\n")
                # Taken in: the server answers others that came after it.
                assert ask(server, "GET", "/v1/state")[0] == 200
        assert ask(server, "GET", "/v1/state")[0] == 200
    finally:
        go.set()
        first.join(60)
    status, _ = ask(server, "POST", "/v1/harvest")
    assert status == 200
    until(lambda: len(calls) == 2, f"{len(calls)} harvests: those of the clients that left")
