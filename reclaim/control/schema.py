"""What a daemon's socket answers: one Struct a message, in JSON."""

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
    """Base of what a client sends."""


class DecisionQuery(_Strict, frozen=True):
    """Query of ``GET /v1/decisions``: the last ``n``, of a VM, about a page, since a number."""

    n: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 100
    vm: str | None = None
    gfn: Gfn | None = None
    after: Annotated[int, msgspec.Meta(ge=0)] = 0


class PageQuery(_Strict, frozen=True):
    """Query of ``GET /v1/page``."""

    vm: str
    gfn: Gfn


class VmQuery(_Strict, frozen=True):
    """Query of ``GET /v1/lru_gen``: one VM; without, all of them."""

    vm: str | None = None


class CommandRequest(_Strict, frozen=True):
    """Body of ``POST /v1/lru_gen``: commands as the kernel's file takes them."""

    command: Annotated[str, msgspec.Meta(min_length=1, max_length=65536)]


class CommandAnswer(msgspec.Struct, frozen=True):
    """Answer of ``/v1/lru_gen``."""

    text: str
    pages: int = 0


class DecisionList(msgspec.Struct, frozen=True):
    """Answer of ``GET /v1/decisions``, the oldest first."""

    decisions: list[Decision]


class VmStatus(msgspec.Struct, frozen=True):
    """One VM. ``budget_bytes`` 0: none; ``why``: what the last pass followed."""

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
    """Pressure on the host; None: not measured."""

    stall: float | None
    trigger_fired: int
    cgroup_bytes: int
    cgroup_limit_bytes: int
    problem: str


class DaemonStatus(msgspec.Struct, frozen=True):
    """Answer of ``GET /v1/status``."""

    name: str
    pid: int
    dry_run: bool
    uptime_s: float
    vms: list[VmStatus]
    host: HostStatus


class PageAnswer(msgspec.Struct, frozen=True):
    """Answer of ``GET /v1/page``: what the daemon knows of one page of one VM.

    :param policy: what the policy says of it, by name
    :param verdict: what would become of it now, and why
    :param story: None where no history is kept
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
