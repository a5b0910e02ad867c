"""The readers of a VM's views, on the control socket: a view ends when its reader is gone.

A named view belongs to the process that opened it, and the same name of another process is
another view. It ends when

- the reader closes it, which a :class:`~kvmhost.control.client.Client` does at its end,
- the reader's process ends for any reason (detected by a pidfd); where the kernel does not
  name the process, when the connection that opened it is closed,
- the lease ends under which it was opened.

Not thread-safe: everything runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

from kvmhost.control.handler import Problem, Request
from kvmhost.trackers.views import UNNAMED, ViewKey

__all__ = ["Readers"]


#: Ends the views whose keys it accepts, after the harvest in progress; returns how many.
EndViews = Callable[[Callable[[ViewKey], bool]], Awaitable[int]]


class Readers:
    """Knows whose views are open, and ends those of readers that are gone."""

    def __init__(self, end_views: EndViews) -> None:
        self._end_views = end_views
        self._leased: set[ViewKey] = set()
        self._pidfds: dict[int, int] = {}
        #: Readers that are known by their connection only, by the event of its end.
        self._connections: dict[asyncio.Event, int] = {}
        self._n_connections = 0
        self._tasks: set[asyncio.Future[Any]] = set()

    def key_of(self, name: str, request: Request) -> ViewKey:
        """Return the key of a request's view; watch its reader from now on.

        :raises Problem: 503 if the reader is gone already
        """
        if name == UNNAMED.name:
            return UNNAMED
        owner = self._watched_process(request) or self._watched_connection(request)
        key = ViewKey(owner, name)
        if request.lease:
            self._leased.add(key)
        return key

    async def end(self, name: str, request: Request) -> bool:
        """End a view of the reader that sends the request; return whether it was open."""
        key = ViewKey(self._connections.get(request.gone, request.peer.pid), name)
        self._leased.discard(key)
        return await self._end_views(lambda each: each == key) > 0

    def lease_ended(self) -> None:
        """End the views that were opened under the lease."""
        keys, self._leased = self._leased, set()
        if keys:
            self._start(self._end_views(lambda each: each in keys))

    def close(self) -> None:
        """Stop watching. Idempotent."""
        for pid in list(self._pidfds):
            self._unwatch(pid)
        for task in self._tasks:
            task.cancel()

    def _watched_process(self, request: Request) -> int:
        """Watch the peer's process; return its id, or 0 if that is not possible."""
        pid = request.peer.pid
        if pid <= 0 or pid in self._pidfds:
            return max(pid, 0)
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise Problem(503, "the client left before its turn") from None
        except OSError:
            return 0
        self._pidfds[pid] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._process_ended, pid)
        return pid

    def _watched_connection(self, request: Request) -> int:
        """Watch the connection; return a number for it that is no process id."""
        gone = request.gone
        if gone not in self._connections:
            self._n_connections += 1
            self._connections[gone] = -self._n_connections
            self._start(self._wait_gone(gone))
        return self._connections[gone]

    async def _wait_gone(self, gone: asyncio.Event) -> int:
        await gone.wait()
        return await self._end_all(self._connections.pop(gone))

    def _process_ended(self, pid: int) -> None:
        self._unwatch(pid)
        self._start(self._end_all(pid))

    def _unwatch(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid)
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)

    async def _end_all(self, owner: int) -> int:
        self._leased = {key for key in self._leased if key.owner != owner}
        return await self._end_views(lambda each: each.owner == owner)

    def _start(self, work: Awaitable[int]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
