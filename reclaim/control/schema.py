"""Requests and responses of a daemon's socket: one Struct per message, as JSON."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvmhost.reclaim.account.decisions import Decision
from kvmhost.reclaim.account.history import PageStory

__all__ = [
    "CommandAnswer",
    "CommandRequest",
    "DaemonStatus",
    "DecisionList",
    "DecisionQuery",
    "HostStatus",
    "PageAnswer",
    "PageQuery",
    "VmQuery",
    "VmStatus",
]

Gfn = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of requests."""


class DecisionQuery(_Strict, frozen=True):
    """Query of ``GET /v1/decisions``: the latest ``n``, by VM, by gfn, after a number."""

    n: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 100
    vm: str | None = None
    gfn: Gfn | None = None
    after: Annotated[int, msgspec.Meta(ge=0)] = 0


class PageQuery(_Strict, frozen=True):
    """Query of ``GET /v1/page``."""

    vm: str
    gfn: Gfn


class VmQuery(_Strict, frozen=True):
    """Query of ``GET /v1/lru_gen``: one VM, or all if none is given."""

    vm: str | None = None


class CommandRequest(_Strict, frozen=True):
    """Body of ``POST /v1/lru_gen``: commands in the syntax of the kernel's file."""

    command: Annotated[str, msgspec.Meta(min_length=1, max_length=65536)]


class CommandAnswer(msgspec.Struct, frozen=True):
    """Response of ``/v1/lru_gen``."""

    text: str
    pages: int = 0


class DecisionList(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/decisions``, the oldest first."""

    decisions: list[Decision]


class VmStatus(msgspec.Struct, frozen=True):
    """One VM. ``budget_bytes`` is 0 without a budget; ``why`` is the reason of the last pass."""

    vm: str
    policy: str
    passes: int
    resident_bytes: int
    budget_bytes: int
    evicted_pages: int
    refaulted_pages: int
    holding: bool
    why: str


class HostStatus(msgspec.Struct, frozen=True):
    """Pressure on the host; ``stall`` is None if it is not measured."""

    stall: float | None
    trigger_fired: int
    cgroup_bytes: int
    cgroup_limit_bytes: int
    problem: str


class DaemonStatus(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/status``."""

    name: str
    pid: int
    dry_run: bool
    uptime_s: float
    vms: list[VmStatus]
    host: HostStatus


class PageAnswer(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/page``: what the daemon knows about one page of one VM.

    :param policy: state of the page in the policy, by name
    :param verdict: what the next pass would do with the page, and why
    :param story: None if no page history is kept
    """

    vm: str
    gfn: int
    resident: bool
    movable: bool
    policy_name: str
    policy: dict[str, int | float | str]
    verdict: str
    story: PageStory | None
    decisions: list[Decision]
