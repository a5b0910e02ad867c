"""Requests of any shape to a real VM: an answer or a refusal, and the guest's data stay whole.

``FUZZ_EXAMPLES=20000 pytest -o faulthandler_timeout=0 --timeout 0`` and this file go on for longer:
the watchdog reads the stacks of running threads, which can crash the interpreter.
``stop`` is left out, as it ends the VM, and so is ``snapshot``, which writes where it is told.
"""

from __future__ import annotations

import asyncio
import json
import os

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmhost.control.handler import Reply, Request
from kvmhost.control.peers import Peer
from kvmhost.control.routes import Routes
from kvmhost.guests import image_path
from kvmhost.machine import Machine

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
REFUSALS = {400, 404, 405, 409, 423, 501, 507}
PATHS = ["state", "memory", "counters", "resident", "harvest", "evict", "restore", "drain"]
PATHS += ["limit", "victims", "pause", "resume", "lease", "pages/0", "pages/0x401", "pages/x"]

numbers = st.one_of(
    st.integers(-2, 70), st.integers(1024, 1200), st.integers(), st.floats(allow_nan=True)
)
words = st.one_of(numbers.map(str), st.text(max_size=8), st.sampled_from(["0x400", "1", "true"]))
keys = st.sampled_from(
    [
        "gfn_start",
        "n_pages",
        "tracker",
        "clear",
        "rearm",
        "fraction",
        "table_format",
        "each",
        "for_s",
        "actuator",
        "force",
    ]
)
names = ["guestpt", "pagemap", "uffd", "dirty", "auto", "young", "all", "none", "sample", "ept"]
queries = st.dictionaries(
    st.one_of(keys, st.text(max_size=5)), st.one_of(words, st.sampled_from(names)), max_size=4
)
fields = st.sampled_from(
    ["gfn_start", "n_pages", "gfns", "resident_max_bytes", "shrink", "holder", "ttl_s", "take_over"]
)
values = st.recursive(
    st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=8,
)
bodies = st.one_of(
    st.just(b""),
    st.binary(max_size=40),
    st.lists(st.integers(1000, 1200), max_size=80).map(
        lambda gfns: np.array(gfns, dtype="<u8").tobytes()
    ),
    st.dictionaries(st.one_of(fields, st.text(max_size=5)), values, max_size=4).map(
        lambda found: json.dumps(found).encode()
    ),
)
requests = st.builds(
    Request,
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "BREW"]),
    path=st.one_of(st.sampled_from(PATHS).map("/v1/".__add__), st.text(max_size=12)),
    query=queries,
    body=bodies,
    is_json=st.booleans(),
    peer=st.just(Peer(os.getpid(), os.getuid())),
    lease=st.one_of(st.just(""), st.text(max_size=6)),
)


async def ask(routes: Routes, request: Request) -> Reply | Exception:
    try:
        return await routes.find(request.method, request.path)(request)
    except Exception as error:  # noqa: BLE001 - whatever it is, problem_of() has to know it
        return error


def check(routes: Routes, request: Request, answer: Reply | Exception) -> None:
    if isinstance(answer, Reply):
        return
    problem = routes.problem_of(answer)
    assert problem.status in REFUSALS, (request, answer)
    assert problem.message


def test_any_requests() -> None:
    params = {"pages": 128, "hot": 32, "epochs": 0, "scan_every": 0}
    with Machine(image_path("hotcold"), mem_bytes=6 << 20, params=params) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        loop = asyncio.new_event_loop()
        routes = Routes(machine, "fuzzed")

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(asked=st.lists(requests, max_size=12))
        def some(asked: list[Request]) -> None:
            for request in asked:
                check(routes, request, loop.run_until_complete(ask(routes, request)))

        async def cancel_timers() -> None:
            routes.cancel_timers()

        try:
            some()
        finally:
            loop.run_until_complete(cancel_timers())
            routes.close()
            loop.close()
        assert machine.error is None
        # The guest checks all that it wrote before.
        if machine.has_pager:
            machine.open_pager().set_limit(0)
        for _ in range(3):
            assert machine.run_epoch()
        assert machine.result().status == 0
