"""Outputs of the commands that act on a running VM."""

from __future__ import annotations

from kvmhost.tools.outputs.base import Output

__all__ = ["SnapshotOutput"]


class SnapshotOutput(Output, frozen=True, kw_only=True):
    """A VM was saved."""

    file: str
    """the file that was written"""
    memory_bytes: int
    """guest memory in it"""
    stopped: bool
    """whether the VM has ended"""
