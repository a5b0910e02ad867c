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
from kvmhost.errors import LayoutError
from kvmhost.suggest import unknown_name
from kvmhost.timescale import scaled
from kvmhost.units import PAGE_BYTES, Share, read_amount
from kvmhost.vm.answers import (
    Answer,
    Counters,
    EvictReport,
    HarvestTotals,
    LeaseInfo,
    LimitState,
    MachineCounters,
    MemoryMap,
    MemslotInfo,
    Page,
    PageRange,
    RearmCost,
    RestoreReport,
    RunState,
    VcpuStatus,
    ViewInfo,
    VmState,
)
from kvmhost.vm.harvest import MIN_FRACTION
from kvmhost.vm.names import DEFAULT_VIEW, Rearm, TableFormat

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
    "MemslotInfo",
    "Page",
    "PageRange",
    "PauseQuery",
    "RangeQuery",
    "RearmCost",
    "Residency",
    "RestoreReport",
    "RestoreRequest",
    "ResumeQuery",
    "RunState",
    "SchemaError",
    "VcpuStatus",
    "VictimsReport",
    "ViewInfo",
    "ViewReport",
    "VmState",
    "convert",
    "decode",
    "decode_query",
    "encode",
    "problem_of_map",
    "problem_of_residency",
]

#: Bitmaps carry their description in headers of this prefix.
HEADER_PREFIX = "X-Kvmhost-"

Gfn = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]
ViewName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Fraction(Share):
    """A share of the pages to re-arm: ``1/8``, ``12.5%`` or ``0.125``, at least 1/65536."""

    @classmethod
    def parse(cls, given: object) -> Fraction:
        """Read it.

        :raises ValueError: for anything else
        """
        value = super().parse(given)
        if not MIN_FRACTION <= value <= 1:
            raise ValueError(f"{given!r}: need a share from 1/65536 to 1")
        return cls(value)


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the messages that a client sends."""


class SchemaError(LayoutError):
    """A message does not match its schema.

    :param field: the field, such as ``gfns[3]``; empty for the whole message
    """

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(problem, field=field)

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
    at each harvest of the range; the default of ``fraction`` is measured. With
    ``table_format`` the harvest is fed into a model table, and its walker's bitmap is returned.
    ``view`` is the reader's own window, which may end with a sweep that is ``max_age_s``
    old; ``force`` changes the tracker while others read by another one.
    """

    tracker: str = "auto"
    clear: bool = True
    rearm: Rearm = "young"
    fraction: Fraction | None = None
    table_format: TableFormat | Literal[""] = ""
    view: ViewName = DEFAULT_VIEW
    max_age_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0
    force: bool = False


class ResidencyQuery(_Strict, frozen=True):
    """Query of ``GET /v1/residency``: events are those from number ``since`` on."""

    since: Count = 0


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

    gfn_start: Gfn
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


class ErrorInfo(Answer, frozen=True):
    """Why a request failed."""

    status: int
    """the HTTP status"""
    message: str
    """what is wrong, and what to do about it"""
    field: str = ""
    """the parameter, key or header that is wrong; empty if it is none of them"""
    kind: str = ""
    """the class of kvmhost.errors that the machine raised; empty if the socket refused"""
    arguments: list[Any] = msgspec.field(default_factory=list)
    """the arguments of that class"""


class ErrorReply(Answer, frozen=True):
    """Body of every answer with a status of 400 or more."""

    error: ErrorInfo
    """why it failed"""


class LeaseState(Answer, frozen=True):
    """Answer of ``GET`` and ``DELETE /v1/lease``."""

    lease: LeaseInfo | None
    """its holder; null if the lease is free"""


class LeaseGrant(Answer, frozen=True):
    """Answer of ``PUT /v1/lease``."""

    token: str
    """the value for the header ``X-Kvmhost-Lease``"""


class ViewReport(Answer, frozen=True):
    """Answer of ``DELETE /v1/views/NAME``."""

    view: str
    """the view that ended"""


#: Maximum number of gfns that a client accepts: a terabyte, and 4 GiB of holes.
MAX_GFNS = (1 << 28) + (1 << 20)


def problem_of_map(found: MemoryMap) -> str:
    """Return the defect of a memory map, to check it before anything is allocated for it.

    Its memslots must be in order, and of at most :data:`MAX_GFNS`; the rest follows from them.
    """
    end = 0
    for memslot in found.memslots:
        first, past = memslot.gfn_start, memslot.gfn_start + memslot.n_pages
        if first < end or memslot.n_pages <= 0 or past > MAX_GFNS:
            return f"pages [{first}, {past}) in slot {memslot.slot}"
        end = past
    if found.page_bytes != PAGE_BYTES or found.gfn_end != end:
        return f"gfn_end {found.gfn_end}, but the last memslot ends at {end}"
    if any(r.gfn_start < 0 or r.n_pages < 0 or r.gfn_start + r.n_pages > end for r in found.pinned):
        return "a pinned range beyond memory"
    return ""


def problem_of_residency(found: Residency, n_pages: int) -> str:
    """Return the defect of the reply of a VM of ``n_pages``, so that its bytes can be used."""
    if any(len(bits) != 8 * -(-n_pages // 64) for bits in (found.resident, found.evicted)):
        return f"bitmaps that are not of {n_pages} pages"
    if any(len(gfns) % 8 for gfns in found.gfns.values()):
        return "gfns that are no 64-bit numbers"
    if min([found.next, found.lost, found.left, *found.counts.values()]) < 0:
        return "negative counts"
    return ""


class Residency(Answer, frozen=True):
    """Answer of ``GET /v1/residency``: where pages are, and what happened to them.

    ``resident`` and ``evicted`` are bitmaps of all pages from gfn 0 on, base64 in JSON; a page
    in neither was never touched, or is in no memory region. ``counts`` has the number of events
    by name, and ``gfns`` the pages of each as ascending little-endian 64-bit numbers, each page
    once. ``next`` is the ``since`` of the next request, ``left`` the number of events that it would
    find now, and ``lost`` the number of events that were overwritten before this one.
    """

    resident: bytes
    evicted: bytes
    counts: dict[str, int]
    gfns: dict[str, bytes]
    next: int
    lost: int
    left: int = 0


class VictimsReport(Answer, frozen=True):
    """Answer of ``PUT /v1/victims``."""

    n_pages: int
    """pages of the request"""


class SnapshotReport(Answer, frozen=True):
    """Answer of ``POST /v1/snapshot``."""

    memory_bytes: int
    """guest memory in the file"""


# -- coding -------------------------------------------------------------------

#: How long a client waits for the response to one request.
CLIENT_TIMEOUT_S = scaled(60.0)

T = TypeVar("T")

_AT_FIELD = re.compile(r" - at `\$\.?(?P<field>.*)`$")
_NAMED = re.compile(r"(?:unknown field|missing required field) `(?P<field>.*?)`")


def encode(message: msgspec.Struct) -> bytes:
    """Return a message as JSON; amounts of :mod:`kvmhost.units` are numbers there.

    :raises TypeError: for a value that JSON does not have
    """
    return msgspec.json.encode(message, enc_hook=_number)


def _number(value: object) -> int | float:
    """Return an amount as the number that it is: msgspec takes no subclasses of numbers."""
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"{type(value).__name__} is not a value of JSON")


def decode(body: bytes, kind: type[T]) -> T:
    """Read a message from JSON.

    :raises SchemaError: if it is not JSON or not of that kind; names the field
    """
    try:
        return decode_json(body, kind)
    except msgspec.DecodeError as error:
        raise _schema_error(error, kind) from None


def decode_query(query: dict[str, str], kind: type[T]) -> T:
    """Read a URL's query; numbers may be hex with ``0x``, shares are those of every command.

    :raises SchemaError: if a value or a name is wrong; names the field
    """
    plain = {name: _plain_number(value) for name, value in query.items()}
    try:
        return msgspec.convert(plain, kind, strict=False, dec_hook=read_amount)
    except msgspec.ValidationError as error:
        raise _schema_error(error, kind) from None


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


def _schema_error(error: Exception, kind: type | None = None) -> SchemaError:
    """Return the error of msgspec with the field; of an unknown one with the known names."""
    text = str(error)
    at = _AT_FIELD.search(text)
    named = _NAMED.search(text)
    parts = [m["field"] for m in (at, named) if m and m["field"]]
    fields = getattr(kind, "__struct_fields__", None)
    if named and not at and fields is not None and "unknown" in named[0]:
        problem = unknown_name("name", named["field"], fields)
        return SchemaError(problem, named["field"])
    return SchemaError(_AT_FIELD.sub("", text), ".".join(parts))
