"""A server on a unix socket, and the control server of a VM process, which is one.

Starting it costs a socket and a thread. The web server itself (asyncio, aiohttp)
is imported by that thread when the first client connects, so that a guest that
runs for a tenth of a second never waits for it.

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
from kvmhost.errors import KvmHostError

if typing.TYPE_CHECKING:
    from kvmhost.control.handler import Handler
    from kvmhost.machine.base import BaseMachine

__all__ = ["MAX_CONNECTIONS", "MAX_PER_PROCESS", "ControlServer", "SocketServer"]

#: Connections at one time, and those of one process; more get status 503.
MAX_CONNECTIONS, MAX_PER_PROCESS = 64, 32
#: Seconds that a client may take for a request, from its first byte to its last.
REQUEST_DEADLINE_S = 10.0

log = logging.getLogger(__name__)


class SocketServer:
    """Answers HTTP on one unix socket until :meth:`close`.

    The socket has mode 0600; a peer whose uid is not allowed is disconnected before
    anything that it sent is read.

    :param lock: held while it runs, and released by :meth:`close`
    :param make_handler: called once, when the first client comes
    :param allowed_uids: who may connect; else the process's own uid and root
    :param request_deadline_s: for a client to send a request in full
    :param idle_s: for a connection between two requests
    """

    def __init__(
        self,
        path: Path,
        lock: NameLock,
        make_handler: Callable[[], Handler],
        *,
        allowed_uids: Collection[int] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_per_process: int = MAX_PER_PROCESS,
        request_deadline_s: float = REQUEST_DEADLINE_S,
        idle_s: float = 60.0,
    ) -> None:
        self.path, self.name = path, lock.name
        self.make_handler = make_handler
        self.allowed_uids = frozenset({os.geteuid(), 0} if allowed_uids is None else allowed_uids)
        self.max_connections, self.max_per_process = max_connections, max_per_process
        self.request_deadline_s, self.idle_s = request_deadline_s, idle_s
        self._lock = lock
        self._listener: socket.socket | None = None
        self._wake: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> Self:
        """Bind the socket and start the thread.

        :raises OSError: if the socket cannot be bound
        """
        if self._listener is not None:
            raise KvmHostError("the control server has been started before")
        # We hold the lock, so whatever lies there is a dead VM's.
        self._lock.remove(self.path.name)
        self._listener = _listen(self.path, self.max_connections)
        self._wake, ours = socket.socketpair()
        self._thread = threading.Thread(
            target=self._run, args=(self._listener, ours), name="control", daemon=True
        )
        self._thread.start()
        return self

    def close(self) -> None:
        """Finish the requests in work, end the thread, remove socket and lock. Idempotent."""
        if self._thread is not None:
            assert self._wake is not None
            self._wake.close()
            self._thread.join()
            self._thread = None
        if self._listener is not None:
            self._listener.close()
        # Not only with a listener: a signal may have come between bind and its noting.
        if self._lock.held:
            self._lock.remove(self.path.name)
        self._lock.release()

    def _run(self, listener: socket.socket, stop: socket.socket) -> None:
        with stop:
            ready, _, _ = select.select([listener, stop], [], [])
            if stop in ready:
                return
            from kvmhost.control.serving import serve

            try:
                serve(self, listener, stop)
            except Exception:
                # The guest goes on without its control socket; clients see it refuse.
                log.exception("the server on %s failed", self.path)
                listener.close()

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


class ControlServer(SocketServer):
    """Answers control requests for one machine. Close it before the machine.

    :param name: the VM's name; else the machine's, else ``vm-PID``
    :param lock: the name's lock if the caller holds it already; released by :meth:`close`
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


def _listen(path: Path, backlog: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        # The mode that the socket has before bind(2) is the file's: unix_bind(), Linux.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(backlog)
        listener.setblocking(False)
        undo.pop_all()
    return listener
