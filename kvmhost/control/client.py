"""A client of a VM's control socket.

>>> with Client("a") as vm:  # doctest: +SKIP
...     young = vm.harvest().young
...     vm.evict(cold_gfns)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Provenance, YoungBitmap, n_words
from kvmhost.control import schema
from kvmhost.control.caller import Caller
from kvmhost.control.paths import running_names, runtime_dir, to_socket_path
from kvmhost.control.schema import HEADER_PREFIX
from kvmhost.errors import ControlError, KvmHostError
from kvmhost.units import Share
from kvmhost.vm.checks import check_gfns, check_resident_max, check_view
from kvmhost.vm.harvest import Harvest, Harvestable, HarvestRequest
from kvmhost.vm.names import ACTUATORS, DEFAULT_VIEW, Actuator, check_name

__all__ = ["Client"]

#: Largest number in a header: 64 bits.
_MAX_DIGITS = 20
#: How long closing a client waits for its views to end; the VM ends them itself if it is late.
_ENDING_S = 5.0
_BINARY = {"Content-Type": "application/octet-stream"}
_JSON = {"Content-Type": "application/json"}

Gfns = Iterable[int] | npt.NDArray[Any]


class Client(Caller, Harvestable):
    """A connection to one VM. Methods are thread-safe.

    Every method raises:

    - :class:`~kvmhost.errors.ControlError` if the VM refused: status and its message
    - :class:`~kvmhost.errors.VmGoneError` if the VM does not exist or has ended

    :param vm: the VM's name, or the path of its socket (anything with a slash)
    :param timeout_s: for the VM to answer; a large eviction takes seconds
    :raises LayoutError: for a bad name
    """

    def __init__(self, vm: str | Path, *, timeout_s: float = schema.CLIENT_TIMEOUT_S) -> None:
        super().__init__(str(vm), to_socket_path(vm), timeout_s)
        self.vm = str(vm)
        self._views: set[str] = set()

    def close(self) -> None:
        """End the views that this client has read, and close the connection. Idempotent."""
        while self._views and not self._http.is_closed:
            with contextlib.suppress(KvmHostError):
                self._call("DELETE", f"views/{self._views.pop()}", timeout=_ENDING_S)
        super().close()

    def _others(self) -> list[str]:
        """Return the names of the VMs that run, if this one was given by name."""
        if self.path.parent != runtime_dir():
            return super()._others()
        return [name for name in running_names() if name != self.path.stem]

    def state(self) -> schema.VmState:
        """Return the VM's state."""
        return self._get("state", schema.VmState)

    def memory_map(self) -> schema.MemoryMap:
        """Return memory regions and pinned ranges."""
        found = self._get("memory", schema.MemoryMap)
        if problem := schema.problem_of_map(found):
            raise ControlError(200, f"VM {self.vm!r}: malformed response: {problem}")
        return found

    def counters(self) -> schema.Counters:
        """Return all counters."""
        return self._get("counters", schema.Counters)

    def rearm_cost(self) -> schema.RearmCost:
        """Return what the touch of a re-armed page costs the guest; the VM measures it."""
        return self._get("rearm_cost", schema.RearmCost)

    def page(self, gfn: int) -> schema.Page:
        """Return the state of one page."""
        return self._get(f"pages/{gfn}", schema.Page)

    def resident(self, gfn_start: int = 0, n_pages: int | None = None) -> npt.NDArray[np.bool_]:
        """Return which pages the memfds hold: ``[i]`` is gfn ``gfn_start + i``."""
        check_gfns(gfn_start, n_pages)
        n_pages = self._n_pages(gfn_start, n_pages)
        query, most = _range_query(gfn_start, n_pages), _bitmap_bytes(n_pages)
        answer = self._call("GET", "resident", at_most=most, params=query)
        return _read_bitmap(self.vm, answer, gfn_start, n_pages).as_bool()

    def residency(self, since: int = 0, n_pages: int | None = None) -> schema.Residency:
        """Return where all pages are, and what happened to them from event ``since`` on.

        A reply has a bounded number of events: ask again while there are some ``left``.

        :param n_pages: pages from gfn 0 on that the VM has; None: ask it
        """
        n_pages = self._n_pages(0, n_pages)
        # Base64 of two bitmaps and of gfns, half as many as pages but at least 4,096.
        most = (64 << 10) + n_pages + 16 * max(n_pages // 2, 4096)
        answer = self._call("GET", "residency", at_most=most, params={"since": since})
        found = self._read(answer, schema.Residency)
        if problem := schema.problem_of_residency(found, n_pages):
            raise ControlError(200, f"VM {self.vm!r}: malformed response: {problem}")
        return found

    def _n_pages(self, gfn_start: int, n_pages: int | None) -> int:
        """Return the number of pages requested, which the response must match."""
        return max(0, self.memory_map().gfn_end - gfn_start) if n_pages is None else n_pages

    def run_harvest(self, asked: HarvestRequest) -> Harvest:
        """Do a harvest in the VM, see :meth:`harvest`."""
        if asked.n_pages is None:
            asked = asked.within(self.memory_map().gfn_end)
        gfn_start, n_pages = asked.gfn_start, asked.count
        query = _range_query(gfn_start, n_pages)
        query |= {"tracker": asked.tracker, "clear": str(int(asked.clear)), "rearm": asked.rearm}
        if asked.fraction is not None:
            query["fraction"] = str(Share(asked.fraction))
        if asked.table_format is not None:
            query["table_format"] = asked.table_format
        if asked.view != DEFAULT_VIEW:
            query["view"] = asked.view
            self._views.add(asked.view)
        if asked.max_age_s:
            query["max_age_s"] = repr(float(asked.max_age_s))
        if asked.force:
            query["force"] = "1"
        body = b"" if asked.mask is None else asked.mask.astype("<u8", copy=False).tobytes()
        most = _bitmap_bytes(n_pages)
        answer = self._call(
            "POST", "harvest", at_most=most, params=query, content=body, headers=_BINARY
        )
        return Harvest(
            _read_bitmap(self.vm, answer, gfn_start, n_pages),
            _header_number(self.vm, answer, "Harvest-Ns"),
            _header_number(self.vm, answer, "Rearm-Ns"),
        )

    def close_view(self, name: str) -> bool:
        """End a view of this process; return whether it was open.

        A tracker that it forced on others is put back.
        """
        check_view(name)
        self._views.discard(name)
        try:
            self._call("DELETE", f"views/{name}")
        except ControlError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return True

    def evict(
        self, gfns: Gfns, each: bool = False, *, actuator: Actuator = "store"
    ) -> schema.EvictReport:
        """Evict pages in the given order; partial success is normal.

        :param each: also return every page's outcome
        :param actuator: ``store``, the pager's own, or ``swap``, the host's
        """
        check_name("actuator", actuator, ACTUATORS, "actuator")
        body = _gfn_bytes(gfns)
        answer = self._call(
            "POST",
            "evict",
            at_most=(64 << 10) + len(body),
            params={"each": str(int(each)), "actuator": actuator},
            content=body,
            headers=_BINARY,
        )
        return self._read(answer, schema.EvictReport)

    def restore(self, gfn_start: int, n_pages: int = 1) -> schema.RestoreReport:
        """Restore the evicted pages of a range; a failure does not stop the others."""
        check_gfns(gfn_start, n_pages, least=1)
        body = schema.encode(schema.RestoreRequest(gfn_start, n_pages))
        answer = self._call("POST", "restore", content=body, headers=_JSON)
        return self._read(answer, schema.RestoreReport)

    def drain(self, force: bool = False) -> schema.RestoreReport:
        """Restore all pages, remove the limit and the victim list; the VM keeps running.

        :param force: also while another holds the lease; the holder may evict again
        :raises ControlError: 423 if another holds it and ``force`` is False
        """
        params = {"force": "true"} if force else {}
        return self._read(self._call("POST", "drain", params=params), schema.RestoreReport)

    def set_limit(self, resident_max_bytes: int) -> int:
        """Limit the resident bytes, 0 for no limit; return what is in force now."""
        check_resident_max(resident_max_bytes)
        body = schema.encode(schema.LimitRequest(resident_max_bytes))
        answer = self._call("PUT", "limit", content=body, headers=_JSON)
        return self._read(answer, schema.LimitState).resident_max_bytes

    def shrink(self, resident_max_bytes: int) -> schema.LimitState:
        """Set the limit and evict down to it at once; return the resulting state."""
        check_resident_max(resident_max_bytes)
        body = schema.encode(schema.LimitRequest(resident_max_bytes, shrink=True))
        answer = self._call("PUT", "limit", content=body, headers=_JSON)
        return self._read(answer, schema.LimitState)

    def set_victims(self, gfns: Gfns) -> int:
        """Set the pages to evict first at the limit, best candidates first."""
        answer = self._call("PUT", "victims", content=_gfn_bytes(gfns), headers=_BINARY)
        return self._read(answer, schema.VictimsReport).n_pages

    def pause(self, for_s: float = 60.0) -> schema.RunState:
        """Hold the vCPUs; pauses nest.

        :param for_s: seconds after which the VM resumes automatically; 0: never
        """
        return self._read(self._call("POST", "pause", params={"for_s": for_s}), schema.RunState)

    def resume(self, pause: int | None = None) -> schema.RunState:
        """Undo one :meth:`pause`: the one with the number that it returned, or the last one."""
        query = {} if pause is None else {"pause": pause}
        return self._read(self._call("POST", "resume", params=query), schema.RunState)

    def stop(self) -> schema.RunState:
        """End the guest."""
        return self._read(self._call("POST", "stop"), schema.RunState)

    def take_lease(self, asked: schema.LeaseRequest) -> None:
        """Take the VM's lease; every later request renews it.

        :raises ControlError: with status 423 if another process holds the lease; every
            request raises it once the lease is lost
        """
        answer = self._call("PUT", "lease", content=schema.encode(asked), headers=_JSON)
        self._http.headers[HEADER_PREFIX + "Lease"] = self._read(answer, schema.LeaseGrant).token

    def give_back_lease(self) -> None:
        """Release the lease."""
        self._call("DELETE", "lease")
        del self._http.headers[HEADER_PREFIX + "Lease"]

    def lease(self) -> schema.LeaseInfo | None:
        """Return the holder of the lease; None: it is free."""
        return self._get("lease", schema.LeaseState).lease

    def snapshot(self, path: str | Path, stop: bool = False) -> int:
        """Write a snapshot of the VM to a file; the VM keeps running.

        Waits without a time-out. If the client disconnects meanwhile, no file is written.

        :param path: in the VM's file system; a relative one is that of this process
        :param stop: end the guest instead, where the snapshot was taken
        :return: bytes of memory in the file
        """
        body = schema.encode(schema.SnapshotRequest(str(Path(path).absolute()), stop))
        answer = self._call(
            "POST", "snapshot", content=body, headers=_JSON, timeout=httpx.Timeout(None, connect=5)
        )
        return self._read(answer, schema.SnapshotReport).memory_bytes


def _range_query(gfn_start: int, n_pages: int) -> dict[str, str]:
    return {"gfn_start": str(gfn_start), "n_pages": str(n_pages)}


def _bitmap_bytes(n_pages: int) -> int:
    """Return the size of a young bitmap and a coarse one; an error may come instead."""
    return max(2 * 8 * n_words(n_pages), 64 << 10)


def _gfn_bytes(gfns: Gfns) -> bytes:
    values = gfns if isinstance(gfns, np.ndarray) else np.array(list(gfns), dtype=np.int64)
    return values.astype("<i8").tobytes()


def _header_number(vm: str, answer: httpx.Response, name: str) -> int:
    text = answer.headers.get(HEADER_PREFIX + name, "")
    if not text.isdigit() or len(text) > _MAX_DIGITS:
        raise ControlError(answer.status_code, f"VM {vm!r}: malformed response: {name} is {text!r}")
    return int(text)


def _read_bitmap(vm: str, answer: httpx.Response, gfn_start: int, n_pages: int) -> YoungBitmap:
    for name, wanted in (("Gfn-Start", gfn_start), ("N-Pages", n_pages)):
        if (found := _header_number(vm, answer, name)) != wanted:
            raise ControlError(
                answer.status_code,
                f"VM {vm!r}: malformed response: {name} is {found}, not {wanted}",
            )
    coarse = bool(_header_number(vm, answer, "Coarse"))
    size = n_words(n_pages)
    if len(answer.content) != size * 8 * (1 + coarse):
        raise ControlError(
            answer.status_code,
            f"VM {vm!r}: malformed response: {len(answer.content)} bytes for {n_pages} pages",
        )
    words = np.frombuffer(answer.content, dtype="<u8").astype(np.uint64)
    source = Provenance(
        answer.headers.get(HEADER_PREFIX + "Tracker", "unknown"),
        answer.headers.get(HEADER_PREFIX + "Table-Format", "none"),
        _header_number(vm, answer, "Window-Start-Ns"),
        _header_number(vm, answer, "Window-End-Ns"),
        answer.headers.get(HEADER_PREFIX + "Evidence", ""),
    )
    return YoungBitmap(gfn_start, n_pages, words[:size], words[size:] if coarse else None, source)
