"""Tables of VMs for ``kvmhost list`` and ``kvmhost top``: columns, and a row for each VM."""

from __future__ import annotations

import pwd

from kvmhost.control.listing import ListedVm
from kvmhost.control.schema import Counters, LeaseInfo, RunState, VmState
from kvmhost.printable import printable
from kvmhost.tools.outputs.vms import Condition, DaemonRow, RunOutput, StateRow, VmRow
from kvmhost.units import size_text

__all__ = ["COLUMNS", "age_text", "condition_of", "output_of", "row_of", "run_output", "user_name"]

#: Column titles, in order; ``USER`` is shown only with VMs of several users.
COLUMNS = (
    "VM", "USER", "STATE", "ENGINE", "VCPUS", "MEM", "RESIDENT", "LIMIT", "TRACKER", "READERS",
    "DAEMON", "UP",
)  # fmt: skip


def row_of(vm: ListedVm) -> list[str]:
    """Return a VM's row: one text for each of :data:`COLUMNS`."""
    head = [vm.vm, user_name(vm.uid), condition_of(vm)]
    return [printable(text) for text in head + _details(vm.state)]


def _details(state: VmState | None) -> list[str]:
    if state is None:
        return ["-"] * (len(COLUMNS) - 3)
    lease = state.lease
    return [
        state.engine,
        str(len(state.vcpus)),
        size_text(state.mem_bytes),
        size_text(state.resident_bytes),
        size_text(state.resident_max_bytes) if state.resident_max_bytes else "-",
        state.tracker or "-",
        ",".join(_readers(state)) or "-",
        "-" if lease is None else f"{lease.holder} ({lease.pid})",
        age_text(state.uptime_s),
    ]


def output_of(vm: ListedVm) -> VmRow:
    """Return a VM as ``kvmhost list --json`` prints it."""
    return VmRow(
        vm=vm.vm,
        uid=vm.uid,
        socket=vm.socket,
        condition=condition_of(vm),
        problem=vm.problem,
        state=None if vm.state is None else _state_row(vm.state, vm.counters),
    )


def _state_row(state: VmState, counters: Counters | None) -> StateRow:
    pager = (counters and counters.pager) or {}
    lease = state.lease
    return StateRow(
        pid=state.pid,
        engine=state.engine,
        image=state.image,
        status=state.status,
        n_vcpus=len(state.vcpus),
        mem_bytes=state.mem_bytes,
        resident_bytes=state.resident_bytes,
        resident_max_bytes=state.resident_max_bytes,
        tracker=state.tracker,
        readers=_readers(state),
        daemon=None if lease is None else _daemon_row(lease),
        uptime_s=state.uptime_s,
        n_exits=state.exits,
        n_evictions=pager.get("evictions", 0),
        n_fault_ins=pager.get("fault_ins", 0),
    )


def _readers(state: VmState) -> list[str]:
    return [view.name for view in state.views if view.name != "default" or view.harvests]


def _daemon_row(lease: LeaseInfo) -> DaemonRow:
    return DaemonRow(holder=lease.holder, pid=lease.pid, socket=lease.socket)


def run_output(vm: str, state: RunState) -> RunOutput:
    """Return the answer to a pause or a resume as the commands print it with ``--json``."""
    return RunOutput(vm=vm, running=state.running, paused=state.paused, pause_number=state.pause)


def condition_of(vm: ListedVm) -> Condition:
    """Return what a VM does, in one word."""
    state = vm.state
    if state is None:
        return "silent"
    if state.error:
        return "failed"
    if state.status is not None:
        return "ended"
    return "paused" if state.paused else "running" if state.running else "created"


def user_name(uid: int) -> str:
    """Return a user's name; the number if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def age_text(seconds: float) -> str:
    """Return a time in its two largest units: ``12s``, ``3m05s``, ``2h07m``, ``3d04h``."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    return f"{minutes}m{s:02}s" if minutes else f"{s}s"
