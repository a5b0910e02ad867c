"""One HTTP request over a Unix socket, of any form: what a client library would not send."""

from __future__ import annotations

import socket
from typing import Any


def ask(
    server: Any, method: str, path: str, body: bytes = b"", kind: str = "application/json"
) -> tuple[int, bytes]:
    """Return status and body of one request."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(60)
        peer.connect(str(server.path))
        head = f"{method} {path} HTTP/1.1\r\nHost: vm\r\nConnection: close\r\nContent-Type: {kind}"
        peer.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b""
        while piece := peer.recv(1 << 16):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body
