"""Servers on a unix socket or a port of the loopback interface; a VM's control server.

Starting one costs a socket and a thread. The web server itself (asyncio, aiohttp)
is imported by that thread when the first client connects, so that a guest that
runs for a tenth of a second never waits for it; with ``eager``, before it listens.
If the import or the server fails (for example without free descriptors), the thread tries
again. The end of the thread always closes the listener, so that clients are refused and do
not wait.

>>> with Machine(image, name="a") as machine, ControlServer(machine):  # doctest: +SKIP
...     machine.start()
...     machine.wait()
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvmhost.control.paths import NameLock, socket_path
from kvmhost.control.ratelog import RateLimitedLog
from kvmhost.errors import KvmHostError
from kvmhost.signals import start_threads
from kvmhost.timescale import scaled

if typing.TYPE_CHECKING:
    from kvmhost.control.handler import Handler
    from kvmhost.machine.base import BaseMachine

__all__ = [
    "MAX_CONNECTIONS",
    "MAX_PER_PROCESS",
    "ControlServer",
    "LoopbackServer",
    "Server",
    "SocketServer",
]

#: Maximum connections in total and per process; more get status 503.
MAX_CONNECTIONS, MAX_PER_PROCESS = 64, 32
#: Seconds that a client may take for a request, from its first byte to its last.
REQUEST_DEADLINE_S = scaled(10.0)
#: Seconds that a client may take to read a response.
REPLY_DEADLINE_S = scaled(30.0)
#: Connections that wait to be accepted: more than are served, since an idle one can be closed.
_BACKLOG = 128
#: Seconds until a server that failed is started again.
_RETRY_S = 0.5

log = logging.getLogger(__name__)


class Server:
    """Serves HTTP on one listener, which a subclass creates, until :meth:`close`.

    :param name: for the log
    :param make_handler: called when the first client connects, and again after a failure
    :param allowed_uids: uids that may connect; None: any
    :param max_connections: at one time; root has one more, and so has the lease's holder. The
        oldest idle one is closed for a new one; if all are in use, the new one gets status 503
    :param max_per_process: of these, for one process; over TCP for one user
    :param request_deadline_s: for a client to send a request in full
    :param reply_deadline_s: for a client to read a large answer, or to wait for memory for it
    :param idle_s: for a connection between two requests
    :param eager: import the web server before listening
    """

    def __init__(
        self,
        name: str,
        make_handler: Callable[[], Handler],
        *,
        allowed_uids: Collection[int] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_per_process: int = MAX_PER_PROCESS,
        request_deadline_s: float = REQUEST_DEADLINE_S,
        reply_deadline_s: float = REPLY_DEADLINE_S,
        idle_s: float = 60.0,
        eager: bool = False,
    ) -> None:
        self.name, self.make_handler = name, make_handler
        self.allowed_uids = None if allowed_uids is None else frozenset(allowed_uids)
        self.max_connections, self.max_per_process = max_connections, max_per_process
        self.request_deadline_s, self.reply_deadline_s = request_deadline_s, reply_deadline_s
        self.idle_s = idle_s
        self._eager = eager
        self._listener: socket.socket | None = None
        self._wake: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Listen, and start the thread.

        :raises OSError: if the address cannot be bound
        """
        if self._listener is not None:
            raise KvmHostError(f"the server {self.name!r} has been started before")
        if self._eager:
            from kvmhost.control import serving as serving
        self._listener = self._listen()
        self._wake, ours = socket.socketpair()
        self._thread = threading.Thread(
            target=self._run, args=(self._listener, ours), name="control", daemon=True
        )
        start_threads(self._thread)
        return self

    def close(self) -> None:
        """Finish the requests in progress, end the thread, stop listening. Idempotent."""
        if self._wake is not None:
            self._wake.close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._listener is not None:
            self._listener.close()

    def _listen(self) -> socket.socket:
        """Return a listening socket that does not block."""
        raise NotImplementedError

    def _run(self, listener: socket.socket, stop: socket.socket) -> None:
        with stop, listener:
            poll = select.poll()
            poll.register(stop, select.POLLIN)
            poll.register(listener, select.POLLIN)
            problems = RateLimitedLog(log, burst=1)
            while all(fd != stop.fileno() for fd, _ in poll.poll()):
                if self._serve(listener, stop, problems):
                    return

    def _serve(self, listener: socket.socket, stop: socket.socket, log: RateLimitedLog) -> bool:
        """Serve until the stop; return False after a failure and a short wait."""
        try:
            from kvmhost.control.serving import serve

            serve(self, listener, stop)
        except Exception:
            # The guest or daemon keeps running; its clients wait until the server works again.
            log.exception("servers", "the server %s failed; it is started again", self.name)
            stop_only = select.poll()
            stop_only.register(stop, select.POLLIN)
            return bool(stop_only.poll(_RETRY_S * 1000))
        return True

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SocketServer(Server):
    """Serves HTTP on one unix socket.

    The socket has mode 0600; a peer whose uid is not allowed is disconnected before
    anything that it sent is read.

    :param lock: held while it runs, and released by :meth:`close`
    :param allowed_uids: uids that may connect; default: the process's own uid and root
    :param settings: as :class:`Server` has them
    """

    def __init__(
        self,
        path: Path,
        lock: NameLock,
        make_handler: Callable[[], Handler],
        *,
        allowed_uids: Collection[int] | None = None,
        **settings: Any,
    ) -> None:
        allowed = {os.geteuid(), 0} if allowed_uids is None else allowed_uids
        super().__init__(lock.name, make_handler, allowed_uids=allowed, **settings)
        self.path, self._lock = path, lock

    def close(self) -> None:
        """Finish the requests in progress, end the thread, remove socket and lock. Idempotent."""
        super().close()
        # Even without a listener: a signal may arrive between bind and its assignment.
        if self._lock.held:
            self._lock.remove(self.path.name)
        self._lock.release()

    def _listen(self) -> socket.socket:
        # This process holds the lock, so an existing socket is that of a dead VM.
        self._lock.remove(self.path.name)
        return _listen(self.path)


class LoopbackServer(Server):
    """Serves HTTP on a TCP port of 127.0.0.1, for every user of the host.

    :param port: 0: any free port, see :attr:`port`
    :param settings: as :class:`Server` has them
    """

    def __init__(
        self, name: str, port: int, make_handler: Callable[[], Handler], **settings: Any
    ) -> None:
        super().__init__(name, make_handler, **settings)
        self.port = port

    def _listen(self) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=_BACKLOG)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        return listener


class ControlServer(SocketServer):
    """Serves control requests for one machine. Close it before the machine.

    :param name: the VM's name; else the machine's, else ``vm-PID``
    :param lock: the name's lock if the caller already holds it; released by :meth:`close`
    :param settings: as :class:`SocketServer` has them
    :raises NameInUseError: if a VM of that name runs already
    :raises LayoutError: for a bad name
    """

    def __init__(
        self,
        machine: BaseMachine,
        *,
        name: str | None = None,
        lock: NameLock | None = None,
        **settings: Any,
    ) -> None:
        self.machine = machine
        found = name or (lock.name if lock else "") or machine.name or f"vm-{os.getpid()}"
        path = socket_path(found)
        super().__init__(path, lock or NameLock(found), self._make_routes, **settings)

    def _make_routes(self) -> Handler:
        from kvmhost.control.routes import Routes

        return Routes(self.machine, self.name)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        # The mode that the socket has before bind(2) is the file's: unix_bind(), Linux.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        undo.pop_all()
    return listener
