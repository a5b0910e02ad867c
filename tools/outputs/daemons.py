"""Outputs of a daemon, and of the commands that tell what it knows: pages and generations."""

from __future__ import annotations

from typing import Literal

from kvmhost.control.schema import Page
from kvmhost.reclaim.control.schema import PageAnswer
from kvmhost.tools.outputs.base import Output

__all__ = [
    "EnabledOutput",
    "EventKind",
    "EventOutput",
    "EvictedOutput",
    "GenerationsOutput",
    "PageOutput",
    "PassRow",
]


class PageOutput(Output, frozen=True, kw_only=True):
    """What is known of one page."""

    vm: str
    """the VM"""
    page: Page
    """what the VM knows"""
    daemon: PageAnswer | None
    """what the daemon of the VM knows; null if none answered"""
    problem: str
    """why no daemon answered; else empty"""


class GenerationRow(Output, frozen=True, kw_only=True):
    """One generation."""

    seq: int
    """its sequence number; the largest is the youngest"""
    age_ms: int
    """time since it began"""
    anon_pages: int
    """pages that the next pass may evict"""
    file_pages: int
    """always 0: guest memory is what the kernel calls anonymous"""


class VmGenerations(Output, frozen=True, kw_only=True):
    """The generations of one VM."""

    number: int
    """its number among the VMs of the daemon, which commands may use"""
    vm: str
    """its name"""
    generations: list[GenerationRow]
    """the generations, the oldest first"""


class GenerationsOutput(Output, frozen=True, kw_only=True):
    """The generations of all VMs with the policy lru_gen, or of one."""

    vms: list[VmGenerations]
    """the VMs"""


class EnabledOutput(Output, frozen=True, kw_only=True):
    """The capabilities of a VM's policy lru_gen."""

    caps: int
    """the mask: 1 core, 2 mm walk, 8 spte walk"""


class EvictedOutput(Output, frozen=True, kw_only=True):
    """Commands were run."""

    evicted_pages: int
    """pages that the commands evicted"""


class PassRow(Output, frozen=True, kw_only=True):
    """Measurements and actions of one pass."""

    number: int
    """number of the VM's pass, counted from 1"""
    resident_bytes: int
    """resident guest memory after the pass"""
    n_young: int
    """young pages"""
    generations: list[tuple[int, int]]
    """sequence number and resident pages of each generation, the oldest first"""
    wanted_pages: int
    """pages that were to be evicted"""
    outcomes: dict[str, int]
    """what became of them; done is evicted, or in a dry run would be"""
    why: str
    """why they were, by name; empty if none were"""
    forced_pages: int
    """pages evicted by the VM's own choice, because the policy protected the rest"""
    refaulted_pages: int
    """evicted pages that became resident since the last pass"""
    harvest_ns_per_page: float
    """scan and re-arming, measured in the VM"""
    duration_ms: float
    """length of the pass"""
    busy_ms: float
    """processor time of the daemon in it"""
    holding: bool
    """whether the daemon holds back, because evicted pages refault"""
    dry_run: bool
    """whether nothing was evicted, because of --dry-run"""
    notes: list[str]
    """what the pass changed, in words"""


EventKind = Literal["pass", "dropped", "notice", "log"]


class EventOutput(Output, frozen=True, kw_only=True):
    """One event of the daemon's log."""

    event: EventKind
    """a pass; a VM is no longer managed; about the whole daemon; a message of the program"""
    time_s: float
    """wall clock, since 1970"""
    vm: str
    """the VM; empty if it is about no particular one"""
    text: str
    """the event in words, as a line of the log without --json has it"""
    failed: bool
    """whether something failed; the daemon continues"""
    level: str
    """of a message of the program: debug, info, warning, error or critical; else empty"""
    report: PassRow | None
    """of a pass; else null"""
