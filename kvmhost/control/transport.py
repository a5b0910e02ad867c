"""httpx over a unix socket, to a server that may be hostile.

As ``httpx.HTTPTransport(uds=…)``, but a connection that is refused leaves no open
socket behind (httpcore 1.0 forgets it, to be found by the garbage collector), the server's
uid is checked before anything is sent, and the time-out of a read covers the whole
response: a server that sends one byte per second cannot block its client.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpcore
import httpx

from kvmhost.control.peers import peer_of

__all__ = ["UnixTransport"]

#: A connection without requests is reused for so long. Well below the time after which
#: servers close it (60 s): a request must not meet the server's end of its connection.
_KEEP_S = 30.0


class UnixTransport(httpx.BaseTransport):
    """Sends requests to one unix socket; keeps two connections open.

    :raises httpcore.ConnectError: from a request, if nothing listens there
    """

    def __init__(self, path: Path) -> None:
        self._pool = httpcore.ConnectionPool(
            uds=str(path),
            max_connections=4,
            max_keepalive_connections=2,
            keepalive_expiry=_KEEP_S,
            network_backend=_Backend(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the body is read from the returned response."""
        assert isinstance(request.stream, httpx.SyncByteStream)
        answer = self._pool.handle_request(
            httpcore.Request(
                request.method,
                str(request.url),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(answer),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        return self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


class _Backend(httpcore.SyncBackend):
    """Connects to servers of this user and of root.

    Root may also connect to another user's socket file if that user is the server.
    """

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.settimeout(timeout)
            try:
                connection.connect(path)
                uid, allowed = peer_of(connection).uid, {os.geteuid(), 0}
                if os.geteuid() == 0:
                    allowed.add(Path(path).stat().st_uid)
            except OSError as error:
                raise httpcore.ConnectError(str(error)) from error
            if uid not in allowed:
                raise httpcore.ConnectError(f"it is served by user {uid}, who is not trusted")
            undo.pop_all()
        return _Stream(connection)


class _Stream(httpcore.NetworkStream):
    """A connection whose time-out for reading counts from the last write."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sent_s = time.monotonic()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read the available data, up to ``max_bytes``."""
        left = None if timeout is None else self._sent_s + timeout - time.monotonic()
        if left is not None and left <= 0:
            raise httpcore.ReadTimeout("the answer takes too long")
        try:
            self._connection.settimeout(left)
            return self._connection.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send everything."""
        try:
            self._connection.settimeout(timeout)
            self._connection.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error
        self._sent_s = time.monotonic()

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def get_extra_info(self, info: str) -> Any:
        """Return whether there is something to read: on an idle connection, that it ended."""
        if info != "is_readable":
            return None
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(0))
