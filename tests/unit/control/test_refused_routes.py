"""Refused means untouched: every route of a VM, each with requests that it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from raw_http import ask
from refused import Refusal, assert_refused_untouched, refusals

from kvmhost.control.routes import Routes
from kvmhost.errors import CapabilityError, PagerError

GFN_END = 0x4100
#: Routes that take a body.
BODIES = {
    ("POST", "/v1/harvest"),
    ("POST", "/v1/evict"),
    ("POST", "/v1/restore"),
    ("PUT", "/v1/limit"),
    ("PUT", "/v1/victims"),
    ("POST", "/v1/snapshot"),
    ("PUT", "/v1/lease"),
}
#: By route: requests that are refused for what they ask, as query, body, status and field.
WRONG: dict[tuple[str, str], list[Refusal]] = {
    ("GET", "/v1/state"): [],
    ("GET", "/v1/memory"): [],
    ("GET", "/v1/counters"): [],
    ("GET", "/v1/rearm_cost"): [],
    ("GET", "/v1/resident"): [
        ("gfn_start=16641", b"", 400, "gfn_start"),
        ("n_pages=16641", b"", 400, "n_pages"),
        ("gfn_start=-1", b"", 400, "gfn_start"),
    ],
    ("GET", "/v1/residency"): [("since=-1", b"", 400, "since")],
    ("GET", "/v1/pages/GFN"): [],
    ("DELETE", "/v1/views/NAME"): [],
    ("POST", "/v1/harvest"): [
        ("tracker=broken", b"", 501, ""),
        ("tracker=broken&clear=0", b"", 501, ""),
        ("gfn_start=16641", b"", 400, "gfn_start"),
        ("n_pages=16641", b"", 400, "n_pages"),
        ("n_pages=1.5", b"", 400, "n_pages"),
        ("rearm=some", b"", 400, "rearm"),
        ("fraction=2", b"", 400, "fraction"),
        ("fraction=0.5&rearm=young", b"", 400, "fraction"),
        ("table_format=vax", b"", 400, "table_format"),
        ("format=ept", b"", 400, "format"),
        ("clear=perhaps", b"", 400, "clear"),
        ("max_age_s=-1", b"", 400, "max_age_s"),
        ("view=a/b", b"", 400, "view"),
        ("", b"\1\2\3", 400, "body"),
    ],
    ("POST", "/v1/evict"): [
        ("each=perhaps", b'{"gfns": [5]}', 400, "each"),
        ("actuator=hand", b'{"gfns": [5]}', 400, "actuator"),
        ("actuator=swap", b'{"gfns": [5]}', 501, ""),
        ("", b'{"gfns": [5, 9999999]}', 400, "gfns[1]"),
        ("", b'{"gfns": [5, -1]}', 400, "gfns[1]"),
        ("", b'{"gfns": [5], "force": true}', 400, "force"),
        ("", b'{"pages": [5]}', 400, "pages"),
        ("", b'{"gfns": ', 400, ""),
    ],
    ("POST", "/v1/restore"): [
        ("", b'{"gfn_start": 5, "n_pages": 0}', 400, "n_pages"),
        ("", b'{"gfn_start": 5, "n_pages": 99999}', 400, ""),
        ("", b'{"gfn_start": 9999999}', 400, ""),
        ("", b'{"gfn": 5}', 400, "gfn"),
    ],
    ("POST", "/v1/drain"): [("force=perhaps", b"", 400, "force")],
    ("PUT", "/v1/limit"): [
        ("", b'{"resident_max_bytes": 5}', 400, "resident_max_bytes"),
        ("", b'{"resident_max_bytes": -1}', 400, "resident_max_bytes"),
        ("", b'{"limit_bytes": 8192}', 400, "limit_bytes"),
        ("", b'{"resident_max_bytes": 8192, "shrink": "yes"}', 400, "shrink"),
    ],
    ("PUT", "/v1/victims"): [
        ("", b'{"gfns": [9999999]}', 400, "gfns[0]"),
        ("", b'{"gfns": [5], "n_pages": 1}', 400, "n_pages"),
    ],
    ("POST", "/v1/pause"): [
        ("for_s=-1", b"", 400, "for_s"),
        ("timeout=5", b"", 400, "timeout"),
    ],
    ("POST", "/v1/resume"): [("pause=0", b"", 400, "pause"), ("pause=77", b"", 409, "pause")],
    ("POST", "/v1/stop"): [("now=1", b"", 400, "now")],
    ("POST", "/v1/snapshot"): [
        ("", b'{"path": "relative"}', 400, "path"),
        ("", b'{"path": ""}', 400, "path"),
        ("", b'{"path": "/nonexistent/x", "keep": 1}', 400, "keep"),
    ],
    ("GET", "/v1/lease"): [],
    ("PUT", "/v1/lease"): [
        ("", b'{"holder": ""}', 400, "holder"),
        ("", b'{"holder": "x", "ttl_s": 0}', 400, "ttl_s"),
        ("", b'{"holder": "x"}', 423, ""),
    ],
    ("DELETE", "/v1/lease"): [],
}


def routes(machine: Any) -> set[tuple[str, str]]:
    """Return the routes of a VM, as its table and the paths with names in them have them."""
    table = Routes(machine, "x")._table
    found = {(method, path) for path, methods in table.items() for method in methods}
    return found | {("GET", "/v1/pages/GFN"), ("DELETE", "/v1/views/NAME")}


@pytest.fixture
def world(serve: Any, machine: Any) -> Any:
    """A VM in use: a tracker with young pages, an evicted page, a limit, a pause, a lease."""
    server = serve()
    for method, path, body in (
        ("PUT", "/v1/limit", b'{"resident_max_bytes": 1048576}'),
        ("PUT", "/v1/victims", b'{"gfns": [7, 8]}'),
        ("POST", "/v1/evict", b'{"gfns": [9]}'),
        ("POST", "/v1/harvest", b""),
        ("POST", "/v1/pause?for_s=0", b""),
        ("PUT", "/v1/lease", b'{"holder": "me", "ttl_s": 3600}'),
    ):
        status, text = ask(server, method, path, body)
        assert status == 200, text
    machine.tracker.young = {5, 6}
    return server


def _without_clocks(value: Any) -> Any:
    """Return a message without its times, which go on."""
    if isinstance(value, dict):
        return {k: _without_clocks(v) for k, v in value.items() if not k.endswith(("_s", "_ns"))}
    return [_without_clocks(part) for part in value] if isinstance(value, list) else value


def whole_state(server: Any, machine: Any) -> dict[str, Any]:
    """Return everything that a request could have changed."""
    state = _without_clocks(json.loads(ask(server, "GET", "/v1/state")[1]))
    counters = json.loads(ask(server, "GET", "/v1/counters")[1])
    pager = machine.open_pager()
    return {
        "state": state,
        "harvests": counters["harvest"],
        "tracker": id(machine.tracker),
        "young": set(machine.tracker.young),
        "rearmed": list(machine.tracker.rearmed),
        "out": set(pager.out),
        "victims": list(pager.victims),
        "limit": pager.resident_max_bytes,
        "log": list(pager.log),
        "pauses": machine.pauses,
        "running": machine.running,
    }


def test_the_table_has_every_route(machine: Any) -> None:
    assert set(WRONG) == routes(machine)


@pytest.mark.parametrize(("method", "path"), WRONG, ids=" ".join)
def test_what_is_refused_changes_nothing(world: Any, machine: Any, method: str, path: str) -> None:
    cases = refusals(
        WRONG[method, path],
        takes_body=(method, path) in BODIES,
        is_json=path != "/v1/harvest",
    )
    path = path.replace("GFN", "5").replace("NAME", "default")
    assert_refused_untouched(world, method, path, cases, lambda: whole_state(world, machine))


@pytest.mark.parametrize(("method", "path"), WRONG, ids=" ".join)
def test_an_expired_lease_and_a_wrong_method_change_nothing(
    world: Any, machine: Any, method: str, path: str
) -> None:
    before = whole_state(world, machine)
    path = path.replace("GFN", "5").replace("NAME", "default")
    kind = "application/json\r\nX-Kvmhost-Lease: expired"
    status, text = ask(world, method, path, kind=kind)
    assert (status, json.loads(text)["error"]["field"]) == (423, "X-Kvmhost-Lease")
    assert ask(world, "PATCH", path)[0] == 405
    assert whole_state(world, machine) == before


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/v1/evict", "POST", b'{"gfns": [5]}'),
        ("/v1/restore", "POST", b'{"gfn_start": 9}'),
        ("/v1/drain?force=1", "POST", b""),
        ("/v1/limit", "PUT", b'{"resident_max_bytes": 8192}'),
        ("/v1/victims", "PUT", b'{"gfns": [5]}'),
    ],
)
@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (CapabilityError("userfaultfd", "a descriptor", "none", "run as root"), 501),
        (PagerError("the store is closed"), 409),
    ],
)
def test_a_host_that_lacks_something_leaves_all_as_it_is(
    world: Any, machine: Any, path: str, method: str, body: bytes, problem: Any, status: int
) -> None:
    before = whole_state(world, machine)
    machine.pager_problem = problem
    got, text = ask(world, method, path, body)
    machine.pager_problem = None
    assert (got, json.loads(text)["error"]["kind"]) == (status, type(problem).__name__)
    assert whole_state(world, machine) == before
