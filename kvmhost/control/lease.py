"""The lease on a VM's memory management: one holder at a time, ended when it dies.

A daemon takes the lease before it sets limits and evicts, and sends its token in
every request (header ``X-Kvmhost-Lease``). Each such request renews the lease. It
ends when

- the holder releases it,
- the holder's process ends for any reason (detected by a pidfd),
- no request arrives for the holder's own time-out: the holder hangs,
- another process takes it over explicitly.

A request with an expired token is refused with status 423, so a daemon that hung and
resumed cannot change a VM that another daemon manages. Requests without a token come
from interactive tools and are accepted.

Not thread-safe: everything runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator

from kvmhost.control import schema
from kvmhost.control.handler import Problem
from kvmhost.control.peers import Peer

__all__ = ["LOCKED", "Lease"]

#: HTTP status of a request that the lease forbids.
LOCKED = 423
_HEADER = "X-Kvmhost-Lease"

log = logging.getLogger("kvmhost.control")


class Lease:
    """The lease of one VM.

    :param vm: the VM's name, for the log
    :param on_end: called when a holder loses the lease
    :param clock: a monotonic clock, in seconds
    """

    def __init__(
        self,
        vm: str,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._vm, self._clock, self._on_end = vm, clock, on_end
        self._held: schema.LeaseRequest | None = None
        self._token, self._pid, self._pidfd = "", 0, -1
        self._since_s = self._called_s = 0.0
        self._in_work = 0
        self._timer: asyncio.TimerHandle | None = None

    def info(self) -> schema.LeaseInfo | None:
        """Return the holder; None: the lease is free."""
        if self._held is None:
            return None
        now = self._clock()
        return schema.LeaseInfo(
            self._held.holder,
            self._pid,
            self._held.socket,
            self._held.ttl_s,
            now - self._since_s,
            now - self._called_s,
        )

    def take(self, asked: schema.LeaseRequest, token: str, peer: Peer) -> schema.LeaseGrant:
        """Grant the lease to a caller; the current holder keeps it, with the new terms.

        :raises Problem: 423 if another process holds it and ``take_over`` is not set
        """
        if self._held is not None and token != self._token:
            if not asked.take_over:
                raise Problem(
                    LOCKED, f"VM {self._vm!r} is looked after by {self._holder()}; take over?"
                )
            log.warning("%s: %s takes over from %s", self._vm, asked.holder, self._holder())
            self._drop()
        if self._held is None:
            self._token, self._pid = secrets.token_hex(16), peer.pid
            self._since_s = self._clock()
            self._watch(peer.pid)
        self._held = asked
        self._renew()
        return schema.LeaseGrant(self._token)

    def give_back(self, token: str) -> None:
        """End the lease.

        :raises Problem: 423 if that token does not hold it
        """
        self._check(token)
        self._drop()

    @contextlib.contextmanager
    def used_by(self, token: str) -> Iterator[None]:
        """Renew the lease by a request that names it; without a token do nothing.

        :raises Problem: 423 if that token does not hold it
        """
        if not token:
            yield
            return
        self._check(token)
        self._in_work += 1
        try:
            yield
        finally:
            self._in_work -= 1
            if token == self._token:
                self._renew()

    def check_free(self, token: str, force: bool) -> None:
        """Refuse a change that the holder would undo, unless forced or requested by the holder.

        :raises Problem: 423 if another holds the lease
        """
        if self._held is not None and token != self._token and not force:
            raise Problem(
                LOCKED, f"VM {self._vm!r} is managed by {self._holder()}, which may evict again"
            )

    def close(self) -> None:
        """Forget the holder. Idempotent."""
        self._drop()

    def _check(self, token: str) -> None:
        if self._held is None or token != self._token:
            who = f"it is with {self._holder()}" if self._held else "nobody has it now"
            raise Problem(LOCKED, f"VM {self._vm!r}: the lease was lost; {who}", _HEADER)

    def _holder(self) -> str:
        assert self._held is not None
        return f"{self._held.holder} (process {self._pid})"

    def _renew(self) -> None:
        assert self._held is not None
        self._called_s = self._clock()
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._held.ttl_s, self._look)

    def _look(self) -> None:
        """End the lease if its holder has timed out; else check again later."""
        self._timer = None
        if self._held is None:
            return
        silent_s = self._clock() - self._called_s
        left_s = self._held.ttl_s - silent_s
        if left_s <= 0 and not self._in_work:
            log.warning(
                "%s: %s has not called for %.1f s; its lease is dropped, the limit stays",
                self._vm,
                self._holder(),
                silent_s,
            )
            self._drop()
            return
        wait_s = max(left_s, self._held.ttl_s / 10)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._look)

    def _watch(self, pid: int) -> None:
        """Watch the holder's process by a pidfd; without one, only the time-out applies."""
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(pid) if pid > 0 else -1
        if self._pidfd >= 0:
            asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        log.warning("%s: %s has ended; the limit stays", self._vm, self._holder())
        self._drop()

    def _drop(self) -> None:
        if self._held is not None:
            self._on_end()
        self._held, self._token, self._pid = None, "", 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            fd, self._pidfd = self._pidfd, -1
            os.close(fd)
