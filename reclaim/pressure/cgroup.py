"""Memory cgroups, version 1 and 2: a temporary child cgroup with a limit.

======================= =========================== ==============================
                        version 1                   version 2
======================= =========================== ==============================
limit                   memory.limit_in_bytes       memory.max
no swap beyond it       memory.memsw.limit_in_bytes memory.swap.max
usage, highest usage    memory.usage_in_bytes,      memory.current, memory.peak
                        memory.max_usage_in_bytes   (since Linux 5.19)
processes killed        memory.oom_control:         memory.events: oom_kill
                        oom_kill (Linux 4.13)
limits of the hierarchy memory.limit_in_bytes of    memory.max and memory.high of
                        each level, and memory.stat each level
                        hierarchical_memory_limit
======================= =========================== ==============================

The limits of all ancestors apply to a cgroup as well; its processes reach the limit with
the least memory left (:meth:`MemoryCgroup.tightest`) first.

The parent is the first cgroup in which a child with a memory limit can be created, of the
root of the mount, the cgroup of this process, and the ancestors of that cgroup.

>>> with MemoryCgroup.create("demo", limit_bytes=64 << 20) as group:  # doctest: +SKIP
...     group.add_pid(pid)
...     group.usage_bytes()
"""

from __future__ import annotations

import dataclasses
import errno
import os
import posixpath
import time
from collections.abc import Iterator

from kvmhost.closing import Closing
from kvmhost.errors import CapabilityError
from kvmhost.reclaim.errors import KernelFileError
from kvmhost.reclaim.pressure.kernelfiles import KernelFiles

__all__ = ["CgroupLimit", "MemoryCgroup", "Parent", "find_parent"]

#: Maximum time that a cgroup stays busy after its last process has been reaped.
_REMOVE_S = 5.0


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of the control files."""

    limit: str
    swap_limit: str
    usage: str
    peak: str
    events: str
    #: Files that each contain a limit on memory.
    limits: tuple[str, ...]
    inactive_file: str


_NAMES = {
    1: _Names(
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
        ("memory.limit_in_bytes",),
        "total_inactive_file",
    ),
    2: _Names(
        "memory.max",
        "memory.swap.max",
        "memory.current",
        "memory.peak",
        "memory.events",
        ("memory.max", "memory.high"),
        "inactive_file",
    ),
}


@dataclasses.dataclass(frozen=True)
class CgroupLimit:
    """A limit that applies to a cgroup, and the usage that counts against it.

    :ivar path: cgroup that has the limit: the given cgroup, or an ancestor of it
    :ivar file: control file that contains the limit
    :ivar needed_bytes: usage of that cgroup, see :meth:`MemoryCgroup.needed_bytes`
    """

    path: str
    file: str
    limit_bytes: int
    needed_bytes: int

    def excess_bytes(self, share: float = 1.0) -> int:
        """Return the usage minus a share of the limit; negative below it."""
        return self.needed_bytes - int(self.limit_bytes * share)


@dataclasses.dataclass(frozen=True)
class Parent:
    """A cgroup that allows children with a memory limit: its version, 1 or 2, and its path."""

    version: int
    path: str


def find_parent(files: KernelFiles | None = None) -> Parent:
    """Find a cgroup that allows a child with a memory limit, by creating such a child.

    :raises CapabilityError: if there is none; names the attempts and their errors
    """
    files = files or KernelFiles()
    tried = []
    for parent in _candidates(files):
        problem = _try_child(files, parent)
        if problem is None:
            return parent
        tried.append(f"v{parent.version} {parent.path}: {problem}")
    raise CapabilityError(
        "memory cgroup",
        "a cgroup of version 1 or 2 that takes a child with a memory limit",
        "; ".join(tried) or "no memory cgroup is mounted",
        "run as root, or in a delegated cgroup (systemd-run --user -p Delegate=yes)",
    )


class MemoryCgroup(Closing):
    """A child cgroup with a memory limit; removed by :meth:`close`.

    Every method raises :class:`~kvmhost.reclaim.errors.KernelFileError` if the kernel refuses.
    """

    def __init__(self, path: str, version: int, files: KernelFiles) -> None:
        self.path, self.version = path, version
        self._files, self._names = files, _NAMES[version]
        self._closed = False

    @classmethod
    def create(
        cls, name: str, *, limit_bytes: int | None = None, files: KernelFiles | None = None
    ) -> MemoryCgroup:
        """Create a cgroup ``kvmhost-NAME-PID`` with a limit; None: without a limit.

        :raises CapabilityError: if no memory cgroup can be made here
        """
        files = files or KernelFiles()
        parent = find_parent(files)
        path = posixpath.join(parent.path, f"kvmhost-{name}-{os.getpid()}")
        files.mkdir(path)
        group = cls(path, parent.version, files)
        try:
            if limit_bytes is not None:
                group.set_limit(limit_bytes)
        except BaseException:
            group.close()
            raise
        return group

    @classmethod
    def at(cls, path: str, files: KernelFiles | None = None) -> MemoryCgroup:
        """Return the existing cgroup at a path, to read from it; do not close it.

        :raises CapabilityError: if it has no memory controller
        """
        files = files or KernelFiles()
        for version, names in _NAMES.items():
            if files.exists(posixpath.join(path, names.usage)):
                return cls(path, version, files)
        wanted = " or ".join(names.usage for names in _NAMES.values())
        raise CapabilityError(
            "memory cgroup", f"{wanted} in {path}", "neither", "name a cgroup with that controller"
        )

    def set_limit(self, limit_bytes: int) -> None:
        """Limit memory, and disallow swap beyond the limit."""
        if self.version == 1:
            # The limit of memory plus swap must not be below that of memory.
            self._set_swap(-1)
            self._write(self._names.limit, limit_bytes)
            self._set_swap(limit_bytes)
        else:
            self._write(self._names.limit, limit_bytes)
            self._set_swap(0)

    def add_pid(self, pid: int) -> None:
        """Move a process into the cgroup; 0 is the caller."""
        self._write("cgroup.procs", pid)

    def pids(self) -> list[int]:
        """Return the processes in the cgroup."""
        return [int(line) for line in self._read("cgroup.procs").split()]

    def limit_bytes(self) -> int | None:
        """Return the limit, or None if there is none."""
        return self._limit_in(self._names.limit)

    def tightest(self, share: float = 1.0) -> CgroupLimit | None:
        """Return the limit with the least memory left, of this cgroup and its ancestors.

        :param share: the part of each limit that may be used
        :return: None if no visible ancestor has a limit
        """
        limits = [limit for group in self._upwards() for limit in group._own_limits()]
        limits += self._limit_out_of_sight(limits)
        return max(limits, key=lambda limit: limit.excess_bytes(share), default=None)

    def _upwards(self) -> Iterator[MemoryCgroup]:
        """Yield this cgroup and the ancestors whose limits apply to it."""
        path = self.path.rstrip("/")
        while self._files.exists(posixpath.join(path, self._names.usage)):
            yield MemoryCgroup(path, self.version, self._files)
            path = posixpath.dirname(path)
            # Before Linux 5.11, limits in version 1 could be non-hierarchical.
            switch = posixpath.join(path, "memory.use_hierarchy")
            if self._files.exists(switch) and self._files.read(switch).strip() == "0":
                return

    def _own_limits(self) -> list[CgroupLimit]:
        found = []
        for name in self._names.limits:
            if self._files.exists(posixpath.join(self.path, name)):
                limit = self._limit_in(name)
                if limit is not None:
                    found.append(CgroupLimit(self.path, name, limit, self.needed_bytes()))
        return found

    def _limit_out_of_sight(self, seen: list[CgroupLimit]) -> list[CgroupLimit]:
        """Return the limit of an ancestor above the mount, which is not visible in a container."""
        if self.version == 2:
            return []
        lowest = min((limit.limit_bytes for limit in seen), default=1 << 62)
        hierarchical = self._statistic("hierarchical_memory_limit")
        if hierarchical is None or hierarchical >= lowest:
            return []
        top = list(self._upwards())[-1]
        file = "memory.stat hierarchical_memory_limit"
        return [CgroupLimit(top.path, file, hierarchical, top.needed_bytes())]

    def _limit_in(self, name: str) -> int | None:
        text = self._read(name).strip()
        # Version 1 represents "no limit" by the largest multiple of the page size.
        return None if text == "max" or int(text) >= 1 << 62 else int(text)

    def usage_bytes(self) -> int:
        """Return the charged memory; the first cgroup to touch shared memory is charged for it."""
        return int(self._read(self._names.usage))

    def needed_bytes(self) -> int:
        """Return the usage without file pages that the kernel drops before an OOM kill."""
        inactive = self._statistic(self._names.inactive_file)
        return max(0, self.usage_bytes() - (inactive or 0))

    def _statistic(self, key: str) -> int | None:
        """Return a line of ``memory.stat``; None if the file or the line is missing."""
        if not self._files.exists(posixpath.join(self.path, "memory.stat")):
            return None
        for line in self._read("memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
        return None

    def peak_bytes(self) -> int | None:
        """Return the highest usage so far, or None if the kernel does not record it."""
        if not self._files.exists(posixpath.join(self.path, self._names.peak)):
            return None
        return int(self._read(self._names.peak))

    def oom_kills(self) -> int:
        """Return the number of processes killed at the limit."""
        for line in self._read(self._names.events).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def close(self) -> None:
        """Remove the cgroup; its processes must have ended. Idempotent.

        :raises KernelFileError: ``EBUSY`` if it still contains a process
        """
        if self._closed:
            return
        deadline = time.monotonic() + _REMOVE_S
        while True:
            try:
                self._files.rmdir(self.path)
                break
            except KernelFileError as error:
                if error.errno == errno.ENOENT:
                    break
                # A reaped process leaves its cgroup shortly afterwards.
                busy = error.errno == errno.EBUSY and not self.pids()
                if not busy or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)
        self._closed = True

    def _set_swap(self, limit_bytes: int) -> None:
        if self._files.exists(posixpath.join(self.path, self._names.swap_limit)):
            self._write(self._names.swap_limit, limit_bytes)

    def _read(self, name: str) -> str:
        return self._files.read(posixpath.join(self.path, name))

    def _write(self, name: str, value: int) -> None:
        self._files.write(posixpath.join(self.path, name), str(value))


def _candidates(files: KernelFiles) -> Iterator[Parent]:
    own = _own_cgroups(files)
    for version, root, mount in _mounts(files):
        yield Parent(version, mount)
        path = posixpath.relpath(own.get(version, "/"), root)
        while path not in (".", "/") and not path.startswith(".."):
            yield Parent(version, posixpath.join(mount, path))
            path = posixpath.dirname(path) or "."


def _mounts(files: KernelFiles) -> Iterator[tuple[int, str, str]]:
    """Yield (version, root inside the hierarchy, mount point). Source: proc(5)."""
    for line in files.read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, mount = _unescape(fields[3]), _unescape(fields[4])
        if kind[0] == "cgroup2":
            yield 2, root, mount
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield 1, root, mount


def _own_cgroups(files: KernelFiles) -> dict[int, str]:
    """Return this process's cgroup by version. Source: cgroups(7)."""
    own = {}
    for line in files.read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            own[2] = path
        elif "memory" in controllers.split(","):
            own[1] = path
    return own


def _unescape(text: str) -> str:
    return text.encode().decode("unicode_escape") if "\\" in text else text


def _try_child(files: KernelFiles, parent: Parent) -> str | None:
    """Create a child and remove it; return the error, if any."""
    child = posixpath.join(parent.path, f"kvmhost-probe-{os.getpid()}")
    try:
        if parent.version == 2:
            _enable_memory(files, parent.path)
        files.mkdir(child)
        limit = files.exists(posixpath.join(child, _NAMES[parent.version].limit))
        files.rmdir(child)
    except KernelFileError as error:
        return str(error)
    return None if limit else "a child has no memory limit"


def _enable_memory(files: KernelFiles, path: str) -> None:
    switches = posixpath.join(path, "cgroup.subtree_control")
    if "memory" in files.read(switches).split():
        return
    if "memory" not in files.read(posixpath.join(path, "cgroup.controllers")).split():
        raise KernelFileError(f"{path}: no memory controller", errno.EOPNOTSUPP)
    files.write(switches, "+memory")
