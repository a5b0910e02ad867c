"""Outputs of the commands that tell what a daemon knows: pages and generations."""

from __future__ import annotations

from kvmhost.control.schema import Page
from kvmhost.reclaim.control.schema import PageAnswer
from kvmhost.tools.outputs.base import Output

__all__ = ["EvictedOutput", "GenerationsOutput", "PageOutput"]


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


class EvictedOutput(Output, frozen=True, kw_only=True):
    """Commands were run."""

    evicted_pages: int
    """pages that the commands evicted"""
