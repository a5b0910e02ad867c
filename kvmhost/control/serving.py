"""The event loop behind a control socket: accepting, deadlines, errors as JSON.

A :class:`~kvmhost.control.handler.Handler` handles every request. This module enforces
limits on clients, over a unix socket and over TCP: a peer of the wrong uid is disconnected
before a byte is read; a request that does not arrive in time is dropped, and so is a
response that is not read in time; a body that is too large is refused, and large bodies and
responses share a budget. No process (over TCP: no user) gets all connections, and the oldest
idle one is closed if there are too many. A connection with pipelined requests is not read
until they are answered. So no client can prevent others from being served.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures.thread  # noqa: F401 - else imported when it is first used
import logging
import socket
import typing
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web

from kvmhost.control import schema
from kvmhost.control.handler import Handler, Problem, Reply, Request
from kvmhost.control.inflight import SMALL_BYTES, ByteBudget
from kvmhost.control.peers import Peer, PeerFinder
from kvmhost.control.ratelog import RateLimitedLog
from kvmhost.control.schema import HEADER_PREFIX

__all__ = ["ServerSettings", "serve"]

log = logging.getLogger("kvmhost.control")

#: Seconds to keep reading after a refused body, so that the client gets the response.
_LINGER_S = 1.0
#: Maximum pending requests per connection; beyond that it is not read.
_MAX_WAITING = 16
#: Seconds without accepting after descriptors ran out.
_BACK_OFF_S = 0.1


class ServerSettings(typing.Protocol):
    """The handler and limits of a server; a ``SocketServer`` implements it."""

    name: str
    allowed_uids: frozenset[int] | None
    max_connections: int
    max_per_process: int
    request_deadline_s: float
    reply_deadline_s: float
    idle_s: float

    @property
    def make_handler(self) -> Callable[[], Handler]:
        """Create the handler of the requests; called once."""


def serve(owner: ServerSettings, listener: socket.socket, stop: socket.socket) -> None:
    """Serve until ``stop`` becomes readable; then finish the requests in progress and return."""
    asyncio.run(_Serving(owner, listener, stop).run())


class _Connection(web.RequestHandler):
    """A connection that is closed if no complete request header arrives in time."""

    def __init__(self, serving: _Serving, peer: Peer, manager: web.Server, **settings: Any) -> None:
        super().__init__(manager, loop=serving.loop, **settings)
        self.peer = peer
        self._serving = serving
        self._deadline: asyncio.TimerHandle | None = None
        self._held_back = False
        #: Number of requests in progress.
        self._busy = 0
        #: Set when the client disconnects or the server stops.
        self.gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._serving.note(self)
        self.expect_request(self._serving.owner.request_deadline_s)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.gone.set()
        self.request_came()
        self._serving.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Older releases of aiohttp parse and queue requests without a limit.
        if len(self._messages) > _MAX_WAITING and self.transport is not None:
            self._held_back = True
            self.transport.pause_reading()

    @property
    def idle(self) -> bool:
        """Whether no request is in progress: between two, or before the first is complete."""
        return not self._busy and not self._messages

    def abort(self) -> None:
        """Close it at once, and discard unsent data."""
        if self.transport is not None:
            self.transport.abort()

    def asked(self) -> None:
        """Count a request whose header is complete."""
        self._busy += 1
        self.request_came()

    def answered(self) -> None:
        """Resume reading if the pending requests have been answered."""
        self._busy -= 1
        self.expect_request(self._serving.owner.idle_s)
        if self._held_back and not self._messages and self.transport is not None:
            self._held_back = False
            self.transport.resume_reading()

    def expect_request(self, seconds: float) -> None:
        """Close the connection unless a request header is complete in time."""
        self.request_came()
        self._deadline = self._serving.loop.call_later(seconds, self.force_close)

    def request_came(self) -> None:
        """Cancel the deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Respond to malformed HTTP in JSON, without a log entry: any client can send it."""
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            self._serving.log.write(logging.ERROR, "failures", "request failed", exc_info=exc)
        elif request.writer.output_size > 0:
            raise ConnectionError("an answer is out already")
        text = (message or HTTPStatus(status).phrase).strip().partition("\n")[0]
        return _closing(_error(Problem(status, f"not a request: {text}")))


class _Server(web.Server):
    """Creates connections of this module's class."""

    def __init__(self, serving: _Serving, **settings: Any) -> None:
        super().__init__(serving.handle, request_factory=serving.make_request, **settings)
        self._serving, self._settings = serving, settings

    def connection(self, peer: Peer) -> web.RequestHandler:
        return _Connection(self._serving, peer, self, **self._settings)


class _Serving:
    """One run of the event loop."""

    def __init__(self, owner: ServerSettings, listener: socket.socket, stop: socket.socket) -> None:
        self.owner = owner
        self._listener, self._stop = listener, stop
        self._tasks: set[asyncio.Task[None]] = set()
        #: Open connections by process or user.
        self._open: collections.Counter[str] = collections.Counter()
        #: Connections in order of arrival.
        self._connections: dict[_Connection, None] = {}
        self.log = RateLimitedLog(log)

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._handler: Handler = self.owner.make_handler()
        self._budget = ByteBudget(self._handler.max_bytes_in_flight)
        self._peers = PeerFinder(self._listener)
        stopped = asyncio.Event()
        self._server = _Server(
            self,
            logger=log,
            access_log=None,
            keepalive_timeout=self.owner.idle_s,
            lingering_time=_LINGER_S,
            auto_decompress=False,
        )
        self.loop.add_reader(self._listener, self._accept)
        self.loop.add_reader(self._stop, stopped.set)
        try:
            await stopped.wait()
        finally:
            self.loop.remove_reader(self._listener)
            self.loop.remove_reader(self._stop)
            for connection in self._connections:
                connection.gone.set()
            self._server.pre_shutdown()
            await self._server.shutdown(timeout=2.0)
            self._handler.cancel_timers()
            self._peers.close()
            self.log.flush()
            # Blocking calls into the machine end before the machine may be closed.
            await asyncio.to_thread(self._handler.close)

    def make_request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            self.loop,
            client_max_size=self._handler.max_body_bytes,
        )

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            self._cannot_accept(error)
            return
        connection.setblocking(False)
        try:
            peer = self._peers.find(connection)
        except OSError:
            connection.close()
            return
        allowed = self.owner.allowed_uids
        if allowed is not None and peer.uid not in allowed:
            self._warn("peers", "refused a peer of uid %d", peer.uid)
            connection.close()
        elif problem := self._make_room(peer):
            self._warn("connections", "refused a connection: %s", problem)
            _refuse(connection, problem)
        else:
            self._open[peer.label] += 1
            task = self.loop.create_task(self._connect(connection, peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _make_room(self, peer: Peer) -> str:
        """Close an idle connection if there are too many; return why that fails, or "".

        One more is for root, and one more for a peer with a kept slot.
        """
        most = self.owner.max_per_process
        if self._open[peer.label] >= most and not self._drop_idle(peer.label):
            return f"more than {most} connections of {peer.label}"
        kept = self._handler.has_kept_slot(peer)
        most = self.owner.max_connections
        if self._open.total() >= most + (peer.uid == 0) + kept and not self._drop_idle():
            return f"more than {most} connections"
        return ""

    def _drop_idle(self, label: str | None = None) -> bool:
        """Close the oldest idle connection; return False if there is none.

        :param label: only of this peer; None: of any, except those with a kept slot
        """
        for connection in self._connections:
            peer = connection.peer
            if not connection.idle or (label is not None and peer.label != label):
                continue
            if label is None and self._handler.has_kept_slot(peer):
                continue
            self.forget(connection)
            connection.abort()
            return True
        return False

    def _cannot_accept(self, error: OSError) -> None:
        """Free a descriptor if none is left. The listener stays readable, so wait briefly."""
        self._warn("accept", "accept: %s", error.strerror)
        self._drop_idle()
        self.loop.remove_reader(self._listener)
        self.loop.call_later(_BACK_OFF_S, self._accept_again)

    def _warn(self, kind: str, text: str, *args: object) -> None:
        self.log.write(
            logging.WARNING, f"{self.owner.name}: {kind}", f"%s: {text}", self.owner.name, *args
        )

    def note(self, connection: _Connection) -> None:
        """Register a new connection."""
        self._connections[connection] = None

    def forget(self, connection: _Connection) -> None:
        """Unregister a connection. Idempotent."""
        if connection in self._connections:
            del self._connections[connection]
            self._count_less(connection.peer)

    def _count_less(self, peer: Peer) -> None:
        self._open[peer.label] -= 1
        if not self._open[peer.label]:
            del self._open[peer.label]

    def _accept_again(self) -> None:
        if self._stop.fileno() >= 0 and self._listener.fileno() >= 0:
            self.loop.add_reader(self._listener, self._accept)

    async def _connect(self, connection: socket.socket, peer: Peer) -> None:
        try:
            await self.loop.connect_accepted_socket(
                lambda: self._server.connection(peer), connection
            )
        except OSError:
            self._count_less(peer)
            connection.close()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = typing.cast(_Connection, request.protocol)
        connection.asked()
        try:
            async with self._budget.share(self._needed(request), self.owner.reply_deadline_s):
                response = await self._answer_or_refuse(request)
                return await self._send(request, response)
        except TimeoutError:
            busy = Problem(503, "too many large requests and answers; try again")
            return _closing(_error(busy))
        finally:
            connection.answered()

    def _needed(self, request: web.BaseRequest) -> int:
        """Return the maximum number of bytes that a request and its response take."""
        limit = self._handler.max_body_bytes
        n_bytes = request.content_length
        if n_bytes is None:
            n_bytes = limit if request.can_read_body else 0
        return min(n_bytes, limit) + self._handler.reply_bound(request.path)

    async def _answer_or_refuse(self, request: web.BaseRequest) -> web.Response:
        try:
            return await self._answer(request)
        except Problem as problem:
            answer = _error(problem)
            # The rest of a partly read body is not read.
            return answer if request.content.is_eof() else _closing(answer)

    async def _send(self, request: web.BaseRequest, response: web.Response) -> web.StreamResponse:
        """Send a large response in pieces; disconnect a client that does not read it in time."""
        body = typing.cast(bytes, response.body or b"")
        if len(body) <= SMALL_BYTES:
            return response
        whole = web.StreamResponse(status=response.status, headers=response.headers)
        whole.content_length = len(body)
        try:
            async with asyncio.timeout(self.owner.reply_deadline_s):
                await whole.prepare(request)
                for at in range(0, len(body), SMALL_BYTES):
                    await whole.write(memoryview(body)[at : at + SMALL_BYTES])
                await whole.write_eof()
        except (TimeoutError, ConnectionError):
            typing.cast(_Connection, request.protocol).abort()
        return whole

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        route = self._handler.find(request.method, request.path)
        connection = typing.cast(_Connection, request.protocol)
        asked = Request(
            request.method,
            request.path,
            dict(request.query),
            await self._read_body(request),
            request.content_type == "application/json",
            connection.peer,
            request.headers.get(HEADER_PREFIX + "Lease", ""),
            connection.gone,
        )
        try:
            reply = await route(asked)
        except Exception as error:
            problem = self._handler.problem_of(error)
            if problem.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                what = f"{request.method} {request.path}"
                self.log.write(logging.ERROR, "failures", "%s failed", what, exc_info=error)
            raise problem from error
        return _response(reply)

    async def _read_body(self, request: web.BaseRequest) -> bytes:
        limit = self._handler.max_body_bytes
        too_large = Problem(413, f"body larger than {limit} bytes")
        if (request.content_length or 0) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.owner.request_deadline_s):
                await _meet_expectation(request)
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None
        except TimeoutError:
            raise Problem(408, "the body did not come in time") from None
        except (web.RequestPayloadError, ValueError) as error:
            raise Problem(400, f"bad body: {error}") from error


async def _meet_expectation(request: web.BaseRequest) -> None:
    """Send ``100 Continue`` to a client that expects it (RFC 9110, section 10.1.1).

    :raises Problem: 417 for any other expectation
    """
    expected = request.headers.get("Expect")
    if expected is None or request.version < (1, 1):
        return
    if expected.lower() != "100-continue":
        raise Problem(417, f"unknown expectation {expected!r}")
    writer = request.writer
    await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # The final response counts its own bytes only.
    writer.output_size = 0


def _response(reply: Reply) -> web.Response:
    return web.Response(
        body=reply.body, status=200, headers=reply.headers | {"Content-Type": reply.content_type}
    )


def _error(problem: Problem) -> web.Response:
    body = schema.encode(schema.ErrorReply(problem.info()))
    headers = {"Allow": problem.allow} if problem.allow else {}
    return web.Response(
        body=body, status=problem.status, content_type="application/json", headers=headers
    )


def _closing(response: web.Response) -> web.Response:
    response.force_close()
    return response


def _refuse(peer: socket.socket, why: str) -> None:
    body = schema.encode(schema.ErrorReply(schema.ErrorInfo(503, why)))
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    with peer:
        # A new socket accepts this much at once; a disconnected peer may not receive it.
        try:
            peer.send(head.encode() + body)
        except OSError as error:
            log.debug("refusing a connection: %s", error)
