"""Refused means untouched: every route of a daemon, each with requests that it refuses."""

from __future__ import annotations

import json
import threading

import pytest
from fake_vm import Events, FakeVm, make_daemon
from raw_http import ask
from refused import assert_refused_untouched, refusals
from waiting import DEADLINE_S, until

from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.reclaim.account.events import PassReport
from kvmhost.reclaim.control.metrics import Metrics
from kvmhost.reclaim.control.paths import lock_daemon
from kvmhost.reclaim.control.server import DaemonServer, _Routes
from kvmhost.units import Seconds

BODIES = {("POST", "/v1/lru_gen"), ("POST", "/v1/lru_gen/enabled")}
#: By route: requests that are refused for what they ask, as query, body, status and field.
WRONG = {
    ("GET", "/metrics"): [],
    ("GET", "/v1/status"): [],
    ("GET", "/v1/config"): [],
    ("GET", "/v1/decisions"): [
        ("count=0", b"", 400, "count"),
        ("after=-1", b"", 400, "after"),
        ("gfn=x", b"", 400, "gfn"),
    ],
    ("GET", "/v1/page"): [
        ("vm=a", b"", 400, "gfn"),
        ("gfn=5", b"", 400, "vm"),
        ("vm=nosuch&gfn=5", b"", 404, "vm"),
        ("vm=a&gfn=-1", b"", 400, "gfn"),
        ("vm=a&gfn=99999999", b"", 400, ""),
    ],
    ("GET", "/v1/lru_gen"): [
        ("vm=nosuch", b"", 400, ""),
        ("full=perhaps", b"", 400, "full"),
    ],
    ("POST", "/v1/lru_gen"): [
        ("", b'{"command": "+ a 0 99999"}', 400, ""),
        ("", b'{"command": "- a 1 0"}', 400, ""),
        ("", b'{"command": "* a 0 0"}', 400, ""),
        ("", b'{"command": ""}', 400, "command"),
        ("", b"{}", 400, "command"),
        # The first command is good, and is not run either.
        ("", b'{"command": "+ a 0 SEQ; + nosuch 0 1"}', 400, ""),
        ("", b'{"command": "+ a 0 SEQ; what"}', 400, ""),
    ],
    ("GET", "/v1/lru_gen/enabled"): [
        ("", b"", 400, "vm"),
        ("vm=nosuch", b"", 400, ""),
    ],
    ("POST", "/v1/lru_gen/enabled"): [
        ("", b'{"vm": "a", "value": "perhaps"}', 400, ""),
        ("", b'{"vm": "a", "value": "0x8000"}', 400, ""),
        ("", b'{"vm": "nosuch", "value": "n"}', 400, ""),
        ("", b'{"vm": "a"}', 400, "value"),
    ],
}


@pytest.fixture
def world(vms, tmp_path, monkeypatch):
    """A daemon that has made a pass over a VM, and makes no other."""
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path))
    vms["a"] = FakeVm("a")
    events = Events()
    daemon = make_daemon(["a"], events, interval=Seconds(3600))
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        until(lambda: events.of(PassReport), "the pass")
        with DaemonServer(daemon, Metrics(daemon), lock_daemon("d")) as server:
            yield daemon, server
    finally:
        daemon.stop()
        thread.join(DEADLINE_S)


def whole_state(daemon, server, vm):
    """Return everything that a request could have changed."""
    (session,) = daemon.sessions()
    return {
        "generations": [line.split()[0] for line in json.loads(
            ask(server, "GET", "/v1/lru_gen")[1])["text"].splitlines()],
        "passes": session.passes,
        "caps": session.driver.policy.caps,
        "max_seq": session.driver.policy.max_seq,
        "decisions": [one.number for one in daemon.context.decisions.last(1000)],
        "config": ask(server, "GET", "/v1/config"),
        "vm": (len(vm.asked), len(vm.masks), vm.window, vm.limit, vm.here.tolist()),
    }  # fmt: skip


def test_the_table_has_every_route(world):
    table = _Routes(*(None,) * 4)._table
    assert set(WRONG) == {(method, path) for path, methods in table.items() for method in methods}


@pytest.mark.parametrize(("method", "path"), WRONG, ids=" ".join)
def test_what_is_refused_changes_nothing(world, vms, method, path):
    daemon, server = world
    seq = str(daemon.sessions()[0].driver.policy.max_seq).encode()
    own = [(query, body.replace(b"SEQ", seq), *rest) for query, body, *rest in WRONG[method, path]]
    cases = refusals(own, takes_body=(method, path) in BODIES)
    assert_refused_untouched(
        server, method, path, cases, lambda: whole_state(daemon, server, vms["a"])
    )
