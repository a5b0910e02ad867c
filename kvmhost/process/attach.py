"""Tracks accesses to the guest memory of another process, by its pid.

>>> with Attached(4711) as vm:  # doctest: +SKIP
...     vm.harvest()  # begins a window
...     young = vm.harvest().young

Works for any VMM (or other program) whose memory is a shared mapping: a memfd, a file
in tmpfs. Gfns are page numbers in the mapping: equal to the guest's own where the
mapping is one memory slot from guest physical address 0. For the methods, their
effects on the process and the limits of external access, see :mod:`.foreign`.

Views are those of one object. Two objects, in one process or in several, would take accesses
from each other, since a page has one accessed bit: the first one that clears locks the pagemap
file of the process (``flock``) until it is closed, and others are refused with its pid, unless
they force it. The method ``present`` clears nothing and needs no lock.
"""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import os
import select
import typing
from pathlib import Path

from kvmhost.bitmap import Words, YoungBitmap
from kvmhost.closing import Closing
from kvmhost.control.schema import MemoryMap, MemslotInfo
from kvmhost.errors import (
    CapabilityError,
    InUseError,
    IoctlError,
    KvmHostError,
    LayoutError,
    VmGoneError,
)
from kvmhost.process.foreign import Method, Present, open_method
from kvmhost.process.procmaps import Mapping, choose_mapping, shared_mappings, shared_ranges
from kvmhost.trackers.forced import ForcedChanges
from kvmhost.trackers.sharing import SharedHarvests
from kvmhost.trackers.views import UNNAMED, ViewKey
from kvmhost.units import PAGE_BYTES
from kvmhost.vm.harvest import Harvest, Harvestable, HarvestRequest
from kvmhost.vm.names import DEFAULT_VIEW, TableFormat

if typing.TYPE_CHECKING:
    from kvmhost.mmu.feed import Feed

__all__ = ["Attached", "AttachedState"]

log = logging.getLogger("kvmhost.process")

_ENDING_MS = 200


@dataclasses.dataclass(frozen=True)
class AttachedState:
    """The state of the process.

    :param image: the program that it runs
    :param tracker: the method in use; None before the first harvest
    """

    image: str
    tracker: str | None


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The mapping as a memory slot."""

    mapping: Mapping
    gfn: int = 0

    @property
    def n_pages(self) -> int:
        return self.mapping.n_pages

    @property
    def guest_address(self) -> int:
        return self.mapping.start


@dataclasses.dataclass(frozen=True)
class _Source:
    """A method as a source of sweeps: what it clears, it has re-armed."""

    method: Method

    def harvest(
        self, gfn_start: int, n_pages: int, clear: bool = True, mask: Words | None = None
    ) -> YoungBitmap:
        return self.method.harvest(gfn_start, n_pages, clear, mask)

    def rearm(self, gfn_start: int, n_pages: int, young: YoungBitmap | None = None) -> None:
        pass


class Attached(Closing, Harvestable):
    """One mapping of another process, with the harvest interface of a control socket.

    Every method raises :class:`~kvmhost.errors.VmGoneError` once the process has
    ended or the mapping no longer exists.

    :param mapping: which one: an address in hex or a part of its path; empty: the
        largest shared mapping of memory
    :param proc: where proc is mounted
    :raises LayoutError: if there is no such process, or no matching mapping
    :raises VmGoneError: if the process ends meanwhile
    :raises CapabilityError: if this process lacks permission
    """

    def __init__(self, pid: int, mapping: str = "", *, proc: Path = Path("/proc")) -> None:
        self.pid, self.proc = pid, proc
        self.vm = f"pid {pid}"
        self.pidfd = self.pagemap_fd = -1
        self._method: Method | None = None
        self._forced = ForcedChanges()
        self._is_locked = False
        self._feeds: dict[TableFormat, Feed] = {}
        try:
            # First the descriptor, which keeps referring to this process if the pid is reused.
            self.pidfd = _open_pid(pid)
            self.mapping = choose_mapping(shared_mappings(pid, proc), mapping)
            self._shared = SharedHarvests(self.mapping.n_pages, lambda young: None)
            self.pagemap_fd = _open_pagemap(proc / str(pid) / "pagemap", pid)
            self._image = _image(proc / str(pid))
            if self._ended():
                raise VmGoneError(self.vm, "the process has ended")
        except BaseException:
            self.close()
            raise

    def state(self) -> AttachedState:
        """Return the state of the process."""
        return AttachedState(self._image, None if self._method is None else self._method.name)

    def memory_map(self) -> MemoryMap:
        """Return the mapping as one memslot from gfn 0 on."""
        mapping = self.mapping
        n_bytes = mapping.n_pages * PAGE_BYTES
        memslot = MemslotInfo(0, 0, n_bytes, 0, mapping.n_pages, mapping.start)
        return MemoryMap(PAGE_BYTES, mapping.n_pages, [memslot], [])

    def run_harvest(self, asked: HarvestRequest) -> Harvest:
        """Do a harvest of the mapping, see :meth:`harvest`. The first one begins a window.

        Every tracker of a process re-arms as it clears: ``rearm_ns`` is 0. The views are those
        of this object.

        :raises LayoutError: also for ``rearm`` ``none`` and ``all``
        :raises InUseError: also if another object clears the accessed bits of the process
        """
        if asked.clear and asked.rearm not in ("young", "sample"):
            raise LayoutError(
                f"rearm {asked.rearm!r}: the pages of a process are re-armed as they are "
                "cleared; need young or sample",
                field="rearm",
            )
        asked = asked.within(self.mapping.n_pages)
        self._check_there()
        feed = None if asked.table_format is None else self._feed(asked.table_format)
        key = _key(asked.view)
        try:
            source = self._use(asked, key)
            found = self._shared.harvest(source, key, asked)
        except (IoctlError, CapabilityError, OSError):
            self._check_there()
            raise
        self._check_there()
        young = found.young if feed is None else feed.harvest_via_model(found.young)
        return Harvest(young, found.harvest_ns, 0)

    def close(self) -> None:
        """Close the process's descriptors, which also releases the lock. Idempotent."""
        fds, self.pidfd, self.pagemap_fd = (self.pidfd, self.pagemap_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)
        for feed in self._feeds.values():
            feed.close()
        self._feeds.clear()

    def close_view(self, name: str) -> bool:
        """End a view, and put back the method that it replaced by force, if others read.

        :return: whether it was open
        """
        key = _key(name)
        is_open = self._shared.views.close(key)
        before = self._forced.undo(key) if is_open else None
        if before is not None:
            try:
                self._start(before)
            except KvmHostError as error:
                log.warning("tracker %s is not back in use: %s", before, error)
            else:
                self._shared.note_tracker(key)
        return is_open

    def _feed(self, table_format: TableFormat) -> Feed:
        if table_format not in self._feeds:
            from kvmhost.mmu.feed import Feed

            self._feeds[table_format] = Feed(table_format, [_Slot(self.mapping)])
        return self._feeds[table_format]

    def _use(self, asked: HarvestRequest, key: ViewKey) -> _Source:
        """Return the method for a harvest: the one in use, unless another may replace it."""
        before = self._method
        is_kept = before is not None and (
            asked.tracker in ("auto", before.name) or self._forced.is_forced_on(key, asked.tracker)
        )
        if before is not None and is_kept:
            return _Source(before)
        others = ", ".join(str(view.key) for view in self._shared.readers(key, 0))
        may = asked.force or self._forced.takes_back(key, asked.tracker)
        if before is not None and others and not may:
            raise InUseError(
                f"tracker {before.name}",
                f"is in use by {others}",
                f"read by it too, or force the change to {asked.tracker}",
            )
        found = self._start(asked.tracker, force=asked.force)
        if key == UNNAMED:
            self._forced.clear()
        elif before is not None and others:
            self._forced.note(key, before.name, asked.tracker)
        self._shared.note_tracker(key)
        return found

    def _start(self, name: str, *, force: bool = False) -> _Source:
        """Begin to use a method; what the one before had found moves into the views."""
        if name != Present.name:
            self._lock(force)
        if self._method is not None and len(self._shared.views) > 1:
            self._shared.sweep_all(_Source(self._method))
        try:
            self._method = open_method(name, self)
        except KvmHostError:
            if self._method is None:
                self._unlock()
            raise
        return _Source(self._method)

    def _lock(self, force: bool) -> None:
        """Lock the accessed bits of the process against other objects that would clear them.

        :raises InUseError: if another one has the lock, unless it is forced
        """
        if self._is_locked:
            return
        try:
            fcntl.flock(self.pagemap_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._is_locked = True
        except BlockingIOError:
            if not force:
                raise InUseError(
                    f"accessed bits of {self.vm}",
                    f"are taken by {_lock_holder(self.pagemap_fd, self.proc)}",
                    "two readers of another process hide accesses from each other: let that one "
                    "end, read by tracker present, or force it",
                ) from None

    def _unlock(self) -> None:
        fcntl.flock(self.pagemap_fd, fcntl.LOCK_UN)
        self._is_locked = False

    def _ended(self, wait_ms: int = 0) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(wait_ms))

    def _check_there(self) -> None:
        """Raise if the process has ended, runs another program, or has removed the mapping."""
        if self._ended():
            raise VmGoneError(self.vm, "the process has ended")
        # The file refers to the address space at the time of opening: empty after an exec.
        if not os.pread(self.pagemap_fd, 8, self.mapping.start // PAGE_BYTES * 8):
            # A process releases its memory shortly before it has ended.
            ended = self._ended(_ENDING_MS)
            what = "has ended" if ended else "runs another program now"
            raise VmGoneError(self.vm, f"the process {what}")
        try:
            now = shared_ranges(self.proc / str(self.pid) / "maps")
        except (FileNotFoundError, ProcessLookupError):
            raise VmGoneError(self.vm, "the process has ended") from None
        if not _covers(now, self.mapping.start, self.mapping.end):
            if self._ended(_ENDING_MS):
                raise VmGoneError(self.vm, "the process has ended")
            raise VmGoneError(self.vm, f"the mapping {self.mapping} is no longer there")


def _covers(ranges: list[tuple[int, int]], start: int, end: int) -> bool:
    for low, high in ranges:
        if low <= start < high:
            start = high
        if start >= end:
            return True
    return False


def _open_pid(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):
        raise LayoutError(f"process {pid}: no such process") from None
    except OSError as error:
        raise LayoutError(f"process {pid}: {error.strerror}") from error


def _open_pagemap(path: Path, pid: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LayoutError(f"process {pid}: no such process") from None
    except PermissionError as error:
        raise CapabilityError(
            "attach", f"to read {path}", error.strerror or "",
            "run as the user of that process, or as root",
        ) from error  # fmt: skip


def _image(directory: Path) -> str:
    try:
        return str((directory / "exe").readlink())
    except OSError:
        return "unknown"


def _key(view: str) -> ViewKey:
    return UNNAMED if view == DEFAULT_VIEW else ViewKey(os.getpid(), view)


def _lock_holder(fd: int, proc: Path) -> str:
    """Return the process that holds the lock of a file, as text."""
    inode = str(os.fstat(fd).st_ino)
    for line in (proc / "locks").read_text().splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == inode:
            return f"process {words[4]}"
    return "another process"
