"""A hostile server behind a VM's socket: what its client reads is bounded."""

from __future__ import annotations

import contextlib
import gzip
import socket
import subprocess
import sys
import threading
import time

import pytest

from kvmhost.control.client import Client
from kvmhost.errors import ControlError, VmGoneError

# Each connection carries one answer: a client that kept it could meet the end of it.
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
PIECE = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"


def whole(body, *headers):
    return HEAD + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.fixture
def hostile(tmp_path):
    """Serve a socket with a function that writes to each connection; counts bytes."""
    path = tmp_path / "x.sock"
    over = threading.Event()
    sent = []

    def serve(answer):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def run():
            with listener, contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1 << 16)
                        for piece in answer():
                            if over.is_set():
                                return
                            connection.sendall(piece)
                            sent.append(len(piece))

        thread = threading.Thread(target=run)
        thread.start()
        threads.append((thread, listener))
        return path

    threads = []
    yield serve, sent
    over.set()
    for thread, listener in threads:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def endless():
    yield HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    while True:
        yield PIECE


@pytest.mark.parametrize("call", ["state", "memory_map", "harvest", "resident"])
def test_an_endless_answer_is_cut_off(hostile, call):
    serve, sent = hostile
    with Client(serve(endless)) as vm, pytest.raises(ControlError, match="more than 1048576 bytes"):
        getattr(vm, call)()
    assert sum(sent) < 16 << 20


def test_a_bitmap_larger_than_asked_for_is_cut_off(hostile):
    serve, _ = hostile
    with Client(serve(endless)) as vm, pytest.raises(ControlError, match="more than 65536 bytes"):
        vm.harvest(0, 1024)


def test_another_range_than_asked_for_is_refused(hostile):
    serve, _ = hostile
    names = ("Gfn-Start: 0", "N-Pages: 64", "Coarse: 0", "Window-Start-Ns: 0", "Window-End-Ns: 0")
    headers = [f"X-Kvmhost-{name}\r\n".encode() for name in names]
    path = serve(lambda: [whole(bytes(8), *headers)])
    with Client(path) as vm:
        assert vm.resident(0, 64).size == 64
        with pytest.raises(ControlError, match="Pages is 64, not 1024"):
            vm.resident(0, 1024)


@pytest.mark.parametrize(
    "memory",
    [
        b'{"page_bytes":4096,"gfn_end":4503599627370496,"memslots":[],"pinned":[]}',
        b'{"page_bytes":4096,"gfn_end":3000000000,"memslots":[{"slot":0,"gpa":0,"n_bytes":4096,'
        b'"gfn_start":-5,"n_pages":1,"hva":0}],"pinned":[]}',
        b'{"page_bytes":4096,"gfn_end":3000000000,"memslots":[{"slot":0,"gpa":0,"n_bytes":4096,'
        b'"gfn_start":0,"n_pages":3000000000,"hva":0}],"pinned":[]}',
        b'{"page_bytes":4096,"gfn_end":1,"memslots":[{"slot":0,"gpa":0,"n_bytes":4096,'
        b'"gfn_start":0,"n_pages":1,"hva":0}],"pinned":[{"gfn_start":0,"n_pages":4503599627370496}]}',
    ],
)
def test_a_memory_map_that_cannot_be_is_refused(hostile, memory):
    serve, _ = hostile
    with Client(serve(lambda: [whole(memory)])) as vm:
        for call in (vm.memory_map, vm.harvest):
            with pytest.raises(ControlError, match="malformed response"):
                call()


def test_bad_text_and_packed_bodies_are_malformed(hostile):
    serve, _ = hostile
    bodies = [
        whole(b'"\xff"'),
        whole(gzip.compress(bytes(1 << 24)), b"Content-Encoding: gzip\r\n"),
    ]
    path = serve(lambda: [bodies[0]])
    with Client(path) as vm:
        for _ in bodies:
            with pytest.raises(ControlError, match="malformed response"):
                vm.state()
            bodies.reverse()


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nX-A: ", HEAD + b"Content-Length: 9999\r\n\r\n"]
)
def test_an_answer_that_drips_ends_with_the_timeout(hostile, start):
    serve, _ = hostile

    def drip():
        yield start
        while True:
            time.sleep(0.05)
            yield b"a"

    with Client(serve(drip), timeout_s=1.0) as vm, pytest.raises(VmGoneError, match="in time"):
        vm.state()


@pytest.mark.requires_root
def test_a_server_of_another_user_is_sent_nothing(tmp_path):
    """The socket file is ours, so that root too has no reason to expect that user."""
    code = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1])
os.setgid(65534); os.setuid(65534); listener.listen(); print("up", flush=True)
connection, _ = listener.accept()
print(connection.recv(100), flush=True)
"""
    path = tmp_path / "x.sock"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        assert path.stat().st_uid == 0
        with Client(path) as vm, pytest.raises(VmGoneError, match="user 65534, who is not trusted"):
            vm.stop()
        assert child.stdout.readline() == "b''\n"
