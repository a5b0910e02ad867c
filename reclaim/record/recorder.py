"""Record running VMs: one harvest per interval, each appended to a record.

The record reads a view of its own, so that it and the other readers of the VM find what each
would find alone. A window may end with the sweep of another reader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kvmhost import __version__
from kvmhost.control.client import Client
from kvmhost.control.schema import MemoryMap, Residency, VmState
from kvmhost.errors import LayoutError, VmGoneError
from kvmhost.process.attach import Attached
from kvmhost.reclaim.record.meta import Memslot, RecordSession
from kvmhost.reclaim.record.residency import residency_of_window
from kvmhost.reclaim.record.writer import Cost, RecordWriter
from kvmhost.vm.names import NOT_SEEN, SHARED_SWEEP

__all__ = ["RecordingPlan", "RecordingResult", "record_vm"]

#: Interval at which the memslots are read.
_LAYOUT_S = 1.0
#: Replies about events per window: more come faster than they can be read.
_MOST_REPLIES = 16


@dataclasses.dataclass(frozen=True)
class RecordingPlan:
    """Parameters of a recording.

    :param count: number of windows; None: until stopped, or until the VM exits
    :param gfns: ``[first, end)``; None: all memory, including memory added later
    :param append: append to an existing record
    :param view: the view of the VM that is recorded
    :param force: change the tracker also while others read by another one
    """

    interval_s: float = 1.0
    count: int | None = None
    tracker: str = "auto"
    gfns: tuple[int, int] | None = None
    append: bool = False
    view: str = "record"
    force: bool = False


@dataclasses.dataclass(frozen=True)
class RecordingResult:
    """The result of a recording.

    :param reason: why it ended
    :param late: windows that took at least 1.5 times the planned length
    """

    vm: str
    path: Path
    windows: int
    total_windows: int
    late: int
    reason: str


def record_vm(
    client: Client | Attached,
    path: Path,
    plan: RecordingPlan,
    stop: threading.Event,
    on_window: Callable[[], None] = lambda: None,
) -> RecordingResult:
    """Record one VM or process until the count is reached, ``stop`` is set or it exits.

    :raises VmGoneError: if the VM does not exist
    :raises ControlError: if the VM rejects harvests
    :raises LayoutError: if the range is outside its memory, or differs from the record's
    :raises OSError: if the record cannot be written; complete windows are kept
    """
    memory = client.memory_map()
    first, end = _range(plan.gfns, memory)
    # The first harvest opens the view, or ends a window of the recording before.
    found = client.harvest(
        first, end - first, tracker=plan.tracker, view=plan.view, force=plan.force
    )
    source = found.young.provenance
    session = RecordSession(
        0, source.tracker, source.table_format, round(plan.interval_s * 1e9), _boot_id(),
        _facts(client, source.tracker, plan.view),
    )  # fmt: skip
    with _writer(path, plan, client.vm, memory, (first, end), session) as writer:
        return _Loop(client, plan, stop, writer, source.tracker, memory).run(on_window)


class _Loop:
    def __init__(
        self,
        client: Client | Attached,
        plan: RecordingPlan,
        stop: threading.Event,
        writer: RecordWriter,
        tracker: str,
        memory: MemoryMap,
    ) -> None:
        self._client, self._plan, self._stop, self._writer = client, plan, stop, writer
        self._tracker, self._memory = tracker, memory
        self._looked_s = self._begin_s = time.monotonic()
        self._late = 0
        self._since = 0
        if isinstance(client, Client):
            self._since = _read_residency(client, 0)[-1].next

    def run(self, on_window: Callable[[], None]) -> RecordingResult:
        done, reason = 0, f"all {self._plan.count} windows"
        while done != self._plan.count:
            if self._wait(done + 1):
                reason = "stopped"
                break
            try:
                self._window()
            except VmGoneError as error:
                reason = f"the VM is gone: {error.problem}"
                break
            done += 1
            on_window()
        writer = self._writer
        return RecordingResult(
            self._client.vm, writer.path, done, writer.n_windows, self._late, reason
        )

    def _wait(self, number: int) -> bool:
        """Wait for the end of a window; return whether to stop.

        The time is measured from the start, so that one late window does not delay later
        ones. Windows missed while the host was suspended are skipped.
        """
        now, interval = time.monotonic(), self._plan.interval_s
        due = self._begin_s + number * interval
        if now > due + interval / 2:
            self._late += 1
            self._begin_s += now - due
            due = now
        return self._stop.wait(max(due - now, 0.0))

    def _window(self) -> None:
        if time.monotonic() - self._looked_s >= _LAYOUT_S:
            self._memory = self._client.memory_map()
            self._looked_s = time.monotonic()
            self._writer.set_layout(_memslots(self._memory))
        first, end = _range(self._plan.gfns, self._memory)
        found = self._client.harvest(
            first,
            end - first,
            tracker=self._tracker,
            view=self._plan.view,
            max_age_s=SHARED_SWEEP * self._plan.interval_s,
        )
        wall_ns = time.time_ns()
        cost = Cost(found.harvest_ns, found.rearm_ns)
        residency = None
        if isinstance(self._client, Client):  # Another process's pager cannot be asked.
            replies = _read_residency(self._client, self._since)
            self._since = replies[-1].next
            residency = residency_of_window(replies, first, end - first)
        self._writer.append(found.young, wall_ns=wall_ns, cost=cost, residency=residency)


def _read_residency(client: Client, since: int) -> list[Residency]:
    """Read residency and all events from number ``since`` on, in several replies if need be."""
    found = [client.residency(since)]
    while found[-1].left and len(found) < _MOST_REPLIES:
        found.append(client.residency(found[-1].next))
    return found


def _writer(
    path: Path,
    plan: RecordingPlan,
    vm: str,
    memory: MemoryMap,
    gfns: tuple[int, int],
    session: RecordSession,
) -> RecordWriter:
    first, end = gfns
    if plan.append and path.exists():
        writer = RecordWriter.resume(path, session=session)
        if writer.metadata.gfn_start != first:
            writer.close()
            raise LayoutError(
                f"{path}: begins with gfn {writer.metadata.gfn_start:#x}, not {first:#x}"
            )
        writer.set_layout(_memslots(memory))
        return writer
    return RecordWriter.create(
        path,
        end - first,
        gfn_start=first,
        page_bytes=memory.page_bytes,
        name=Path(vm).stem,
        memslots=_memslots(memory),
        session=session,
    )


def _range(gfns: tuple[int, int] | None, memory: MemoryMap) -> tuple[int, int]:
    first, end = gfns or (0, memory.gfn_end)
    if not 0 <= first < end <= memory.gfn_end:
        raise LayoutError(f"range {first:#x}:{end:#x}: memory has gfns [0, {memory.gfn_end:#x})")
    return first, end


def _memslots(memory: MemoryMap) -> list[Memslot]:
    return [Memslot(m.slot, m.gfn_start, m.n_pages, m.hva) for m in memory.memslots]


def _facts(client: Client | Attached, tracker: str, view: str | None) -> dict[str, str]:
    state, host = client.state(), platform.uname()
    facts = {"vm": client.vm, "image": Path(state.image).name}
    if view:
        facts["view"] = view
    if tracker in NOT_SEEN:
        facts["not_seen"] = NOT_SEEN[tracker]
    if isinstance(state, VmState):
        facts |= {
            "vm": state.name,
            "engine": state.engine,
            "vcpus": str(len(state.vcpus)),
            "params": " ".join(f"{name}={value}" for name, value in state.params.items()),
        }
    return facts | {
        "kernel": f"{host.system} {host.release}",
        "machine": host.machine,
        "host_cpus": str(os.cpu_count()),
        "written_by": f"kvmhost {__version__}",
    }


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
