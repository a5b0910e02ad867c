"""The memory budget shared by the requests and responses of one server.

Every connection may hold :data:`SMALL_BYTES` outside the budget; the number of connections
bounds that. Anything larger reserves memory before it is read or computed, and releases it
when the response is sent or the client disconnects; a request waits while the budget is full.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator

__all__ = ["SMALL_BYTES", "ByteBudget"]

SMALL_BYTES = 64 << 10


class ByteBudget:
    """A memory budget, granted in order of request. For one event loop.

    :param limit_bytes: sum of all shares; a larger share gets all of it
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

    @property
    def used_bytes(self) -> int:
        """Bytes in use now."""
        return self._used

    @contextlib.asynccontextmanager
    async def share(self, n_bytes: int, wait_s: float) -> AsyncIterator[None]:
        """Hold a share while the block runs.

        :raises TimeoutError: if none is available within ``wait_s`` seconds
        """
        n_bytes = 0 if n_bytes <= SMALL_BYTES else min(n_bytes, self._limit)
        await self._take(n_bytes, wait_s)
        try:
            yield
        finally:
            self._used -= n_bytes
            self._deal()

    async def _take(self, n_bytes: int, wait_s: float) -> None:
        if not n_bytes:
            return
        turn = asyncio.get_running_loop().create_future()
        entry = (n_bytes, turn)
        self._waiting.append(entry)
        self._deal()
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except BaseException:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not turn.cancelled():
                self._used -= n_bytes
            self._deal()
            raise

    def _deal(self) -> None:
        while self._waiting and self._used + self._waiting[0][0] <= self._limit:
            n_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self._used += n_bytes
                turn.set_result(None)
