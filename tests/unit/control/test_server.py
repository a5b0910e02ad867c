"""Clients that are hostile, slow or too many; starting and ending."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

from kvmhost.control.client import Client
from kvmhost.control.server import ControlServer
from kvmhost.errors import LayoutError, NameInUseError


def connect(server):
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(DEADLINE_S)
    peer.connect(str(server.path))
    return peer


def read_all(peer):
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := peer.recv(65536):
            data += chunk
    return data


def ask(server, raw):
    """Send bytes, return (status, JSON) of the answer, or None if the server hung up."""
    with connect(server) as peer:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(raw)
        head, _, body = read_all(peer).partition(b"\r\n\r\n")
    if not head:
        return None
    return int(head.split()[1]), json.loads(body)


def request(method, path, body=b"", *headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: vm", "Connection: close", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def still_answers(server):
    with Client(server.path) as client:
        return client.state().name == server.name


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), 400),
        (b"GET /v1/state HTTP/9.9\r\n\r\n", 400),
        (b"GET " + b"/" * 20000 + b" HTTP/1.1\r\nHost: vm\r\n\r\n", 400),
        (b"GET /v1/state HTTP/1.1\r\nX: " + b"y" * 20000 + b"\r\n\r\n", 400),
        (b"POST /v1/evict HTTP/1.1\r\nHost: vm\r\nContent-Length: -5\r\n\r\n", 400),
        (request("GET", "/"), 404),
        (request("GET", "/v2/state"), 404),
        (request("GET", "/v1/pages/"), 400),
        (request("GET", "/v1/pages/zz"), 400),
        (request("PUT", "/v1/state"), 405),
        (request("DELETE", "/v1/pages/1"), 405),
        (request("GET", "/v1/state?x=1"), 400),
        (request("GET", "/v1/state", b"{}"), 400),
        (request("POST", "/v1/evict", b"1234567"), 400),
        (request("POST", "/v1/evict", b"[1]", "Content-Type: application/json"), 400),
        (request("POST", "/v1/restore", b"\xff\xfe"), 400),
        (request("POST", "/v1/evict", b"", "Content-Length: 99999999999"), 413),
        (request("POST", "/v1/evict", b"0" * (2 << 20)), 413),
    ],
)
def test_bad_requests_get_an_answer(serve, raw, status):
    server = serve()
    found, body = ask(server, raw)
    assert found == status
    assert body["error"]["status"] == status
    assert body["error"]["message"]
    assert still_answers(server)


def test_a_huge_chunked_body_is_cut_off(serve):
    server = serve()
    head = request("POST", "/v1/evict", b"", "Transfer-Encoding: chunked")
    found, _ = ask(server, head + (b"10000\r\n" + bytes(0x10000) + b"\r\n") * 40)
    assert found == 413


def test_compressed_bodies_are_not_unpacked(serve):
    server = serve()
    raw = request("PUT", "/v1/limit", b"\x1f\x8b\x08", "Content-Encoding: gzip")
    assert ask(server, raw)[0] == 400


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /v1/state HTTP/1.1\r\nHost: v"])
def test_a_header_that_never_ends_is_dropped(serve, sent):
    server = serve(request_deadline_s=0.2)
    assert ask(server, sent) is None
    assert still_answers(server)


def test_a_body_that_never_comes_is_dropped(serve):
    server = serve(request_deadline_s=0.2)
    head = request("POST", "/v1/evict", b"", "Content-Length: 80")
    assert ask(server, head + b"12")[0] == 408
    assert still_answers(server)


def test_an_idle_connection_is_closed(serve):
    server = serve(idle_s=0.2)
    with connect(server) as peer:
        peer.sendall(b"GET /v1/state HTTP/1.1\r\nHost: vm\r\n\r\n")
        assert b'"name":"fake"' in read_all(peer)


def test_random_bytes_harm_nobody(serve):
    server = serve(request_deadline_s=0.5)
    chance = random.Random(7)
    good = request("POST", "/v1/evict?each=1", b'{"gfns":[5]}', "Content-Type: application/json")
    answers = []
    for _ in range(60):
        raw = bytearray(good)
        for _ in range(chance.randrange(1, 12)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        with connect(server) as peer:
            peer.sendall(bytes(raw[: chance.randrange(1, len(raw) + 1)]))
            peer.shutdown(socket.SHUT_WR)
            answers.append(read_all(peer))
    assert all(a == b"" or a.startswith(b"HTTP/1.") for a in answers)
    assert not any(b" 500 " in a[:20] for a in answers)
    assert still_answers(server)


def test_many_clients_come_and_go(serve):
    server = serve()
    problems = []

    def visit():
        try:
            for _ in range(5):
                assert still_answers(server)
        except BaseException as error:  # noqa: BLE001 - reported by the test below
            problems.append(error)

    threads = [threading.Thread(target=visit) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert problems == []


def test_a_peer_of_another_uid_is_not_read(serve, machine, caplog):
    server = serve(allowed_uids={os.geteuid() + 1})
    with connect(server) as peer:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            peer.sendall(request("POST", "/v1/stop"))
        assert read_all(peer) == b""
    assert machine.running
    until(lambda: "refused a peer of uid" in caplog.text, "no line in the log")


@pytest.mark.requires_root
def test_another_user_gets_nothing_even_with_an_open_socket_file(serve, machine):
    server = serve()
    server.path.chmod(0o666)
    # tmp_path is private: the other user comes in by a descriptor of the directory.
    code = """
import os, socket, sys
os.fchdir(int(sys.argv[1])); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect("fake.sock")
try:
    s.sendall(b"POST /v1/stop HTTP/1.1\\r\\nHost: vm\\r\\n\\r\\n")
    sys.exit(len(s.recv(100)))
except (BrokenPipeError, ConnectionResetError):
    sys.exit(0)
"""
    server.path.parent.chmod(0o711)
    fd = os.open(server.path.parent, os.O_PATH)
    try:
        run = subprocess.run(
            [sys.executable, "-S", "-c", code, str(fd)],
            pass_fds=[fd],
            timeout=DEADLINE_S,
            check=False,
            capture_output=True,
        )
    finally:
        os.close(fd)
    assert (run.returncode, run.stderr) == (0, b"")
    assert machine.running


def test_socket_and_lock_are_private_and_go_away(serve, runtime):
    server = serve()
    assert server.path.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in runtime.iterdir()) == ["fake.lock", "fake.sock"]
    server.close()
    server.close()
    assert list(runtime.iterdir()) == []


def test_a_second_vm_of_the_name_is_refused_and_the_first_lives(serve):
    server = serve()
    with pytest.raises(NameInUseError, match="runs already"):
        serve()
    assert still_answers(server)


def test_a_stale_socket_is_replaced(serve, runtime):
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / "fake.sock"))
    assert still_answers(serve())


def test_bad_name(machine):
    with pytest.raises(LayoutError, match="name"):
        ControlServer(machine, name="../x")


def test_a_vm_that_nobody_asks_imports_no_web_server(machine, runtime):
    code = (
        "import sys, types\n"
        "from kvmhost.control.server import ControlServer\n"
        "with ControlServer(types.SimpleNamespace(name='x')): pass\n"
        "print([m for m in ('aiohttp', 'asyncio', 'numpy', 'msgspec') if m in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=DEADLINE_S
    )
    assert run.stdout == "[]\n"


def test_nothing_is_left_behind(serve, machine):
    def visit():
        server = serve()
        with connect(server) as half:
            half.sendall(b"GET /v1")
            assert still_answers(server)
            with Client("fake") as client:
                client.harvest()
            server.close()

    visit()
    fds, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(5):
        visit()
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    assert threading.active_count() == threads


def test_one_process_does_not_get_all_connections(serve):
    server = serve(max_connections=8, max_per_process=3, request_deadline_s=100)
    other = (
        "import sys\nfrom kvmhost.control.client import Client\n"
        "print(Client(sys.argv[1]).state().name)\n"
    )
    with contextlib.ExitStack() as stack:
        head = request("POST", "/v1/evict", b"", "Expect: 100-continue", "Content-Length: 8")
        for _ in range(3):
            peer = stack.enter_context(connect(server))
            peer.sendall(head)
            assert peer.recv(100).startswith(b"HTTP/1.1 100")
        status, body = ask(server, b"")
        assert status == 503
        assert f"3 connections of process {os.getpid()}" in body["error"]["message"]
        run = subprocess.run(
            [sys.executable, "-c", other, str(server.path)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        assert run.stdout == "fake\n"


def test_a_client_that_floods_holds_nobody_up(serve):
    """Sends requests by the ten thousand and reads no answer: it is not read on."""
    server = serve()
    burst = b"GET /v1/resident HTTP/1.1\r\nHost: vm\r\n\r\n" * 500
    sent = [0] * 8
    stop = threading.Event()

    def flood(number):
        with connect(server) as peer:
            peer.settimeout(0.1)
            while not stop.is_set():
                try:
                    sent[number] += peer.send(burst)
                except TimeoutError:
                    continue
                except OSError:
                    return

    threads = [threading.Thread(target=flood, args=(i,)) for i in range(len(sent))]
    for thread in threads:
        thread.start()
    try:
        until(lambda: min(sent) > 0, "all of them flood")
        for _ in range(50):
            assert still_answers(server)
        before = sum(sent)
        for _ in range(20):
            assert still_answers(server)
        # Back pressure reached them: what is taken is what the socket buffers hold.
        assert sum(sent) - before < 16 << 20
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert still_answers(server)


def test_who_reads_no_answers_is_not_read_on(serve):
    server = serve()
    burst = b"GET /v1/resident HTTP/1.1\r\nHost: vm\r\n\r\n" * 1000
    with connect(server) as peer:
        peer.settimeout(2.0)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 8 << 20:
                sent += peer.send(burst)
        # What fits into the buffers of the sockets, and one piece that was being parsed.
        assert sent < 4 << 20
        assert still_answers(server)
        # It is read on as soon as it reads: nothing was lost.
        peer.settimeout(DEADLINE_S)
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_waits_for_100_is_asked_for_its_body(serve):
    """No time-out is involved: the client sends its body only after the interim response."""
    server = serve()
    head = request("POST", "/v1/evict", b"", "Expect: 100-continue", "Content-Length: 12")
    with connect(server) as peer:
        peer.sendall(head.replace(b"Host: vm", b"Host: vm\r\nContent-Type: application/json"))
        assert peer.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        peer.sendall(b'{"gfns":[4]}')
        assert read_all(peer).startswith(b"HTTP/1.1 200 OK")


def test_refusals_come_instead_of_an_interim_response(serve):
    server = serve()
    status, answer = ask(server, request("POST", "/v1/evict", b"", "Expect: a-miracle"))
    assert (status, "a-miracle" in answer["error"]["message"]) == (417, True)
    status, _ = ask(
        server,
        request("POST", "/v1/evict", b"", "Expect: 100-continue", f"Content-Length: {1 << 40}"),
    )
    assert status == 413
