"""The requests of the control socket, on a machine.

=============================== ====================================================
``GET  /v1/state``              name, status, counts, sizes
``GET  /v1/memory``             regions and pinned ranges
``GET  /v1/counters``           machine, harvests, pager
``GET  /v1/resident``           bitmap: which pages the memfds hold
``GET  /v1/pages/GFN``          one page
``POST /v1/harvest``            bitmap: which pages were young
``POST /v1/evict``              evict a list of pages
``POST /v1/restore``            bring a range back
``POST /v1/drain``              bring everything back and evict no more
``PUT  /v1/limit``              resident limit, held by the fault handler
``PUT  /v1/victims``            what goes first at the limit
``POST /v1/pause|resume|stop``  the vCPUs
=============================== ====================================================

What may block runs in a worker thread: one harvest at a time, one change of the
pager at a time, one change of the run state at a time. ``state``, ``memory`` and
page look-ups never wait for those.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import errno
import os
import time
import typing
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, YoungBitmap, n_words, pack
from kvmhost.control import schema
from kvmhost.control.schema import HEADER_PREFIX, SchemaError
from kvmhost.errors import CapabilityError, IoctlError, KvmHostError, LayoutError, PagerError
from kvmhost.memory.layout import PAGE_BYTES, PAGE_SHIFT

if typing.TYPE_CHECKING:
    from kvmhost.machine import Machine
    from kvmhost.pager import EvictResult

__all__ = ["Problem", "Reply", "Routes", "problem_of"]

JSON, BINARY = "application/json", "application/octet-stream"
#: A bitmap of so many pages (a terabyte of guest) is the largest one answered.
MAX_BITMAP_PAGES = 1 << 28

Query = dict[str, str]
Route = Callable[..., Awaitable["Reply"]]


class Problem(Exception):
    """An answer with an error status.

    :param field: the field of the request that was wrong
    :param allow: methods for the header of status 405
    """

    def __init__(self, status: int, message: str, field: str = "", allow: str = "") -> None:
        super().__init__(status, message)
        self.status, self.message, self.field, self.allow = status, message, field, allow


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer with status 200."""

    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def problem_of(error: Exception) -> Problem:
    """Return the answer that an exception stands for."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, SchemaError):
        return Problem(400, error.problem, error.field)
    if isinstance(error, LayoutError):
        return Problem(400, str(error))
    if isinstance(error, CapabilityError):
        return Problem(501, str(error), error.name)
    if isinstance(error, IoctlError) and error.errno in (errno.ENOSPC, errno.ENOMEM):
        return Problem(507, str(error))
    if isinstance(error, PagerError):
        return Problem(409, str(error))
    if isinstance(error, KvmHostError):
        return Problem(500, str(error))
    return Problem(500, "internal error; see the VM's log")


class Routes:
    """Finds and answers requests on one machine."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine, self._name = machine, name
        self._executor = concurrent.futures.ThreadPoolExecutor(4, "control-worker")
        self._harvesting, self._paging, self._running = (asyncio.Lock() for _ in range(3))
        self._limit_bytes = 0
        self._tracker: str | None = None
        self._totals = schema.HarvestTotals(0, 0, 0, 0, 0)
        self._table: dict[str, dict[str, Route]] = {
            "/v1/state": {"GET": self._get_state},
            "/v1/memory": {"GET": self._get_memory},
            "/v1/counters": {"GET": self._get_counters},
            "/v1/resident": {"GET": self._get_resident},
            "/v1/harvest": {"POST": self._harvest},
            "/v1/evict": {"POST": self._evict},
            "/v1/restore": {"POST": self._restore},
            "/v1/drain": {"POST": self._drain},
            "/v1/limit": {"PUT": self._put_limit},
            "/v1/victims": {"PUT": self._put_victims},
            "/v1/pause": {"POST": self._pause},
            "/v1/resume": {"POST": self._resume},
            "/v1/stop": {"POST": self._stop},
        }

    @property
    def max_body_bytes(self) -> int:
        """The largest body: every gfn of the VM, in JSON, and a little more."""
        return self._machine.memory.n_pages * 16 + (64 << 10)

    def close(self) -> None:
        """Wait for the worker threads to end."""
        self._executor.shutdown(wait=True)

    def find(self, method: str, path: str) -> tuple[Route, tuple[str, ...]]:
        """Return who answers a request, and the arguments from its path.

        :raises Problem: 404 for an unknown path, 405 for the wrong method
        """
        routes, args = self._table.get(path), ()
        if routes is None and path.startswith("/v1/pages/"):
            routes = {"GET": self._get_page}
            return _by_method(routes, method, path), (path.removeprefix("/v1/pages/"),)
        if routes is None:
            raise Problem(404, f"no such path: {path[:200]}")
        return _by_method(routes, method, path), args

    # -- looking --------------------------------------------------------------

    async def _get_state(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _nothing(query, body)
        machine = self._machine
        vcpus = [
            schema.VcpuState(v.index, v.exits, v.doorbells, v.doorbell_value) for v in machine.vcpus
        ]
        return _json(
            schema.VmState(
                name=self._name,
                pid=os.getpid(),
                engine=machine.engine.name,
                image=machine.image.path,
                params=dict(machine.params),
                running=machine.running,
                paused=machine.paused,
                status=machine.status,
                error=None if machine.error is None else str(machine.error),
                uptime_s=machine.uptime_s,
                vcpus=vcpus,
                exits=machine.exits,
                doorbells=machine.doorbells,
                mem_bytes=machine.memory.n_pages * PAGE_BYTES,
                resident_bytes=machine.memory.resident_bytes(),
                limit_bytes=self._limit_bytes,
                tracker=self._tracker,
            )
        )

    async def _get_memory(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _nothing(query, body)
        memory = self._machine.memory
        regions = [
            schema.RegionInfo(slot, r.gpa, r.n_bytes, r.gfn, r.n_pages, r.guest_address)
            for slot, r in enumerate(memory.regions)
        ]
        pinned = [
            schema.PageRange(gpa >> PAGE_SHIFT, -(-n_bytes // PAGE_BYTES))
            for gpa, n_bytes in self._machine.layout.pinned_ranges
        ]
        return _json(schema.MemoryMap(PAGE_BYTES, memory.gfn_end, regions, pinned))

    async def _get_counters(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _nothing(query, body)
        machine = self._machine
        pager = None
        if machine.has_pager:
            pager = await self._work(lambda: machine.pager.counters())
        counts = schema.MachineCounters(
            machine.exits, machine.doorbells, machine.uptime_s, machine.memory.resident_bytes()
        )
        return _json(schema.Counters(counts, self._totals, pager))

    async def _get_resident(self, query: Query, body: bytes, is_json: bool) -> Reply:
        asked = _query(query, schema.RangeQuery)
        _no_body(body)
        gfn_start, n_pages = self._range(asked)
        words = await self._work(lambda: self._resident_words(gfn_start, n_pages))
        return _bitmap(YoungBitmap(gfn_start, n_pages, words))

    async def _get_page(self, query: Query, body: bytes, is_json: bool, text: str) -> Reply:
        _nothing(query, body)
        try:
            gfn = int(text, 0)
        except ValueError:
            raise Problem(400, f"no gfn: {text[:80]!r}", "gfn") from None
        return _json(await self._work(lambda: self._page(gfn)))

    def _page(self, gfn: int) -> schema.Page:
        machine, memory = self._machine, self._machine.memory
        memory.index_of_gfn(gfn)
        slot, region = next(
            (i, r) for i, r in enumerate(memory.regions) if r.gfn <= gfn < r.gfn + r.n_pages
        )
        offset = (gfn - region.gfn) << PAGE_SHIFT
        state, stored = "resident", 0
        if machine.has_pager:
            state = machine.pager.state(gfn).name.lower()
            stored = machine.pager.stored_bytes(gfn)
        return schema.Page(
            gfn=gfn,
            gpa=gfn << PAGE_SHIFT,
            slot=slot,
            slot_offset_bytes=offset,
            hva=region.guest_address + offset,
            pinned=any(
                gpa >> PAGE_SHIFT <= gfn < -(-(gpa + n_bytes) // PAGE_BYTES)
                for gpa, n_bytes in machine.layout.pinned_ranges
            ),
            resident=bool(self._resident_words(gfn, 1)[0]),
            state=state,
            stored_bytes=stored,
        )

    def _resident_words(self, gfn_start: int, n_pages: int) -> Words:
        """Residency by gfn: the memory has it by page number, without the holes."""
        resident = self._machine.memory.resident()
        bits = np.zeros(n_pages, dtype=bool)
        first = 0
        for region in self._machine.memory.regions:
            low = max(gfn_start, region.gfn)
            high = min(gfn_start + n_pages, region.gfn + region.n_pages)
            if low < high:
                shift = first - region.gfn
                bits[low - gfn_start : high - gfn_start] = resident[low + shift : high + shift]
            first += region.n_pages
        return pack(bits)

    # -- harvest --------------------------------------------------------------

    async def _harvest(self, query: Query, body: bytes, is_json: bool) -> Reply:
        asked = _query(query, schema.HarvestQuery)
        gfn_start, n_pages = self._range(asked)
        mask = _mask(body, n_pages) if body else None
        async with self._harvesting:
            bitmap, cost = await self._work(
                lambda: self._run_harvest(asked, gfn_start, n_pages, mask)
            )
        old = self._totals
        self._totals = schema.HarvestTotals(
            old.harvests + 1,
            old.pages + n_pages,
            old.young + bitmap.count(),
            old.harvest_ns + cost.harvest_ns,
            old.rearm_ns + cost.rearm_ns,
        )
        return _bitmap(bitmap, cost)

    def _run_harvest(
        self, asked: schema.HarvestQuery, gfn_start: int, n_pages: int, mask: Words | None
    ) -> tuple[YoungBitmap, schema.HarvestCost]:
        # Changing trackers begins everything anew: "auto" keeps the one in use.
        wanted = self._tracker if asked.tracker == "auto" else asked.tracker
        tracker = self._machine.use_tracker(wanted or "auto")
        self._tracker = tracker.name
        start = time.perf_counter_ns()
        bitmap = tracker.harvest(gfn_start, n_pages, asked.clear, mask)
        middle = time.perf_counter_ns()
        if asked.clear and self._machine.has_pager:
            self._machine.pager.note_young(bitmap)
        if asked.rearm == "all":
            tracker.rearm(gfn_start, n_pages)
        elif asked.rearm == "young" and asked.clear:
            cleared = bitmap
            if mask is not None:
                cleared = dataclasses.replace(bitmap, words=bitmap.words & mask)
            tracker.rearm(gfn_start, n_pages, cleared)
        end = time.perf_counter_ns()
        return bitmap, schema.HarvestCost(middle - start, end - middle)

    # -- pager ----------------------------------------------------------------

    async def _evict(self, query: Query, body: bytes, is_json: bool) -> Reply:
        asked = _query(query, schema.EvictQuery)
        gfns = self._gfns(body, is_json, schema.EvictRequest)
        async with self._paging:
            result = await self._work(lambda: self._run_evict(asked, gfns))
        each = result.outcomes.tobytes() if asked.each else None
        return _json(schema.EvictReport(int(gfns.size), result.by_name(), each))

    def _run_evict(self, asked: schema.EvictQuery, gfns: npt.NDArray[np.int64]) -> EvictResult:
        pager = self._machine.pager
        return pager.page_out(gfns) if asked.actuator == "swap" else pager.evict(gfns)

    async def _restore(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _query(query, schema.NoQuery)
        asked = schema.decode(body, schema.RestoreRequest)
        self._machine.memory.region_at(asked.gfn << PAGE_SHIFT, asked.n_pages << PAGE_SHIFT)
        async with self._paging:
            result = await self._work(lambda: self._machine.pager.restore(asked.gfn, asked.n_pages))
        return _json(schema.RestoreReport(result.restored, result.lost, result.left))

    async def _drain(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _nothing(query, body)
        if not self._machine.has_pager:
            return _json(schema.RestoreReport(0))
        async with self._paging:
            result = await self._work(lambda: self._machine.pager.drain())
            self._limit_bytes = 0
        return _json(schema.RestoreReport(result.restored, result.lost, result.left))

    async def _put_limit(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _query(query, schema.NoQuery)
        asked = schema.decode(body, schema.LimitRequest)
        n_pages = asked.resident_max_bytes // PAGE_BYTES
        if asked.resident_max_bytes and not n_pages:
            raise Problem(400, f"less than a page of {PAGE_BYTES} bytes", "resident_max_bytes")
        async with self._paging:
            await self._work(lambda: self._machine.pager.set_limit(n_pages))
            self._limit_bytes = n_pages * PAGE_BYTES
            shrunk = await self._work(self._machine.pager.shrink) if asked.shrink else 0
        return _json(schema.LimitState(self._limit_bytes, shrunk))

    async def _put_victims(self, query: Query, body: bytes, is_json: bool) -> Reply:
        _query(query, schema.NoQuery)
        gfns = self._gfns(body, is_json, schema.GfnList)
        async with self._paging:
            await self._work(lambda: self._machine.pager.set_victims(gfns))
        return _json(schema.VictimsReport(int(gfns.size)))

    # -- vCPUs ----------------------------------------------------------------

    async def _pause(self, query: Query, body: bytes, is_json: bool) -> Reply:
        return await self._steer(query, body, self._machine.pause)

    async def _resume(self, query: Query, body: bytes, is_json: bool) -> Reply:
        return await self._steer(query, body, self._machine.resume)

    async def _stop(self, query: Query, body: bytes, is_json: bool) -> Reply:
        return await self._steer(query, body, self._machine.stop)

    async def _steer(self, query: Query, body: bytes, action: Callable[[], None]) -> Reply:
        _nothing(query, body)
        async with self._running:
            await self._work(action)
        return _json(schema.RunState(self._machine.running, self._machine.paused))

    # -- helpers --------------------------------------------------------------

    async def _work(self, call: Callable[[], Any]) -> Any:
        # Shielded by the executor itself: a client that hangs up leaves the call to end.
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def _range(self, asked: schema.RangeQuery) -> tuple[int, int]:
        n_pages = asked.n_pages
        if n_pages is None:
            n_pages = max(0, self._machine.memory.gfn_end - asked.gfn_start)
        if n_pages > MAX_BITMAP_PAGES:
            raise Problem(400, f"{n_pages} pages: at most {MAX_BITMAP_PAGES}", "n_pages")
        return asked.gfn_start, n_pages

    def _gfns(
        self, body: bytes, is_json: bool, kind: type[schema.GfnList]
    ) -> npt.NDArray[np.int64]:
        """Read a list of gfns, JSON or binary.

        :raises Problem: naming the first gfn that is in no region
        """
        if is_json:
            gfns = np.array(schema.decode(body, kind).gfns, dtype=np.int64)
        elif len(body) % 8:
            raise Problem(400, f"{len(body)} bytes: no whole number of 64-bit gfns", "body")
        else:
            gfns = np.frombuffer(body, dtype="<u8").astype(np.int64)
        inside = np.zeros(gfns.size, dtype=bool)
        for region in self._machine.memory.regions:
            inside |= (gfns >= region.gfn) & (gfns < region.gfn + region.n_pages)
        if not inside.all():
            at = int(np.flatnonzero(~inside)[0])
            bad = int(gfns[at]) % (1 << 64)
            raise Problem(400, f"gfn {bad:#x} is in no memory region", f"gfns[{at}]")
        return gfns


def _by_method(routes: dict[str, Route], method: str, path: str) -> Route:
    if method not in routes:
        allow = ", ".join(sorted(routes))
        raise Problem(405, f"{path} takes {allow}, not {method[:20]}", allow=allow)
    return routes[method]


def _query(query: Query, kind: type[schema.T]) -> schema.T:
    return schema.decode_query(query, kind)


def _no_body(body: bytes) -> None:
    if body:
        raise Problem(400, "takes no body", "body")


def _nothing(query: Query, body: bytes) -> None:
    _query(query, schema.NoQuery)
    _no_body(body)


def _mask(body: bytes, n_pages: int) -> Words:
    needed = n_words(n_pages) * 8
    if len(body) != needed:
        raise Problem(400, f"mask of {len(body)} bytes: {n_pages} pages need {needed}", "body")
    return np.frombuffer(body, dtype="<u8").astype(np.uint64)


def _json(message: msgspec.Struct) -> Reply:
    return Reply(schema.encode(message))


def _bitmap(bitmap: YoungBitmap, cost: schema.HarvestCost | None = None) -> Reply:
    source = bitmap.provenance
    values: dict[str, Any] = {
        "Gfn-Start": bitmap.gfn_start,
        "Pages": bitmap.n_pages,
        "Tracker": source.tracker,
        "Format": source.table_format,
        "Window-Start-Ns": source.window_start_ns,
        "Window-End-Ns": source.window_end_ns,
        "Coarse": int(bitmap.coarse is not None),
    }
    if cost is not None:
        values |= {"Harvest-Ns": cost.harvest_ns, "Rearm-Ns": cost.rearm_ns}
    body = bitmap.words.astype("<u8", copy=False).tobytes()
    if bitmap.coarse is not None:
        body += bitmap.coarse.astype("<u8", copy=False).tobytes()
    return Reply(body, BINARY, {HEADER_PREFIX + name: str(v) for name, v in values.items()})
