"""Outputs of the commands that act on a running VM."""

from __future__ import annotations

from typing import Literal

from kvmhost.tools.outputs.base import Output

__all__ = [
    "Condition",
    "DaemonRow",
    "EndedRow",
    "ListOutput",
    "RunOutput",
    "SnapshotOutput",
    "StateRow",
    "StopOutput",
    "VmRow",
]

#: What a VM does: ``created`` is before its start, ``silent`` does not answer.
Condition = Literal["created", "running", "paused", "ended", "failed", "silent"]


class SnapshotOutput(Output, frozen=True, kw_only=True):
    """A VM was saved."""

    file: str
    """the file that was written"""
    memory_bytes: int
    """guest memory in it"""
    stopped: bool
    """whether the VM has ended"""


class DaemonRow(Output, frozen=True, kw_only=True):
    """The holder of a VM's lease."""

    holder: str
    """what it calls itself"""
    pid: int
    """its process"""
    socket: str
    """path of its own control socket; empty: it has none"""


class StateRow(Output, frozen=True, kw_only=True):
    """What a VM answers."""

    pid: int
    """its process"""
    engine: str
    """what runs the vCPUs"""
    image: str
    """the image that it booted"""
    status: int | None
    """the guest's exit status; null while it has not ended"""
    n_vcpus: int
    """number of vCPUs"""
    mem_bytes: int
    """guest memory"""
    resident_bytes: int
    """guest memory that is resident"""
    resident_max_bytes: int
    """the limit of resident memory; 0 is no limit"""
    tracker: str | None
    """the tracker in use; null before the first"""
    readers: list[str]
    """names of the views that are open: who reads its young pages"""
    daemon: DaemonRow | None
    """the daemon that manages it; null: none"""
    uptime_s: float
    """time since its start"""
    n_exits: int
    """exits of its vCPUs since the start"""
    n_evictions: int
    """pages that were evicted since the start"""
    n_fault_ins: int
    """evicted pages that came back since the start"""


class VmRow(Output, frozen=True, kw_only=True):
    """A VM that runs."""

    vm: str
    """what other commands take: its name, or the path of its socket if it is another user's"""
    uid: int
    """user id of its owner"""
    socket: str
    """path of its control socket"""
    condition: Condition
    """what it does; created is before its start, silent does not answer"""
    problem: str
    """why it is silent; else empty"""
    state: StateRow | None
    """what it answered; null if it is silent"""


class ListOutput(Output, frozen=True, kw_only=True):
    """The VMs that run."""

    vms: list[VmRow]
    """one for each VM, those of this user first"""


class RunOutput(Output, frozen=True, kw_only=True):
    """What a VM does after a pause or a resume."""

    vm: str
    """the VM, as it was given"""
    running: bool
    """its guest has started and has not ended"""
    paused: bool
    """its vCPUs are held, by this or by another pause"""
    pause_number: int | None
    """number of the pause that was made, for kvmhost resume --pause; null after a resume"""


class EndedRow(Output, frozen=True, kw_only=True):
    """A VM that was asked to end."""

    vm: str
    """the VM, as it was given"""
    ended: bool
    """whether it has ended"""
    problem: str
    """why not; else empty"""


class StopOutput(Output, frozen=True, kw_only=True):
    """What became of each VM."""

    vms: list[EndedRow]
    """one for each VM, in the order of the command line"""
