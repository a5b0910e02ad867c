"""Server of the daemon's control socket: status, decisions, pages, metrics, commands.

=========================== ===========================================================
``GET  /metrics``           Prometheus text
``GET  /v1/status``         the daemon and its VMs
``GET  /v1/config``         the options in force, as TOML
``GET  /v1/decisions``      the last decisions: ``count``, ``vm``, ``gfn``, ``after``
``GET  /v1/page``           one page of one VM: ``vm``, ``gfn``
``GET  /v1/lru_gen``        generations, as the kernel's file shows them: ``vm``
``POST /v1/lru_gen``        commands, as the kernel's file takes them
``GET  /v1/lru_gen/enabled`` capabilities of one VM's policy: ``vm``
``POST /v1/lru_gen/enabled`` set them, as the kernel's file takes them
=========================== ===========================================================

It is the server of a VM's control socket, with the same bounds on connections and requests.
Requests that wait for the end of a pass run in a worker thread, with a timeout.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import math
import os
import time
from collections.abc import Callable
from typing import Any

from kvmhost.control import schema
from kvmhost.control.handler import (
    Problem,
    Reply,
    Request,
    Route,
    by_method,
    json_reply,
    no_body,
    nothing_asked,
)
from kvmhost.control.paths import NameLock
from kvmhost.control.peers import Peer
from kvmhost.control.routes import problem_of
from kvmhost.control.server import LoopbackServer, SocketServer
from kvmhost.reclaim.control import schema as answers
from kvmhost.reclaim.control.metrics import Metrics
from kvmhost.reclaim.control.paths import socket_of
from kvmhost.reclaim.daemon import Daemon
from kvmhost.reclaim.settings.config import to_toml
from kvmhost.reclaim.vm.session import Session
from kvmhost.timescale import scaled
from kvmhost.units import PAGE_BYTES

__all__ = ["DaemonServer", "MetricsServer"]

_TEXT = "text/plain"
#: The format that Prometheus 2 and later parse; `text` writes it.
_METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_MAX_BODY_BYTES = 128 << 10
#: Size that a long response counts as, and bound on their sum.
_LARGE_REPLY_BYTES, _MAX_BYTES_IN_FLIGHT = 1 << 20, 8 << 20
#: Maximum time that a request waits for the running pass.
_WAIT_S = scaled(20.0)


class DaemonServer(SocketServer):
    """Serves the socket of one daemon. Close it after the daemon has ended.

    :param lock: lock of the daemon's name; :meth:`close` releases it
    """

    def __init__(self, daemon: Daemon, metrics: Metrics, lock: NameLock, **settings: Any) -> None:
        started_s = time.monotonic()  # handlers are made when the first client connects
        super().__init__(
            socket_of(lock.name),
            lock,
            lambda: _Routes(daemon, metrics, lock.name, started_s),
            eager=True,
            **settings,
        )


class MetricsServer(LoopbackServer):
    """Serves ``/metrics`` on a port of the loopback interface, to every user of the host.

    :raises OSError: from ``start``, if the port is in use
    """

    def __init__(self, metrics: Metrics, port: int, **settings: Any) -> None:
        limits = {"max_connections": 16, "max_per_process": 8} | settings
        super().__init__(
            "metrics port", port, lambda: _MetricsRoutes(metrics), eager=True, **limits
        )


class _MetricsRoutes:
    """The only route of the port; a handler of :mod:`kvmhost.control.handler`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "metrics-worker")
        self.max_body_bytes, self.max_bytes_in_flight = 0, _MAX_BYTES_IN_FLIGHT

    def reply_bound(self, path: str) -> int:
        """Return the bound on the part of a response that grows with the number of VMs."""
        return _LARGE_REPLY_BYTES

    def has_kept_slot(self, peer: Peer) -> bool:
        """Return False: no slot is reserved here, except for root."""
        return False

    def find(self, method: str, path: str) -> Route:
        """Return the handler of a request.

        :raises Problem: 404 for another path, 405 for the wrong method
        """
        return by_method({"GET": self._get} if path == "/metrics" else None, method, path)

    def problem_of(self, error: Exception) -> Problem:
        """Return the error response for an exception."""
        return problem_of(error)

    def cancel_timers(self) -> None:
        """Do nothing: these servers have no timers."""

    def close(self) -> None:
        """Wait for the worker thread to end."""
        self._executor.shutdown(wait=True)

    async def _get(self, request: Request) -> Reply:
        nothing_asked(request)
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._executor, self._metrics.text)
        return Reply(text, _METRICS_TEXT)


class _Routes:
    """Finds and answers requests; a handler of :mod:`kvmhost.control.handler`."""

    def __init__(self, daemon: Daemon, metrics: Metrics, name: str, started_s: float) -> None:
        self._daemon, self._metrics, self._name = daemon, metrics, name
        self._started_s = started_s
        self._executor = concurrent.futures.ThreadPoolExecutor(2, "daemon-worker")
        self._table: dict[str, dict[str, Route]] = {
            "/metrics": {"GET": self._get_metrics},
            "/v1/status": {"GET": self._get_status},
            "/v1/config": {"GET": self._get_config},
            "/v1/decisions": {"GET": self._get_decisions},
            "/v1/page": {"GET": self._get_page},
            "/v1/lru_gen": {"GET": self._get_lru_gen, "POST": self._post_lru_gen},
            "/v1/lru_gen/enabled": {"GET": self._get_enabled, "POST": self._post_enabled},
        }

    @property
    def max_body_bytes(self) -> int:
        """The largest body: a list of commands."""
        return _MAX_BODY_BYTES

    @property
    def max_bytes_in_flight(self) -> int:
        """Bound on the bodies and responses of all connections."""
        return _MAX_BYTES_IN_FLIGHT

    def reply_bound(self, path: str) -> int:
        """Return the bound on the part of a response that grows with VMs or stored data."""
        return _LARGE_REPLY_BYTES if path in ("/metrics", "/v1/decisions", "/v1/lru_gen") else 0

    def has_kept_slot(self, peer: Peer) -> bool:
        """Return False: a daemon has no leases."""
        return False

    def find(self, method: str, path: str) -> Route:
        """Return the handler of a request.

        :raises Problem: 404 for an unknown path, 405 for the wrong method
        """
        return by_method(self._table.get(path), method, path)

    def problem_of(self, error: Exception) -> Problem:
        """Return the error response for an exception."""
        return problem_of(error)

    def cancel_timers(self) -> None:
        """Do nothing: these servers have no timers."""

    def close(self) -> None:
        """Wait for the worker threads to end."""
        self._executor.shutdown(wait=True)

    async def _get_metrics(self, request: Request) -> Reply:
        nothing_asked(request)
        return Reply(await self._work(self._metrics.text), _METRICS_TEXT)

    async def _get_status(self, request: Request) -> Reply:
        nothing_asked(request)
        host = self._daemon.context.host
        return json_reply(
            answers.DaemonStatus(
                name=self._name,
                pid=os.getpid(),
                dry_run=self._daemon.context.config.daemon.dry_run,
                uptime_s=time.monotonic() - self._started_s,
                vms=[_vm_status(session) for session in self._daemon.sessions()],
                host=answers.HostStatus(
                    host.stall,
                    host.trigger_fired,
                    host.cgroup_bytes,
                    host.cgroup_limit_bytes,
                    host.problem,
                ),
            )
        )

    async def _get_config(self, request: Request) -> Reply:
        nothing_asked(request)
        return Reply(to_toml(self._daemon.context.config).encode(), _TEXT)

    async def _get_decisions(self, request: Request) -> Reply:
        no_body(request)
        asked = schema.decode_query(request.query, answers.DecisionQuery)
        found = await self._work(
            lambda: self._daemon.context.decisions.last(
                asked.count, vm=asked.vm, gfn=asked.gfn, after=asked.after
            )
        )
        return json_reply(answers.DecisionList(found))

    async def _get_page(self, request: Request) -> Reply:
        from kvmhost.reclaim.control.explain import explain

        no_body(request)
        asked = schema.decode_query(request.query, answers.PageQuery)
        session = self._session(asked.vm)
        return json_reply(
            await self._work(lambda: _locked(session, lambda: explain(session, asked.gfn)))
        )

    async def _get_lru_gen(self, request: Request) -> Reply:
        from kvmhost.reclaim.control.commands import show_text

        no_body(request)
        asked = schema.decode_query(request.query, answers.VmQuery)
        text = await self._work(lambda: show_text(self._daemon.sessions(), asked.vm, asked.full))
        return json_reply(answers.LruGenText(text))

    async def _post_lru_gen(self, request: Request) -> Reply:
        from kvmhost.reclaim.control.commands import run_text

        schema.decode_query(request.query, schema.NoQuery)
        asked = schema.decode(request.body, answers.CommandRequest)
        pages = await self._work(lambda: run_text(self._daemon.sessions(), asked.command))
        return json_reply(answers.LruGenReport(pages))

    async def _get_enabled(self, request: Request) -> Reply:
        no_body(request)
        asked = schema.decode_query(request.query, answers.EnabledQuery)
        return await self._enabled(asked.vm, None)

    async def _post_enabled(self, request: Request) -> Reply:
        schema.decode_query(request.query, schema.NoQuery)
        asked = schema.decode(request.body, answers.EnabledRequest)
        return await self._enabled(asked.vm, asked.value)

    async def _enabled(self, vm: str, value: str | None) -> Reply:
        from kvmhost.reclaim.control.commands import enabled

        text = await self._work(lambda: enabled(self._daemon.sessions(), vm, value))
        return json_reply(answers.LruGenText(text))

    def _session(self, vm: str) -> Session:
        for session in self._daemon.sessions():
            if session.vm == vm:
                return session
        raise Problem(404, f"VM {vm[:80]!r} is not managed by this daemon", "vm")

    async def _work(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


def _locked(session: Session, call: Callable[[], Any]) -> Any:
    """Call a function between two passes.

    :raises Problem: 503 if the running pass does not end in time
    """
    if not session.lock.acquire(timeout=_WAIT_S):
        raise Problem(503, f"the pass over {session.vm!r} takes longer than {_WAIT_S:g} s")
    try:
        return call()
    finally:
        session.lock.release()


def _vm_status(session: Session) -> answers.VmStatus:
    last, budget = session.last, session.budget
    return answers.VmStatus(
        vm=session.vm,
        policy=session.driver.policy.name,
        passes=session.passes,
        resident_bytes=session.pages.n_resident * PAGE_BYTES,
        budget_bytes=budget.max_bytes if budget else 0,
        evicted_pages=sum(dict(session.totals.evicted).values()),
        refaulted_pages=session.totals.refaulted,
        holding=session.reclaim_target.backoff.holding,
        why=last.why if last else "",
        loss=_loss_status(session),
    )


def _loss_status(session: Session) -> answers.LossStatus:
    loss, cost = session.loss, session.loss.cost
    max_loss = loss.bound.max_loss
    return answers.LossStatus(
        max_loss=max_loss if math.isfinite(max_loss) else None,
        loss=loss.loss,
        fault_ns=cost.fault_ns if cost is not None else None,
        problem=loss.problem,
        n_steady=loss.pages.n_steady,
        cleared_steady=loss.clearing.steady,
        cleared_changing=loss.clearing.changing,
        interval_s=session.interval_s,
        stale_s=loss.stale_s(session.context.config.daemon.interval),
        other_faults=loss.bound.others,
    )
