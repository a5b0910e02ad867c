"""The messages of the control socket: one Struct per message, in JSON.

Binary parts are little-endian: bitmaps as 64-bit words in the layout of
:mod:`kvmhost.bitmap`, lists of gfns as 64-bit numbers. A request with a field that
is not listed here is refused, and so is a number out of range.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from kvmhost.decoding import decode_json
from kvmhost.units import PAGE_BYTES, Share, read_amount

__all__ = [
    "CLIENT_TIMEOUT_S",
    "HEADER_PREFIX",
    "MAX_GFNS",
    "Counters",
    "ErrorInfo",
    "ErrorReply",
    "EvictReport",
    "EvictRequest",
    "GfnList",
    "HarvestCost",
    "HarvestQuery",
    "HarvestTotals",
    "LeaseGrant",
    "LeaseInfo",
    "LeaseRequest",
    "LeaseState",
    "LimitRequest",
    "LimitState",
    "MachineCounters",
    "MemoryMap",
    "Page",
    "PageRange",
    "PauseQuery",
    "RangeQuery",
    "RegionInfo",
    "RestoreReport",
    "RestoreRequest",
    "ResumeQuery",
    "RunState",
    "SchemaError",
    "VcpuStatus",
    "VictimsReport",
    "VmState",
    "convert",
    "decode",
    "decode_query",
    "encode",
    "problem_of_map",
]

#: Bitmaps carry their description in headers of this prefix.
HEADER_PREFIX = "X-Kvmhost-"

Gfn = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Fraction(Share):
    """A share of the pages to re-arm: ``1/8``, ``12.5%`` or ``0.125``, at least 1/65536."""

    @classmethod
    def parse(cls, given: object) -> Fraction:
        """Read it.

        :raises ValueError: for anything else
        """
        value = super().parse(given)
        if not 1 / 65536 <= value <= 1:
            raise ValueError(f"{given!r}: need a share from 1/65536 to 1")
        return cls(value)


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the messages that a client sends."""


class _Answer(msgspec.Struct, frozen=True):
    """Base of the messages that a server sends; clients ignore fields of newer servers."""


class SchemaError(ValueError):
    """A message does not match its schema.

    :param field: the field, such as ``gfns[3]``; empty for the whole message
    """

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(problem, field)
        self.problem, self.field = problem, field

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


# -- requests -----------------------------------------------------------------


class RangeQuery(_Strict, frozen=True):
    """Query of requests on a range; without ``n_pages`` to the end of memory."""

    gfn_start: Gfn = 0
    n_pages: Count | None = None


class HarvestQuery(RangeQuery, frozen=True):
    """Query of ``POST /v1/harvest``; the body may hold a mask, one bit per page.

    ``rearm=sample`` clears and re-arms only a ``fraction`` of the pages, different ones
    at each harvest of the range; the default of ``fraction`` is measured. With ``format``
    the harvest is fed into a model table, and its walker's bitmap is returned.
    """

    tracker: str = "auto"
    clear: bool = True
    rearm: Literal["none", "young", "all", "sample"] = "young"
    fraction: Fraction | None = None
    format: Literal["", "tdp", "npt", "ept", "stage2", "radix"] = ""


class EvictQuery(_Strict, frozen=True):
    """Query of ``POST /v1/evict``: ``each`` returns every page's outcome.

    ``actuator`` is the pager's own store or the host's swap.
    """

    each: bool = False
    actuator: Literal["store", "swap"] = "store"


class GfnList(_Strict, frozen=True):
    """Body of ``PUT /v1/victims``; may also be binary."""

    gfns: list[Gfn]


class EvictRequest(GfnList, frozen=True):
    """Body of ``POST /v1/evict``; may also be binary."""


class RestoreRequest(_Strict, frozen=True):
    """Body of ``POST /v1/restore``."""

    gfn: Gfn
    n_pages: Annotated[int, msgspec.Meta(ge=1, lt=1 << 52)] = 1


class LimitRequest(_Strict, frozen=True):
    """Body of ``PUT /v1/limit``: bytes that may be resident, 0 for no limit.

    ``shrink`` evicts down to it at once; else the limit acts at the next faults.
    """

    resident_max_bytes: Bytes
    shrink: bool = False


class SnapshotRequest(_Strict, frozen=True):
    """Body of ``POST /v1/snapshot``: where the VM writes the file, an absolute path.

    With ``stop`` the guest ends where the snapshot was taken; else it resumes.
    """

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"^[^\0]*$")]
    stop: bool = False


class PauseQuery(_Strict, frozen=True):
    """Query of ``POST /v1/pause``: seconds until it ends automatically; 0: never."""

    for_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 60.0


class ResumeQuery(_Strict, frozen=True):
    """Query of ``POST /v1/resume``: the pause to undo, by default the last one."""

    pause: Annotated[int, msgspec.Meta(ge=1, lt=1 << 52)] | None = None


class LeaseRequest(_Strict, frozen=True):
    """Body of ``PUT /v1/lease``.

    :param holder: description of the caller, for messages
    :param ttl_s: time without a request after which the lease ends
    :param socket: the holder's own control socket; empty: none
    :param take_over: take it over from the current holder
    """

    holder: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    ttl_s: Annotated[float, msgspec.Meta(ge=0.05, le=86400)] = 10.0
    socket: Annotated[str, msgspec.Meta(max_length=256)] = ""
    take_over: bool = False


class NoQuery(_Strict, frozen=True):
    """An empty query."""


class DrainQuery(_Strict, frozen=True):
    """Query of ``POST /v1/drain``.

    :ivar force: also while a daemon holds the lease; the daemon may evict again
    """

    force: bool = False


# -- answers ------------------------------------------------------------------


class ErrorInfo(_Answer, frozen=True, omit_defaults=True):
    """Why a request failed.

    ``kind`` is the class of the error that the VM raised, one of
    :data:`kvmhost.errors.BY_KIND`, and ``arguments`` are its constructor arguments; both
    are empty for errors of the control socket itself.
    """

    status: int
    message: str
    field: str = ""
    kind: str = ""
    arguments: list[Any] = []


class ErrorReply(_Answer, frozen=True):
    """Body of every answer with a status of 400 or more."""

    error: ErrorInfo


class VcpuStatus(_Answer, frozen=True):
    """One vCPU. ``epoch`` is the value of its last doorbell.

    ``doing`` is its activity and registers while the VM is paused, else null.
    """

    index: int
    exits: int
    doorbells: int
    epoch: int
    doing: str | None = None


class LeaseInfo(_Answer, frozen=True):
    """The holder of a VM's lease.

    :param held_s: seconds since it took the lease
    :param silent_s: seconds since its last request
    """

    holder: str
    pid: int
    socket: str
    ttl_s: float
    held_s: float
    silent_s: float


class LeaseState(_Answer, frozen=True):
    """Answer of ``GET /v1/lease``; None: the lease is free."""

    lease: LeaseInfo | None


class LeaseGrant(_Answer, frozen=True):
    """Answer of ``PUT /v1/lease``: the value for the header ``X-Kvmhost-Lease``."""

    token: str


class VmState(_Answer, frozen=True):
    """Answer of ``GET /v1/state``.

    ``status`` is None while the guest has not exited; ``limit_bytes`` 0 is no limit.
    """

    name: str
    pid: int
    engine: str
    image: str
    params: dict[str, int]
    running: bool
    paused: bool
    status: int | None
    error: str | None
    uptime_s: float
    vcpus: list[VcpuStatus]
    exits: int
    doorbells: int
    mem_bytes: int
    resident_bytes: int
    limit_bytes: int
    tracker: str | None
    lease: LeaseInfo | None = None


class PageRange(_Answer, frozen=True):
    """Pages ``[gfn, gfn + n_pages)``."""

    gfn: int
    n_pages: int


class RegionInfo(_Answer, frozen=True):
    """One memslot; ``hva`` is its address in the guest mapping."""

    slot: int
    gpa: int
    n_bytes: int
    gfn: int
    n_pages: int
    hva: int


class MemoryMap(_Answer, frozen=True):
    """Answer of ``GET /v1/memory``; ``gfn_end`` is the first gfn above all regions."""

    page_bytes: int
    gfn_end: int
    regions: list[RegionInfo]
    pinned: list[PageRange]


#: Maximum number of gfns that a client accepts: a terabyte, and 4 GiB of holes.
MAX_GFNS = (1 << 28) + (1 << 20)


def problem_of_map(found: MemoryMap) -> str:
    """Return the defect of a memory map, to check it before anything is allocated for it.

    Its regions must be in order, and of at most :data:`MAX_GFNS`; the rest follows from them.
    """
    end = 0
    for region in found.regions:
        if region.gfn < end or region.n_pages <= 0 or region.gfn + region.n_pages > MAX_GFNS:
            return f"pages [{region.gfn}, {region.gfn + region.n_pages}) in slot {region.slot}"
        end = region.gfn + region.n_pages
    if found.page_bytes != PAGE_BYTES or found.gfn_end != end:
        return f"gfn_end {found.gfn_end}, but the last region ends at {end}"
    if any(r.gfn < 0 or r.n_pages < 0 or r.gfn + r.n_pages > end for r in found.pinned):
        return "a pinned range beyond memory"
    return ""


class Page(_Answer, frozen=True):
    """Answer of ``GET /v1/pages/GFN``.

    ``state`` is ``resident``, ``evicted``, ``lost`` or ``fresh`` (never touched);
    ``resident`` is whether the memfd holds the page now.
    """

    gfn: int
    gpa: int
    slot: int
    slot_offset_bytes: int
    hva: int
    pinned: bool
    resident: bool
    state: str
    stored_bytes: int


class EvictReport(_Answer, frozen=True):
    """Answer of ``POST /v1/evict``: pages by outcome (``done``, ``pinned``, ``absent``, …).

    ``each`` has one byte per page of the request, its ``EvictOutcome``; base64 in JSON.
    """

    pages: int
    outcomes: dict[str, int]
    each: bytes | None = None

    @property
    def done(self) -> int:
        """Pages that were evicted."""
        return self.outcomes.get("done", 0)


class RestoreReport(_Answer, frozen=True):
    """Answer of ``POST /v1/restore`` and ``POST /v1/drain``: evicted pages of the range."""

    restored_pages: int
    """pages that are resident again"""
    lost_pages: int = 0
    """pages that the store could not give back; they are still evicted"""
    left_pages: int = 0
    """pages that are still evicted because the host had no memory for them"""


class LimitState(_Answer, frozen=True):
    """Answer of ``PUT /v1/limit``."""

    resident_max_bytes: int
    """the limit in force, rounded down to pages; 0 is no limit"""
    evicted_pages: int
    """pages that were evicted to reach the limit"""
    over_pages: int = 0
    """resident pages above the limit, because no further page can be evicted"""


class VictimsReport(_Answer, frozen=True):
    """Answer of ``PUT /v1/victims``."""

    pages: int


class RunState(_Answer, frozen=True):
    """Answer of ``POST /v1/pause``, ``resume`` and ``stop``; a pause has a number."""

    running: bool
    paused: bool
    pause: int | None = None


class SnapshotReport(_Answer, frozen=True):
    """Answer of ``POST /v1/snapshot``: bytes of memory in the file."""

    memory_bytes: int


class MachineCounters(_Answer, frozen=True):
    """Counts since the start of the VM.

    ``serial_lost_bytes`` are those of ``serial_bytes`` that were dropped because no reader
    read them in time.
    """

    exits: int
    doorbells: int
    uptime_s: float
    resident_bytes: int
    serial_bytes: int = 0
    serial_lost_bytes: int = 0


class HarvestTotals(_Answer, frozen=True):
    """Number and total cost of harvests over the control socket."""

    harvests: int
    pages: int
    young: int
    harvest_ns: int
    rearm_ns: int


class Counters(_Answer, frozen=True):
    """Answer of ``GET /v1/counters``; ``pager`` is None until something used the pager.

    The pager's counters are described in ``kvmhost/_core/pager.h``.
    """

    machine: MachineCounters
    harvest: HarvestTotals
    pager: dict[str, Any] | None


class HarvestCost(msgspec.Struct, frozen=True):
    """Cost of one harvest inside the VM process."""

    harvest_ns: int
    rearm_ns: int


# -- coding -------------------------------------------------------------------

#: How long a client waits for the response to one request.
CLIENT_TIMEOUT_S = 60.0

T = TypeVar("T")

_AT_FIELD = re.compile(r" - at `\$\.?(?P<field>.*)`$")
_NAMED = re.compile(r"(?:unknown field|missing required field) `(?P<field>.*?)`")


def encode(message: msgspec.Struct) -> bytes:
    """Return a message as JSON."""
    return msgspec.json.encode(message)


def decode(body: bytes, kind: type[T]) -> T:
    """Read a message from JSON.

    :raises SchemaError: if it is not JSON or not of that kind; names the field
    """
    try:
        return decode_json(body, kind)
    except msgspec.DecodeError as error:
        raise _schema_error(error) from None


def decode_query(query: dict[str, str], kind: type[T]) -> T:
    """Read a URL's query; numbers may be hex with ``0x``, shares are those of every command.

    :raises SchemaError: if a value or a name is wrong; names the field
    """
    plain = {name: _plain_number(value) for name, value in query.items()}
    try:
        return msgspec.convert(plain, kind, strict=False, dec_hook=read_amount)
    except msgspec.ValidationError as error:
        raise _schema_error(error) from None


def convert(plain: Any, kind: type[T], dec_hook: Callable[[type, Any], Any] | None = None) -> T:
    """Read a message from plain objects, as a file's parser returns them.

    :param dec_hook: reads custom types; raises ValueError
    :raises SchemaError: if they are not of that kind; names the field
    """
    try:
        return msgspec.convert(plain, kind, dec_hook=dec_hook)
    except msgspec.ValidationError as error:
        raise _schema_error(error) from None


def _plain_number(text: str) -> str:
    if text[:2].lower() == "0x":
        try:
            return str(int(text, 16))
        except ValueError:
            return text
    return text


def _schema_error(error: Exception) -> SchemaError:
    text = str(error)
    at = _AT_FIELD.search(text)
    named = _NAMED.search(text)
    parts = [m["field"] for m in (at, named) if m and m["field"]]
    return SchemaError(_AT_FIELD.sub("", text), ".".join(parts))
