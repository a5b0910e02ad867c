"""The requests of the control socket, on a machine.

=============================== ====================================================
``GET  /v1/state``              name, status, counts, sizes
``GET  /v1/memory``             regions and pinned ranges
``GET  /v1/counters``           machine, harvests, pager
``GET  /v1/rearm_cost``         what the touch of a re-armed page costs the guest
``GET  /v1/resident``           bitmap: which pages the memfds hold
``GET  /v1/residency``          where pages are, and what happened to them
``GET  /v1/pages/GFN``          one page
``POST /v1/harvest``            bitmap: which pages were young
``DELETE /v1/views/NAME``       end a view of the caller
``POST /v1/evict``              evict a list of pages
``POST /v1/restore``            restore the evicted pages of a range
``POST /v1/drain``              restore all pages and stop evicting
``PUT  /v1/limit``              resident limit, held by the fault handler
``PUT  /v1/victims``            pages to evict first at the limit
``POST /v1/pause|resume|stop``  the vCPUs
``POST /v1/snapshot``           the whole VM into a file
``GET|PUT|DELETE /v1/lease``    which daemon manages this VM
=============================== ====================================================

Calls that may block run in a worker thread: one harvest at a time, one change of the
pager at a time, one change of the run state at a time. ``state``, ``memory`` and
page look-ups never wait for those.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import functools
import threading
import typing
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvmhost.bitmap import Words, YoungBitmap, n_words, pack
from kvmhost.control import schema
from kvmhost.control.handler import (
    BINARY,
    Problem,
    Reply,
    Request,
    Route,
    by_method,
    json_reply,
    no_body,
    nothing_asked,
)
from kvmhost.control.lease import Lease
from kvmhost.control.pauses import Pauses
from kvmhost.control.peers import Peer
from kvmhost.control.readers import Readers
from kvmhost.control.residency import residency_bytes, residency_of
from kvmhost.control.schema import HEADER_PREFIX, SchemaError
from kvmhost.errors import (
    CapabilityError,
    HostError,
    IoctlError,
    KvmHostError,
    LayoutError,
    PagerError,
    PauseTimeout,
    StateError,
)
from kvmhost.memory.pagelist import PageList, page_list
from kvmhost.pager.results import PageEvent
from kvmhost.vm.checks import range_within
from kvmhost.vm.harvest import Harvest, HarvestRequest

if typing.TYPE_CHECKING:
    from kvmhost.machine.base import BaseMachine
    from kvmhost.trackers.views import ViewKey

__all__ = ["Routes", "problem_of"]

Answering = Callable[..., Awaitable[Reply]]


def problem_of(error: Exception) -> Problem:
    """Return the response for an exception."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, SchemaError):
        return Problem(400, error.problem, error.field)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Problem(503, f"no descriptor left: {error.strerror}")
    if isinstance(error, KvmHostError):
        return Problem(_status_of(error), str(error), getattr(error, "field", ""), error=error)
    return Problem(500, "internal error; see the VM's log")


def _status_of(error: KvmHostError) -> int:
    if isinstance(error, LayoutError):
        return 400
    if isinstance(error, HostError):
        return 400 if error.is_bad_path else 507
    if isinstance(error, CapabilityError):
        return 501
    if isinstance(error, IoctlError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
        return 507
    if isinstance(error, PauseTimeout):
        return 503
    return 409 if isinstance(error, PagerError | StateError) else 500


class Routes:
    """Finds and answers requests on one machine."""

    def __init__(self, machine: BaseMachine, name: str) -> None:
        self._machine, self._name = machine, name
        self._executor = concurrent.futures.ThreadPoolExecutor(4, "control-worker")
        self._harvesting, self._paging = asyncio.Lock(), asyncio.Lock()
        self._pauses = Pauses(machine, name, self._work)
        self._readers = Readers(self._end_views)
        self._lease = Lease(name, on_end=self._readers.lease_ended)
        self._table: dict[str, dict[str, Answering]] = {
            "/v1/state": {"GET": self._get_state},
            "/v1/memory": {"GET": self._get_memory},
            "/v1/counters": {"GET": self._get_counters},
            "/v1/rearm_cost": {"GET": self._get_rearm_cost},
            "/v1/resident": {"GET": self._get_resident},
            "/v1/residency": {"GET": self._get_residency},
            "/v1/harvest": {"POST": self._harvest},
            "/v1/evict": {"POST": self._evict},
            "/v1/restore": {"POST": self._restore},
            "/v1/drain": {"POST": self._drain},
            "/v1/limit": {"PUT": self._put_limit},
            "/v1/victims": {"PUT": self._put_victims},
            "/v1/pause": {"POST": self._pause},
            "/v1/resume": {"POST": self._resume},
            "/v1/stop": {"POST": self._stop},
            "/v1/snapshot": {"POST": self._snapshot},
            "/v1/lease": {
                "GET": self._get_lease,
                "PUT": self._put_lease,
                "DELETE": self._delete_lease,
            },
        }

    @property
    def max_body_bytes(self) -> int:
        """The largest body: every gfn of the VM, in JSON, and a little more."""
        return self._machine.memory.n_pages * 16 + (64 << 10)

    @property
    def max_bytes_in_flight(self) -> int:
        """Four of the largest bodies: 64 bytes per page, 1.6 % of the memory, and 256 KiB."""
        return 4 * self.max_body_bytes

    def reply_bound(self, path: str) -> int:
        """Return the memory that building a response takes: bitmaps, outcomes of pages."""
        if path in ("/v1/harvest", "/v1/resident"):
            # Young and coarse, as arrays and as bytes.
            return 4 * 8 * n_words(self._machine.memory.gfn_end)
        if path == "/v1/residency":
            return residency_bytes(self._machine)
        return 4 * self._machine.memory.n_pages if path == "/v1/evict" else 0

    def has_kept_slot(self, peer: Peer) -> bool:
        """Whether a peer is the process that holds the lease."""
        holder = self._lease.info()
        return holder is not None and peer.pid != 0 and peer.pid == holder.pid

    def close(self) -> None:
        """Wait for the worker threads to end. Without the event loop."""
        self._executor.shutdown(wait=True)

    def cancel_timers(self) -> None:
        """Cancel the timers of pauses and lease; in the event loop."""
        self._pauses.close()
        self._lease.close()
        self._readers.close()

    def find(self, method: str, path: str) -> Route:
        """Return the route of a request.

        :raises Problem: 404 for an unknown path, 405 for the wrong method
        """
        routes, args = self._table.get(path), ()
        if routes is None and path.startswith("/v1/pages/"):
            page = by_method({"GET": self._get_page}, method, path)
            return functools.partial(self._answer, page, (path.removeprefix("/v1/pages/"),))
        if routes is None and path.startswith("/v1/views/"):
            view = by_method({"DELETE": self._delete_view}, method, path)
            return functools.partial(self._answer, view, (path.removeprefix("/v1/views/"),))
        return functools.partial(self._answer, by_method(routes, method, path), args)

    def problem_of(self, error: Exception) -> Problem:
        """Return the response for an exception."""
        return problem_of(error)

    async def _answer(self, route: Answering, args: tuple[str, ...], request: Request) -> Reply:
        with self._lease.used_by(request.lease):
            return await route(request, *args)

    # -- queries --------------------------------------------------------------

    async def _get_state(self, request: Request) -> Reply:
        nothing_asked(request)
        doing = await self._work(self._machine.describe_vcpus) if self._machine.still else {}
        state = self._machine.state_with(doing)
        return json_reply(msgspec.structs.replace(state, name=self._name, lease=self._lease.info()))

    async def _get_memory(self, request: Request) -> Reply:
        nothing_asked(request)
        return json_reply(self._machine.memory_map())

    async def _get_counters(self, request: Request) -> Reply:
        nothing_asked(request)
        return json_reply(await self._work(self._machine.counters))

    async def _get_rearm_cost(self, request: Request) -> Reply:
        nothing_asked(request)
        return json_reply(await self._work(self._machine.rearm_cost))

    async def _get_resident(self, request: Request) -> Reply:
        asked = schema.decode_query(request.query, schema.RangeQuery)
        no_body(request)
        gfn_start, n_pages = self._range(asked)
        resident = await self._work(lambda: self._machine.resident(gfn_start, n_pages))
        return _bitmap(YoungBitmap(gfn_start, n_pages, pack(resident)))

    async def _get_residency(self, request: Request) -> Reply:
        asked = schema.decode_query(request.query, schema.ResidencyQuery)
        no_body(request)
        found = await self._work(lambda: residency_of(self._machine, asked.since))
        return json_reply(found)

    async def _get_page(self, request: Request, text: str) -> Reply:
        nothing_asked(request)
        try:
            gfn = int(text, 0)
        except ValueError:
            raise Problem(400, f"no gfn: {text[:80]!r}", "gfn") from None
        return json_reply(await self._work(lambda: self._machine.page(gfn)))

    # -- harvest --------------------------------------------------------------

    async def _harvest(self, request: Request) -> Reply:
        query = schema.decode_query(request.query, schema.HarvestQuery)
        gfn_start, n_pages = self._range(query)
        asked = HarvestRequest(
            gfn_start,
            n_pages,
            tracker=query.tracker,
            clear=query.clear,
            rearm=query.rearm,
            fraction=query.fraction,
            mask=_mask(request.body, n_pages) if request.body else None,
            table_format=query.table_format or None,
            view=query.view,
            max_age_s=query.max_age_s,
            force=query.force,
        )
        async with self._turn(self._harvesting, request):
            owner = self._readers.key_of(query.view, request).owner
            found = await self._work(lambda: self._machine.run_harvest(asked, owner))
        return _bitmap(found.young, found)

    async def _delete_view(self, request: Request, name: str) -> Reply:
        nothing_asked(request)
        if not await self._readers.end(name, request):
            raise Problem(404, f"the caller reads no view {name[:40]!r}", "view")
        return json_reply(schema.ViewReport(name))

    async def _end_views(self, is_ended: Callable[[ViewKey], bool]) -> int:
        """End views after the harvest in progress; return how many."""
        async with self._harvesting:
            keys = [view.key for view in self._machine.views() if is_ended(view.key)]
            for key in keys:
                await self._work(functools.partial(self._machine.close_view, key.name, key.owner))
        return len(keys)

    # -- pager ----------------------------------------------------------------

    async def _evict(self, request: Request) -> Reply:
        asked = schema.decode_query(request.query, schema.EvictQuery)
        pages = self._gfns(request, schema.EvictRequest)
        async with self._turn(self._paging, request):
            event = PageEvent.EVICTED_DAEMON if request.lease else PageEvent.EVICTED_REQUEST
            evict = functools.partial(self._machine.evict, pages, asked.each)
            report = await self._work(lambda: evict(actuator=asked.actuator, event=event))
        return json_reply(report)

    async def _restore(self, request: Request) -> Reply:
        schema.decode_query(request.query, schema.NoQuery)
        asked = schema.decode(request.body, schema.RestoreRequest)
        async with self._turn(self._paging, request):
            report = await self._work(lambda: self._machine.restore(asked.gfn_start, asked.n_pages))
        return json_reply(report)

    async def _drain(self, request: Request) -> Reply:
        query = schema.decode_query(request.query, schema.DrainQuery)
        no_body(request)
        self._lease.check_free(request.lease, query.force)
        async with self._turn(self._paging, request):
            return json_reply(await self._work(self._machine.drain))

    async def _put_limit(self, request: Request) -> Reply:
        schema.decode_query(request.query, schema.NoQuery)
        asked = schema.decode(request.body, schema.LimitRequest)
        async with self._turn(self._paging, request):
            return json_reply(await self._work(lambda: self._run_limit(asked)))

    def _run_limit(self, asked: schema.LimitRequest) -> schema.LimitState:
        if asked.shrink:
            return self._machine.shrink(asked.resident_max_bytes)
        return schema.LimitState(self._machine.set_limit(asked.resident_max_bytes), 0)

    async def _put_victims(self, request: Request) -> Reply:
        schema.decode_query(request.query, schema.NoQuery)
        pages = self._gfns(request, schema.GfnList)
        async with self._turn(self._paging, request):
            n_pages = await self._work(lambda: self._machine.set_victims(pages))
        return json_reply(schema.VictimsReport(n_pages))

    # -- vCPUs ----------------------------------------------------------------

    async def _pause(self, request: Request) -> Reply:
        asked = schema.decode_query(request.query, schema.PauseQuery)
        no_body(request)
        number = await self._pauses.pause(asked.for_s)
        state = self._machine.run_state()
        return json_reply(msgspec.structs.replace(state, pause=number))

    async def _resume(self, request: Request) -> Reply:
        asked = schema.decode_query(request.query, schema.ResumeQuery)
        no_body(request)
        await self._pauses.resume(asked.pause)
        return json_reply(self._machine.run_state())

    async def _snapshot(self, request: Request) -> Reply:
        schema.decode_query(request.query, schema.NoQuery)
        asked = schema.decode(request.body, schema.SnapshotRequest)
        path = Path(asked.path)
        if not path.is_absolute():
            raise Problem(400, "need an absolute path: the VM has its own directory", "path")

        cancelled = threading.Event()

        def save() -> int:
            return self._machine.snapshot(path, asked.stop, cancelled=cancelled.is_set)

        async def watch() -> None:
            await request.gone.wait()
            cancelled.set()

        watching = asyncio.create_task(watch())
        try:
            async with self._turn(self._paging, request):
                return json_reply(schema.SnapshotReport(await self._work(save)))
        finally:
            cancelled.set()
            watching.cancel()

    async def _stop(self, request: Request) -> Reply:
        nothing_asked(request)
        await self._pauses.stop()
        return json_reply(self._machine.run_state())

    # -- lease ----------------------------------------------------------------

    async def _get_lease(self, request: Request) -> Reply:
        nothing_asked(request)
        return json_reply(schema.LeaseState(self._lease.info()))

    async def _put_lease(self, request: Request) -> Reply:
        schema.decode_query(request.query, schema.NoQuery)
        asked = schema.decode(request.body, schema.LeaseRequest)
        return json_reply(self._lease.take(asked, request.lease, request.peer))

    async def _delete_lease(self, request: Request) -> Reply:
        nothing_asked(request)
        self._lease.give_back(request.lease)
        return json_reply(schema.LeaseState(None))

    # -- helpers --------------------------------------------------------------

    async def _work(self, call: Callable[[], Any]) -> Any:
        # The executor shields the call: it finishes even if the client disconnects.
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    @contextlib.asynccontextmanager
    async def _turn(self, lock: asyncio.Lock, request: Request) -> AsyncIterator[None]:
        """Wait for a turn. The request of a client that has disconnected is not started."""
        async with lock:
            if request.gone.is_set():
                raise Problem(503, "the client left before its turn")
            yield

    def _range(self, asked: schema.RangeQuery) -> tuple[int, int]:
        return range_within(asked.gfn_start, asked.n_pages, self._machine.memory.gfn_end)

    def _gfns(self, request: Request, kind: type[schema.GfnList]) -> PageList:
        """Read and check a list of gfns, JSON or binary.

        :raises LayoutError: naming the first gfn that is in no region
        """
        body = request.body
        if request.is_json:
            gfns = np.array(schema.decode(body, kind).gfns, dtype=np.int64)
        elif len(body) % 8:
            raise Problem(400, f"{len(body)} bytes: no whole number of 64-bit gfns", "body")
        else:
            gfns = np.frombuffer(body, dtype="<u8").astype(np.int64)
        if gfns.size > self._machine.memory.n_pages:
            most = self._machine.memory.n_pages
            raise Problem(400, f"{gfns.size} pages: the VM has {most}", "gfns")
        return page_list(self._machine.memory, gfns)


def _mask(body: bytes, n_pages: int) -> Words:
    needed = n_words(n_pages) * 8
    if len(body) != needed:
        raise Problem(400, f"mask of {len(body)} bytes: {n_pages} pages need {needed}", "body")
    return np.frombuffer(body, dtype="<u8").astype(np.uint64)


def _bitmap(bitmap: YoungBitmap, cost: Harvest | None = None) -> Reply:
    source = bitmap.provenance
    values: dict[str, Any] = {
        "Gfn-Start": bitmap.gfn_start,
        "N-Pages": bitmap.n_pages,
        "Tracker": source.tracker,
        "Table-Format": source.table_format,
        "Window-Start-Ns": source.window_start_ns,
        "Window-End-Ns": source.window_end_ns,
        "Coarse": int(bitmap.coarse is not None),
    }
    if source.evidence:
        values["Evidence"] = source.evidence
    if cost is not None:
        values |= {"Harvest-Ns": cost.harvest_ns, "Rearm-Ns": cost.rearm_ns}
    parts = [bitmap.words] if bitmap.coarse is None else [bitmap.words, bitmap.coarse]
    body = b"".join(words.astype("<u8", copy=False).data for words in parts)
    return Reply(body, BINARY, {HEADER_PREFIX + name: str(v) for name, v in values.items()})
