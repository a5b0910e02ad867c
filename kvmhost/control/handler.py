"""The interface between the HTTP server and its handlers: requests, replies, problems.

A :class:`Handler` handles the requests of one socket. It does not depend on HTTP's wire
format, and the server (:mod:`kvmhost.control.serving`) does not depend on the requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

import msgspec

from kvmhost.control import schema
from kvmhost.control.peers import Peer
from kvmhost.decoding import json_value
from kvmhost.errors import KvmHostError, fields_of

__all__ = [
    "BINARY",
    "JSON",
    "Handler",
    "Problem",
    "Reply",
    "Request",
    "Route",
    "by_method",
    "json_reply",
    "no_body",
    "nothing_asked",
]

JSON, BINARY = "application/json", "application/octet-stream"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, its body read in full.

    :param is_json: whether the content type is JSON
    :param lease: the token in the header ``X-Kvmhost-Lease``; empty: none
    :param gone: set when the client has disconnected or the server stops
    """

    method: str
    path: str
    query: dict[str, str]
    body: bytes
    is_json: bool
    peer: Peer
    lease: str = ""
    gone: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)


class Problem(KvmHostError):
    """A response with an error status.

    :param field: the field of the request that was wrong
    :param allow: methods for the header of status 405
    :param error: the machine's exception, for a client to raise again
    """

    def __init__(
        self,
        status: int,
        message: str,
        field: str = "",
        allow: str = "",
        error: KvmHostError | None = None,
    ) -> None:
        super().__init__(status, message, field, allow, error)
        self.status, self.message, self.field, self.allow = status, message, field, allow
        self.error = error

    def info(self) -> schema.ErrorInfo:
        """Return the body of the answer."""
        kind, values = fields_of(self.error) if self.error is not None else ("", [])
        plain = [json_value(value) for value in values]
        return schema.ErrorInfo(self.status, self.message, self.field, kind, plain)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response with status 200."""

    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


#: Answers one request; raises what :meth:`Handler.problem_of` understands.
Route = Callable[[Request], Awaitable[Reply]]


class Handler(Protocol):
    """Answers the requests of one socket; the server calls it from its event loop."""

    @property
    def max_body_bytes(self) -> int:
        """The largest body that is read."""

    @property
    def max_bytes_in_flight(self) -> int:
        """Total memory limit for the bodies and responses of all connections."""

    def reply_bound(self, path: str) -> int:
        """Return an upper bound on the memory that building a response takes; 0: little."""

    def has_kept_slot(self, peer: Peer) -> bool:
        """Whether a connection of this peer is accepted above the connection limit."""

    def find(self, method: str, path: str) -> Route:
        """Return the route of a request.

        :raises Problem: 404 for an unknown path, 405 for the wrong method
        """

    def problem_of(self, error: Exception) -> Problem:
        """Return the response for an exception."""

    def cancel_timers(self) -> None:
        """Cancel timers and watches; the last call from the event loop."""

    def close(self) -> None:
        """Wait for requests in progress; from another thread."""


def by_method(routes: Mapping[str, T] | None, method: str, path: str) -> T:
    """Pick the entry of a path's method.

    :raises Problem: 404 for an unknown path, 405 for a method that it does not have
    """
    if routes is None:
        raise Problem(404, f"no such path: {path[:200]}")
    if method not in routes:
        allow = ", ".join(sorted(routes))
        raise Problem(405, f"{path} takes {allow}, not {method[:20]}", allow=allow)
    return routes[method]


def nothing_asked(request: Request) -> None:
    """Refuse a query or a body for a request that takes neither.

    :raises Problem: 400
    """
    schema.decode_query(request.query, schema.NoQuery)
    no_body(request)


def no_body(request: Request) -> None:
    """Refuse a body for a request that takes none.

    :raises Problem: 400
    """
    if request.body:
        raise Problem(400, "takes no body", "body")


def json_reply(message: msgspec.Struct) -> Reply:
    """Return a reply with a message as JSON."""
    return Reply(schema.encode(message))
