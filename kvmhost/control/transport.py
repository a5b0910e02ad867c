"""httpx over a unix socket.

As ``httpx.HTTPTransport(uds=…)``, but a connection that is refused leaves no open
socket behind (httpcore 1.0 forgets it, to be found by the garbage collector).
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import httpcore
import httpx

__all__ = ["UnixTransport"]


class UnixTransport(httpx.BaseTransport):
    """Sends requests to one unix socket; keeps two connections open.

    :raises httpcore.ConnectError: from a request, if nothing listens there
    """

    def __init__(self, path: Path) -> None:
        self._pool = httpcore.ConnectionPool(
            uds=str(path),
            max_connections=4,
            max_keepalive_connections=2,
            network_backend=_Backend(),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the answer's body is read from the returned response."""
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
    """Tries a connection with a socket of its own first, which it closes."""

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(timeout)
            try:
                probe.connect(path)
            except OSError as error:
                raise httpcore.ConnectError(str(error)) from error
        return super().connect_unix_socket(path, timeout, socket_options)
