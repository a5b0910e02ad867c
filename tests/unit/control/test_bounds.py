"""What a server does when there is too much: connections, descriptors, bytes, log lines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import subprocess
import sys

import pytest
from waiting import until

from kvmhost.control import peers
from kvmhost.control.client import Client
from kvmhost.control.inflight import SMALL_BYTES, ByteBudget
from kvmhost.control.peers import Peer
from kvmhost.control.ratelog import RateLimitedLog
from kvmhost.control.routes import Routes
from kvmhost.control.schema import LeaseRequest
from kvmhost.memory.guest import GuestMemory, Region

STATE = b"GET /v1/state HTTP/1.1\r\nHost: vm\r\n\r\n"
EVICT = b"POST /v1/evict HTTP/1.1\r\nHost: vm\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n"
HARVEST = b"POST /v1/harvest HTTP/1.1\r\nHost: vm\r\n\r\n"


def connect(server):
    with contextlib.ExitStack() as undo:
        peer = undo.enter_context(socket.socket(socket.AF_UNIX))
        peer.settimeout(60)
        peer.connect(str(server.path))
        undo.pop_all()
    return peer


def status_of(peer, raw=STATE):
    """Return the status of an answer; None: hung up."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        peer.sendall(raw)
        head = peer.recv(1 << 16)
        return int(head.split()[1]) if head else None
    return None


def at_work(peer):
    """Send a request of which the server waits for the body."""
    peer.sendall(EVICT)
    assert peer.recv(100).startswith(b"HTTP/1.1 100 ")
    return peer


def test_the_oldest_idle_connection_makes_room(serve):
    server = serve(max_connections=4, request_deadline_s=100)
    with contextlib.ExitStack() as stack:
        busy = at_work(stack.enter_context(connect(server)))
        slow = [stack.enter_context(connect(server)) for _ in range(5)]
        slow[0].sendall(b"GET")
        for _ in range(20):
            with connect(server) as peer:
                assert status_of(peer) == 200
        with contextlib.suppress(ConnectionResetError):
            assert slow[0].recv(1) == b""
        assert status_of(busy, bytes(8)) == 200


def test_connections_in_use_are_not_closed_for_new_ones(serve):
    server = serve(max_connections=3, request_deadline_s=100)
    with contextlib.ExitStack() as stack:
        # Root has one more.
        busy = [
            at_work(stack.enter_context(connect(server))) for _ in range(3 + (os.geteuid() == 0))
        ]
        with connect(server) as peer:
            answer = peer.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"more than 3 connections" in answer
        assert [status_of(peer, bytes(8)) for peer in busy] == [200] * len(busy)
    with Client(server.path) as client:
        until(lambda: client.state().name == "fake")


def test_the_holder_of_the_lease_gets_in(serve):
    server = serve(max_connections=3, request_deadline_s=100)
    code = (
        "import os, socket, sys\n"
        "kept = []\n"
        "for _ in range(3 + (os.geteuid() == 0)):\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.settimeout(60)\n"
        f"    s.sendall({EVICT!r}); kept.append(s); assert s.recv(100)\n"
        "print('sent', flush=True); sys.stdin.read()\n"
    )
    with Client(server.path) as holder:
        holder.take_lease(LeaseRequest("me", 600))
    arguments = [sys.executable, "-c", code, str(server.path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as crowd:
        assert crowd.stdout.readline() == b"sent\n"
        with connect(server) as peer:
            assert status_of(peer) == 200
        crowd.stdin.close()


def test_refusals_are_logged_at_a_bounded_rate(serve, caplog):
    server = serve(allowed_uids={os.geteuid() + 1})
    for _ in range(60):
        with connect(server) as peer:
            assert status_of(peer) is None
    server.close()
    lines = [r.getMessage() for r in caplog.records if r.name == "kvmhost.control"]
    refused = [line for line in lines if "refused a peer of uid" in line]
    left_out = [int(m[1]) for line in lines if (m := re.search(r"(\d+) more lines", line))]
    # A window is 10 s: a slow machine may see several.
    assert len(refused) + sum(left_out) == 60
    assert left_out


def test_a_rate_limited_log():
    now = [0.0]
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            found.append(record.getMessage())

    log = logging.Logger("x")
    log.addHandler(Handler())
    limited = RateLimitedLog(log, burst=2, window_s=10, clock=lambda: now[0])
    for i in range(5):
        limited.write(logging.INFO, "a", "a %d", i)
        limited.write(logging.INFO, "b", "b %d", i) if not i else None
    now[0] = 10
    limited.write(logging.INFO, "a", "later")
    limited.flush()
    assert found == ["a 0", "b 0", "a 1", "a: 3 more lines like these were left out", "later"]


# -- bytes ----------------------------------------------------------------


def test_a_budget_deals_out_in_order_and_takes_back():
    async def run():
        budget = ByteBudget(10 * SMALL_BYTES)
        done = []

        async def hold(name, n, until_set):
            async with budget.share(n, 60):
                done.append(name)
                await until_set.wait()

        first, second = asyncio.Event(), asyncio.Event()
        a = asyncio.create_task(hold("a", 9 * SMALL_BYTES, first))
        b = asyncio.create_task(hold("b", 1 << 40, second))
        c = asyncio.create_task(hold("c", 2 * SMALL_BYTES, second))
        small = asyncio.create_task(hold("small", SMALL_BYTES, first))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (done, budget.used_bytes) == (["a", "small"], 9 * SMALL_BYTES)
        with pytest.raises(TimeoutError):
            async with budget.share(SMALL_BYTES * 2, 0.01):
                pytest.fail("there is no room")
        first.set()
        await asyncio.gather(a, small)
        assert (done[2:], budget.used_bytes) == (["b"], 10 * SMALL_BYTES)
        b.cancel()
        second.set()
        await asyncio.gather(b, c, return_exceptions=True)
        assert (done[3:], budget.used_bytes) == (["c"], 0)

    asyncio.run(run())


@pytest.fixture
def large(machine):
    """A VM of 16 GiB: half a megabyte for a bitmap, more than socket buffers hold."""
    machine.memory.close()
    machine.memory = GuestMemory([Region(0, 16 << 30)])
    machine._harvester = type(machine._harvester)(machine)
    return machine


def test_answers_that_nobody_reads_are_bounded_and_dropped(serve, large, monkeypatch):
    server = serve(reply_deadline_s=1.5)
    monkeypatch.setattr(Routes, "max_bytes_in_flight", property(lambda self: 4 << 20))
    budgets = []
    real = ByteBudget.__init__

    def noted(self, limit):
        real(self, limit)
        budgets.append(self)

    monkeypatch.setattr(ByteBudget, "__init__", noted)
    made = []
    real_harvest = large.run_harvest
    large.run_harvest = lambda *a, **k: (made.append(1), real_harvest(*a, **k))[1]
    with contextlib.ExitStack() as stack:
        unread = [stack.enter_context(connect(server)) for _ in range(6)]
        for peer in unread:
            peer.sendall(HARVEST)
        until(lambda: len(made) >= 2, "two answers were made")
        # Two of them are all that fit; small requests do not wait for them.
        with connect(server) as peer:
            assert status_of(peer) == 200
        assert budgets[0].used_bytes <= 4 << 20
        until(lambda: budgets[0].used_bytes == 0, "what nobody read is dropped", 120)
    with Client(server.path) as client:
        assert client.harvest().young.n_pages == 4 << 20


# -- descriptors ----------------------------------------------------------

SERVER = """
import os, resource, socket, sys
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from kvmhost.control.server import LoopbackServer
from kvmhost.reclaim.control.server import MetricsServer

class Metrics:
    registry = CollectorRegistry()
    def text(self):
        return generate_latest(self.registry)

ProcessCollector(registry=Metrics.registry)
server = MetricsServer(Metrics(), 0, max_connections=1000, max_per_process=1000).start()
before = set(sys.modules)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(server.port, flush=True)
sys.stdin.readline()
print(sorted(set(sys.modules) - before), flush=True)
sys.stdin.readline()
server.close()
"""


def get_metrics(port):
    answer = b""
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", port), timeout=60) as peer,
    ):
        peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while piece := peer.recv(1 << 16):
            answer += piece
    return answer


@pytest.fixture
def script():
    """Start a server in a process of its own."""
    with contextlib.ExitStack() as stack:

        def start(code, *args):
            child = subprocess.Popen(
                [sys.executable, "-c", code, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            return child

        yield start


def test_a_server_without_descriptors_lives_and_answers_on(script):
    child = script(SERVER)
    port = int(child.stdout.readline())
    assert get_metrics(port).startswith(b"HTTP/1.1 200")
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        until(lambda: b"process_open_fds" in get_metrics(port), "answers between the attackers")
    until(lambda: b" 200 " in get_metrics(port)[:20], "answers when they are gone")
    print("", file=child.stdin, flush=True)
    # Nothing is imported once it listens: that may fail without descriptors.
    assert child.stdout.readline() == "[]\n"
    out, err = child.communicate("\n", timeout=60)
    assert (child.returncode, out) == (0, "")
    assert "Too many open files" in err
    assert len(err.splitlines()) < 20


LATE = """
import os, resource, sys, types
from kvmhost.control.server import SocketServer
from kvmhost.control.paths import NameLock, socket_path

def make_handler():
    sys.path.insert(0, sys.argv[1])
    from control_fakes import Simple
    return Simple()

lock = NameLock("late")
with SocketServer(socket_path("late"), lock, make_handler) as server:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    print("full", flush=True)
    sys.stdin.readline()
    for fd in taken:
        os.close(fd)
    print("free", flush=True)
    sys.stdin.readline()
"""
FAKE = """
from kvmhost.control.handler import Reply
class Simple:
    max_body_bytes = max_bytes_in_flight = 100
    def reply_bound(self, path): return 0
    def has_kept_slot(self, peer): return False
    def find(self, method, path): return self.answer
    async def answer(self, request): return Reply(b"{}")
    def cancel_timers(self): pass
    def close(self): pass
"""


def test_a_server_that_cannot_be_imported_is_tried_again(script, tmp_path, runtime):
    (tmp_path / "control_fakes.py").write_text(FAKE)
    child = script(LATE, str(tmp_path))
    assert child.stdout.readline() == "full\n"
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(60)
        peer.connect(str(runtime / "late.sock"))
        peer.sendall(STATE)
        # The failure is in the log before there are descriptors again.
        assert "failed; it is started again" in child.stderr.readline()
        print("", file=child.stdin, flush=True)
        assert peer.recv(100).startswith(b"HTTP/1.1 200")
    _, _ = child.communicate("\n", timeout=60)
    assert child.returncode == 0


# -- TCP ------------------------------------------------------------------


def test_peers_over_tcp_are_known_by_their_user():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        contextlib.closing(peers.PeerFinder(listener)) as finder,
    ):
        server, _ = listener.accept()
        with server:
            assert finder.find(server) == Peer(0, os.geteuid())
            assert finder.find(server).label == f"user {os.geteuid()}"
        assert client.recv(1) == b""
