"""Requests and responses of a daemon's socket: one Struct per message, as JSON."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvmhost.reclaim.account.decisions import Decision
from kvmhost.reclaim.account.history import PageStory

__all__ = [
    "CommandRequest",
    "DaemonStatus",
    "DecisionList",
    "DecisionQuery",
    "EnabledQuery",
    "EnabledRequest",
    "HostStatus",
    "LossStatus",
    "LruGenReport",
    "LruGenText",
    "PageAnswer",
    "PageQuery",
    "VmQuery",
    "VmStatus",
]

Gfn = Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of requests."""


class DecisionQuery(_Strict, frozen=True):
    """Query of ``GET /v1/decisions``: the latest ``count``, by VM, by gfn, after a number."""

    count: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 100
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
    full: bool = False
    """with the statistics of ``lru_gen_full``"""


class EnabledQuery(_Strict, frozen=True):
    """Query of ``GET /v1/lru_gen/enabled``."""

    vm: str


class EnabledRequest(_Strict, frozen=True):
    """Body of ``POST /v1/lru_gen/enabled``: a mask in the syntax of the kernel's file."""

    vm: str
    value: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class CommandRequest(_Strict, frozen=True):
    """Body of ``POST /v1/lru_gen``: commands in the syntax of the kernel's file."""

    command: Annotated[str, msgspec.Meta(min_length=1, max_length=65536)]


class LruGenText(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/lru_gen``."""

    text: str
    """generations, as the kernel's file shows them"""


class LruGenReport(msgspec.Struct, frozen=True):
    """Response of ``POST /v1/lru_gen``."""

    evicted_pages: int
    """pages that the commands evicted"""


class DecisionList(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/decisions``."""

    decisions: list[Decision]
    """the decisions, the oldest first"""


class LossStatus(msgspec.Struct, frozen=True):
    """What re-arming costs one VM, and what harvests clear for that reason."""

    max_loss: float | None
    """the bound, as a share of the vCPUs' time; null for none"""
    loss: float | None
    """the same share in the last passes; null if it is not known"""
    fault_ns: float | None
    """measured cost of a touch of a re-armed page; null if it is not known"""
    problem: str
    """why it is not known; else empty"""
    n_steady: int
    """pages that were found young in two windows in a row"""
    cleared_steady: float
    """share of them that a harvest clears, if they are young"""
    cleared_changing: float
    """share of the other young pages that a harvest clears"""
    interval_s: float
    """time between two harvests"""
    stale_s: float
    """how long a page that is no longer touched may look young"""
    other_faults: float
    """faults from one harvest to the next that sweeps of other readers caused"""


class VmStatus(msgspec.Struct, frozen=True):
    """One VM."""

    vm: str
    """its name"""
    policy: str
    """the policy that chooses its pages"""
    passes: int
    """passes over it so far"""
    resident_bytes: int
    """its resident memory after the last pass"""
    budget_bytes: int
    """its budget; 0 for none"""
    evicted_pages: int
    """pages that were evicted so far"""
    refaulted_pages: int
    """evicted pages that came back so far"""
    holding: bool
    """whether the daemon holds back, because evicted pages come back"""
    why: str
    """the reason of the last pass's evictions, by name; empty if it evicted none"""
    loss: LossStatus
    """what re-arming costs it"""


class HostStatus(msgspec.Struct, frozen=True):
    """Pressure on the host."""

    stall_ratio: float | None
    """share of time that some task waited for memory; null if it is not measured"""
    triggers: int
    """how often the kernel's pressure trigger fired"""
    cgroup_bytes: int
    """memory of the cgroup, less what can be freed at once; 0 without a cgroup"""
    cgroup_limit_bytes: int
    """the cgroup's limit; 0 without a cgroup"""
    problem: str
    """why a figure could not be read; else empty"""


class DaemonStatus(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/status``."""

    name: str
    """the daemon"""
    pid: int
    """its process"""
    dry_run: bool
    """whether it only says what it would do"""
    uptime_s: float
    """time since the daemon's start"""
    vms: list[VmStatus]
    """the VMs that it manages"""
    host: HostStatus
    """pressure on the host"""


class PageAnswer(msgspec.Struct, frozen=True):
    """Response of ``GET /v1/page``: what the daemon knows about one page of one VM."""

    vm: str
    """the VM"""
    gfn: int
    """the page"""
    resident: bool
    """whether it was resident after the last pass"""
    movable: bool
    """whether it may be evicted: it is guest memory and not pinned"""
    policy: str
    """the policy that chooses the VM's pages"""
    policy_state: dict[str, int | float | str]
    """what the policy knows of the page, by name"""
    verdict: str
    """what the next pass would do with it, and why"""
    story: PageStory | None
    """its history; null if none is kept"""
    decisions: list[Decision]
    """the last decisions that list it"""
