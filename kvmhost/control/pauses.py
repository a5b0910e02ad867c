"""Pauses over the control socket: each ends automatically after a time-out.

A client that pauses a VM and dies would leave it paused for ever. So every pause has a
time-out, one minute by default, after which the VM resumes and logs a message. Pauses
nest; each has a number, by which it can be undone. When the socket closes, its pauses
end too: no client could undo them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import typing
from collections.abc import Awaitable, Callable
from typing import Any

from kvmhost.control.handler import Problem

if typing.TYPE_CHECKING:
    from kvmhost.machine.base import BaseMachine

__all__ = ["Pauses"]

log = logging.getLogger("kvmhost.control")


class Pauses:
    """The pauses of one machine. Everything runs in the server's event loop.

    :param work: runs a blocking call outside of the event loop
    """

    def __init__(
        self, machine: BaseMachine, vm: str, work: Callable[[Callable[[], Any]], Awaitable[Any]]
    ) -> None:
        self._machine, self._vm, self._work = machine, vm, work
        self._changing = asyncio.Lock()
        # Pauses that this object holds on the machine, open or being made; a worker thread
        # increments this even if the client no longer waits.
        self._counting, self._n_held, self._closed = threading.Lock(), 0, False
        self._last = 0
        #: Timer of each pause by number; None for one without a time-out.
        self._open: dict[int, asyncio.TimerHandle | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def pause(self, for_s: float) -> int:
        """Hold the vCPUs and return the pause's number.

        :param for_s: seconds after which they resume automatically; 0: never
        """
        async with self._changing:
            await self._work(self._hold)
            self._last += 1
            timer = None
            if for_s:
                loop = asyncio.get_running_loop()
                timer = loop.call_later(for_s, self._time_is_over, self._last, for_s)
            self._open[self._last] = timer
            return self._last

    async def resume(self, number: int | None) -> None:
        """Undo one pause: the one with this number, else the last one, else ``--paused``.

        :raises Problem: 409 if no pause of that number is in effect
        """
        async with self._changing:
            if number is not None and number not in self._open:
                raise Problem(409, f"pause {number} is over", "pause")
            if number is None and self._open:
                number = max(self._open)
            timer = None if number is None else self._open.pop(number)
            if timer is not None:
                timer.cancel()
            await self._work(self._machine.resume if number is None else self._release)

    async def stop(self) -> None:
        """End the guest without waiting: a pause in progress ends with it."""
        await asyncio.to_thread(self._machine.stop)

    def close(self) -> None:
        """End every pause; one in progress ends as soon as it takes effect."""
        with self._counting:
            self._closed = True
            held, self._n_held = self._n_held, 0
        for _ in range(held):
            self._machine.resume()
        for timer in self._open.values():
            if timer is not None:
                timer.cancel()
        self._open.clear()
        for task in self._tasks:
            task.cancel()

    def _hold(self) -> None:
        self._machine.pause()
        with self._counting:
            self._n_held += 1
            closed = self._closed
        if closed:
            self._release()

    def _release(self) -> None:
        with self._counting:
            mine = self._n_held > 0
            self._n_held -= mine
        if mine:
            self._machine.resume()

    def _time_is_over(self, number: int, for_s: float) -> None:
        task = asyncio.get_running_loop().create_task(self._end(number, for_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end(self, number: int, for_s: float) -> None:
        async with self._changing:
            # Another request may have resumed the VM while this one waited for its turn.
            if self._open.pop(number, None) is not None:
                log.warning("%s: nobody ended a pause of %g s; it is over", self._vm, for_s)
                await self._work(self._release)
