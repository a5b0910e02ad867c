"""Outputs of the commands about emulated hosts."""

from __future__ import annotations

from kvmhost.tools.outputs.base import Output

__all__ = ["LabHostOutput", "LabListOutput"]


class LabHostOutput(Output, frozen=True, kw_only=True):
    """One emulated host."""

    name: str
    """its name in other commands"""
    architecture: str
    """its architecture, as Debian names it"""
    about: str
    """its processor and second-stage paging"""
    kernel: str
    """version of the kernel's package"""
    root: str
    """where its root file system comes from"""
    cached: bool
    """whether it can boot without a download"""
    qemu: str
    """the emulator's program"""
    qemu_version: str | None
    """the emulator's version; null if it is not installed"""


class LabListOutput(Output, frozen=True, kw_only=True):
    """All emulated hosts."""

    hosts: list[LabHostOutput]
    """one per host"""
