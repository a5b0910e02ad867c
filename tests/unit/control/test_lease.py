"""Who looks after a VM: one at a time, and gone when it is gone."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time

import pytest
from waiting import DEADLINE_S, until

from kvmhost.control.client import Client
from kvmhost.control.schema import LeaseRequest
from kvmhost.errors import ControlError, LayoutError


@pytest.fixture
def connect(serve):
    serve()
    made = []

    def client():
        made.append(Client("fake", timeout_s=10))
        return made[-1]

    yield client
    for one in made:
        one.close()


def refused(call, *args):
    with pytest.raises(ControlError) as caught:
        call(*args)
    assert caught.value.status == 423
    return caught.value.problem


def test_a_second_holder_is_refused_and_told_who_has_it(connect):
    first, second = connect(), connect()
    assert first.lease() is None
    first.take_lease(LeaseRequest("first", socket="/run/x.sock"))
    assert "looked after by first (process" in refused(second.take_lease, LeaseRequest("second"))
    held = second.lease()
    assert (held.holder, held.socket, held.ttl_s) == ("first", "/run/x.sock", 10.0)
    assert second.state().lease.pid == held.pid > 0
    # The refused one has no token, and is a person with a tool.
    assert second.resident().size
    first.take_lease(LeaseRequest("first", ttl_s=5))
    assert second.lease().ttl_s == 5


def test_given_back_it_is_free(connect):
    first, second = connect(), connect()
    first.take_lease(LeaseRequest("first"))
    first.give_back_lease()
    second.take_lease(LeaseRequest("second"))
    assert second.lease().holder == "second"
    refused(lambda: connect().give_back_lease())


def test_taken_over_the_first_can_do_nothing_more(connect, machine, caplog):
    first, second = connect(), connect()
    first.take_lease(LeaseRequest("first"))
    second.take_lease(LeaseRequest("second", take_over=True))
    assert "it is with second" in refused(first.evict, [5])
    refused(first.set_limit, 0)
    assert machine._pager.out == set()
    assert second.evict([5]).done == 1
    assert "second takes over from first" in caplog.text


def test_a_holder_that_hangs_is_noticed_in_the_log(connect, caplog):
    first, second = connect(), connect()
    first.take_lease(LeaseRequest("sleepy", ttl_s=0.2))
    until(lambda: second.lease() is None, "the lease lapses")
    assert "sleepy" in caplog.text
    assert "has not called for" in caplog.text
    assert "nobody has it now" in refused(first.resident)
    second.take_lease(LeaseRequest("second"))


def test_every_request_renews(connect, caplog):
    first, second = connect(), connect()
    first.take_lease(LeaseRequest("lively", ttl_s=3600))
    for _ in range(3):
        until(lambda: second.lease().silent_s > 0.05, "the holder is silent for a while")
        asked_s = time.monotonic()
        first.resident()
        # The silence counts from that request on, which came after asked_s.
        assert second.lease().silent_s <= time.monotonic() - asked_s
    assert second.lease().holder == "lively"
    assert caplog.text == ""


def test_a_request_in_work_holds_it(connect, machine):
    first, second = connect(), connect()
    first.take_lease(LeaseRequest("slow", ttl_s=0.1))
    held = []

    def lapsed():
        info = second.lease()
        return info is None or info.silent_s > 0.1

    def work():
        until(lapsed, "the holder is silent for longer than its time-out")
        # The timer that would end the lease is due: it runs before the next answer.
        held.append(second.lease())

    machine.hold = work
    first.harvest()
    assert held[0].holder == "slow"


def _hold(ready):
    with Client("fake") as client:
        client.take_lease(LeaseRequest("doomed", ttl_s=3600))
        ready.set()
        signal.pause()


def test_a_holder_that_is_killed_loses_it_at_once(connect, caplog):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=_hold, args=(ready,))
    process.start()
    try:
        assert ready.wait(DEADLINE_S)
        vm = connect()
        assert vm.lease().pid == process.pid
        process.kill()
        until(lambda: vm.lease() is None, "the end of the process is noticed")
        assert "doomed (process" in caplog.text
        assert "has ended" in caplog.text
    finally:
        process.kill()
        process.join(DEADLINE_S)
        process.close()


@pytest.mark.parametrize(
    "wrong", [{"holder": ""}, {"holder": "x", "ttl_s": 0}, {"holder": "x", "y": 1}]
)
def test_wrong_terms(connect, wrong):
    client = connect()
    with pytest.raises(LayoutError):
        client._call("PUT", "lease", content=json.dumps(wrong).encode())


def test_a_pause_ends_by_itself_and_says_so(connect, machine, caplog):
    client = connect()
    state = client.pause(for_s=0.2)
    assert (state.paused, state.pause) == (True, 1)
    until(lambda: not client.state().paused, "the pause ends")
    assert machine.pauses == 0
    assert "nobody ended a pause of 0.2 s" in caplog.text
    # It is over: undoing it once more would undo someone else's.
    with pytest.raises(ControlError, match="pause 1 is over"):
        client.resume(1)


def test_pauses_nest_and_each_has_its_own_time(connect, machine):
    client = connect()
    machine.pause()
    short, long = client.pause(for_s=0.1).pause, client.pause(for_s=0).pause
    assert machine.pauses == 3
    until(lambda: machine.pauses == 2, "the short one ends")
    assert client.resume(long).paused
    with pytest.raises(ControlError):
        client.resume(short)
    # What is left is none of the socket's, such as a start with --paused.
    assert not client.resume().paused


def test_a_client_that_pauses_and_dies_leaves_the_vm_running(connect, machine):
    doomed = connect()
    doomed.pause(for_s=0.2)
    doomed.close()
    until(lambda: machine.pauses == 0, "the pause ends without anybody")
