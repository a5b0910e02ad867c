"""Common base of control-socket clients: requests, and errors that name the server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpcore
import httpx

from kvmhost.closing import Closing
from kvmhost.control import schema
from kvmhost.control.transport import UnixTransport
from kvmhost.errors import (
    ControlError,
    KvmHostError,
    LayoutError,
    StateError,
    VmGoneError,
    from_fields,
)
from kvmhost.suggest import did_you_mean
from kvmhost.timescale import scaled

__all__ = ["Caller"]

#: Status of a request with a wrong argument.
_BAD_REQUEST = 400

T = TypeVar("T")

#: Names of other servers in an error message.
_MAX_SHOWN = 10

_TRANSFER_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


class Caller(Closing):
    """Sends requests to one socket. Methods are thread-safe.

    :param name: the server's name, for errors
    :param timeout_s: for a whole response
    """

    #: Default limit on the size of a response; a request may raise it.
    max_answer_bytes = 1 << 20

    def __init__(self, name: str, path: Path, timeout_s: float = schema.CLIENT_TIMEOUT_S) -> None:
        self.path = path
        self._name = name
        self._http = httpx.Client(
            transport=UnixTransport(path),
            base_url="http://vm/v1/",
            headers={"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(timeout_s, connect=scaled(5.0)),
        )

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._http.close()

    def _get(self, path: str, kind: type[T]) -> T:
        return self._read(self._call("GET", path), kind)

    def _call(
        self, method: str, path: str, *, at_most: int | None = None, **arguments: Any
    ) -> httpx.Response:
        """Send a request; limit the response's size (None: to ``max_answer_bytes``)."""
        if self._http.is_closed:
            raise StateError(f"the client of {self._name!r}")
        limit, body = at_most or self.max_answer_bytes, bytearray()
        with (
            self._map_connection_errors(),
            self._http.stream(method, path, **arguments) as incoming,
        ):
            for piece in incoming.iter_raw():
                body += piece
                if len(body) > limit:
                    raise ControlError(
                        incoming.status_code,
                        f"{self._name!r}: malformed response: more than {limit} bytes",
                    )
        # Not decompressed: the request asked for no encoding.
        headers = [(k, v) for k, v in incoming.headers.items() if k not in _TRANSFER_HEADERS]
        answer = httpx.Response(incoming.status_code, headers=headers, content=bytes(body))
        if answer.is_success:
            return answer
        try:
            problem = schema.decode(answer.content, schema.ErrorReply).error
        except schema.SchemaError:
            raise ControlError(answer.status_code, answer.text[:200]) from None
        raise _error_of(problem)

    @contextlib.contextmanager
    def _map_connection_errors(self) -> Iterator[None]:
        try:
            yield
        except httpcore.ConnectError as error:
            raise VmGoneError(self._name, self._nothing_answers(error)) from error
        except httpcore.TimeoutException as error:
            raise VmGoneError(self._name, f"no answer in time at {self.path}") from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise VmGoneError(self._name, f"hung up ({_reason(error)})") from error

    def _nothing_answers(self, error: Exception) -> str:
        """Return a message that the server does not respond, with the names of those there."""
        there = self._others()
        hint = did_you_mean(self.path.stem, there)
        shown = ", ".join(there[:_MAX_SHOWN]) + (", ..." if len(there) > _MAX_SHOWN else "")
        running = f" (running: {shown})" if there else ""
        return f"nothing answers at {self.path} ({_reason(error)}){hint}{running}"

    def _others(self) -> list[str]:
        """Return the names of other servers in the same directory, sorted."""
        found = (path.stem for path in self.path.parent.glob("*.sock") if path != self.path)
        return sorted(found)

    def _read(self, answer: httpx.Response, kind: type[T]) -> T:
        try:
            return schema.decode(answer.content, kind)
        except schema.SchemaError as error:
            raise ControlError(
                answer.status_code, f"{self._name!r}: malformed response: {error}"
            ) from None


def _error_of(problem: schema.ErrorInfo) -> KvmHostError:
    """Return the error that the VM raised; a ``ControlError`` if it has no class there."""
    made = from_fields(problem.kind, problem.arguments, problem.field)
    if made is not None and str(made) == problem.message:
        return made
    field = f"{problem.field}: " if problem.field else ""
    if problem.status == _BAD_REQUEST:
        return LayoutError(field + problem.message, field=problem.field)
    return ControlError(problem.status, field + problem.message)


def _reason(error: Exception) -> str:
    """Return the operating system's error message, without the error number."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error)
