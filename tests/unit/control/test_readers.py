"""Views on the control socket: whose they are, and when they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import httpx
import pytest
from waiting import until

from kvmhost.control import schema
from kvmhost.control.client import Client
from kvmhost.control.peers import Peer, PeerFinder
from kvmhost.errors import ControlError, InUseError, LayoutError


@pytest.fixture
def vm(serve):
    serve()
    with Client("fake", timeout_s=60) as client:
        yield client


def names(vm: Client) -> list[str]:
    return [view.name for view in vm.state().views]


def read(vm: Client, machine, gfns: set[int], **how) -> list[int]:
    machine.tracker.young |= gfns
    return list(vm.harvest(**how).young)


def test_two_views_get_the_same_pages(vm, machine):
    for name in ("a", "b"):
        vm.harvest(view=name)
    assert read(vm, machine, {5, 70}, view="a") == [5, 70]
    assert read(vm, machine, {6}, view="b") == [5, 6, 70]
    assert read(vm, machine, {7}, view="a") == [6, 7]
    assert list(vm.harvest().young) == [5, 6, 7, 70]


def test_the_state_lists_views_with_their_readers(vm, machine):
    assert vm.state().views[0].name == "default"
    vm.harvest(view="a")
    read(vm, machine, {5, 70})
    default, own = vm.state().views
    assert (default.name, default.pid, default.harvests, default.n_young) == ("default", 0, 1, 0)
    assert (own.name, own.pid, own.harvests, own.n_young) == ("a", os.getpid(), 0, 2)
    assert own.process
    assert 0 <= default.window_s <= own.window_s


def test_the_counters_have_sweeps_of_all_readers(vm, machine):
    vm.harvest(view="a")
    read(vm, machine, {5, 70})
    vm.harvest(clear=False)
    totals = vm.counters().harvest
    assert (totals.harvests, totals.sweeps, totals.n_cleared) == (3, 2, 2)


def test_a_harvest_may_end_with_the_sweep_of_another(vm, machine):
    for name in ("a", "b"):
        vm.harvest(view=name)
    read(vm, machine, {5}, view="a")
    assert read(vm, machine, {6}, view="b", max_age_s=3600) == [5]
    assert vm.counters().harvest.sweeps == 3


def test_a_client_ends_its_views_when_it_closes(vm, machine):
    with Client("fake") as other:
        other.harvest(view="other")
        assert names(vm) == ["default", "other"]
    assert names(vm) == ["default"]


def test_a_view_is_ended_once(vm):
    vm.harvest(view="a")
    assert vm.close_view("a")
    assert names(vm) == ["default"]
    assert not vm.close_view("a")
    assert not vm.close_view("default")
    with pytest.raises(ControlError, match="the caller reads no view 'a'") as refused:
        vm._call("DELETE", "views/a")
    assert refused.value.status == 404


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "é", "x" * 33])
def test_such_a_name_is_refused(vm, machine, name):
    with pytest.raises(LayoutError, match="view"):
        vm.harvest(view=name)
    with pytest.raises(LayoutError, match="view"):
        vm.close_view(name)
    answer = vm._http.post("harvest", params={"view": name})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "view")
    assert machine.tracker is None


@pytest.mark.parametrize("age", ["-1", "86401", "nan", "inf", "soon"])
def test_such_an_age_is_refused(vm, machine, age):
    answer = vm._http.post("harvest", params={"max_age_s": age})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "max_age_s")
    assert machine.tracker is None


def test_one_view_too_many_is_refused(vm):
    for number in range(16):
        vm.harvest(view=f"v{number}")
    with pytest.raises(InUseError, match=r"one more than the 16.*v0 \(process \d+\)"):
        vm.harvest(view="more")
    assert len(names(vm)) == 17
    vm.close_view("v3")
    vm.harvest(view="more")


# -- readers in other processes --------------------------------------------------------

_READER = """
    import sys
    from kvmhost.control.client import Client

    vm = Client("fake")
    vm.harvest(view="mine")
    print("reads", flush=True)
    for line in sys.stdin:
        print(*vm.harvest(view="mine").young, flush=True)
"""


@pytest.fixture
def reader(vm):
    """Another process that reads the view ``mine``."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_READER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reads\n"
        yield process
        process.kill()


def ask(process: subprocess.Popen) -> list[int]:
    process.stdin.write("\n")
    process.stdin.flush()
    return [int(word) for word in process.stdout.readline().split()]


def test_the_same_name_of_another_process_is_another_view(vm, machine, reader):
    vm.harvest(view="mine")
    assert read(vm, machine, {5}, view="mine") == [5]
    assert read(vm, machine, {6}, view="mine") == [6]
    assert ask(reader) == [5, 6]
    assert names(vm) == ["default", "mine", "mine"]
    vm.close_view("mine")
    assert [view.pid for view in vm.state().views] == [0, reader.pid]


def test_a_view_ends_with_its_process(vm, machine, reader):
    assert names(vm) == ["default", "mine"]
    reader.send_signal(signal.SIGKILL)
    until(lambda: names(vm) == ["default"], "the view has ended")


def test_a_stopped_reader_hurts_nobody(vm, machine, reader):
    reader.send_signal(signal.SIGSTOP)
    vm.harvest(view="own")
    for gfn in range(20):
        assert read(vm, machine, {gfn}, view="own") == [gfn]
    reader.send_signal(signal.SIGCONT)
    assert ask(reader) == list(range(20))


def test_a_view_ends_with_the_lease_under_which_it_was_opened(vm, machine):
    with Client("fake") as daemon:
        daemon.take_lease(schema.LeaseRequest(holder="test"))
        daemon.harvest(view="reclaimd")
        vm.harvest(view="record")
        daemon.give_back_lease()
        until(lambda: names(vm) == ["default", "record"], "the daemon's view has ended")


def test_a_view_ends_when_the_lease_is_taken_over(vm, machine):
    with Client("fake") as first:
        first.take_lease(schema.LeaseRequest(holder="first"))
        first.harvest(view="reclaimd")
        vm.take_lease(schema.LeaseRequest(holder="second", take_over=True))
        until(lambda: names(vm) == ["default"], "the first one's view has ended")


def test_a_reader_without_a_process_is_its_connection(serve, machine, monkeypatch):
    """As of a client in another PID namespace, whose process the kernel does not name."""
    monkeypatch.setattr(PeerFinder, "find", lambda self, connection: Peer(0, os.geteuid()))
    server = serve()
    transport = httpx.HTTPTransport(uds=str(server.path))
    with Client("fake") as vm:
        with httpx.Client(transport=transport, base_url="http://vm/v1/") as other:
            for _ in range(2):
                assert other.post("harvest", params={"view": "a"}).status_code == 200
            vm.harvest(view="a")
            assert names(vm) == ["default", "a", "a"]
            assert [view.pid for view in vm.state().views] == [0, 0, 0]
        until(lambda: names(vm) == ["default", "a"], "the view has ended")
