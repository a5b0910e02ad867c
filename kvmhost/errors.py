"""The exceptions of kvmhost.

::

    KvmHostError
    ├─ IoctlError (also OSError): request name, errno, arguments
    ├─ HostError (also OSError): what, errno, remedy
    ├─ CapabilityError: name, needed, found, remedy
    ├─ LayoutError (also ValueError): overlap, alignment, out of range
    ├─ ImageError (also ValueError): file, offset, field
    ├─ PagerError: eviction or fault-in failed; no data was lost
    │  └─ LostPageError: the store cannot give pages back; the guest has stopped
    ├─ TableError: a page table that is not what it should be; entry, level, gfn
    ├─ StateError (also RuntimeError): what was asked is closed, not started, or over
    │  └─ InUseError: others read the VM by another tracker, or all its views are taken
    ├─ ControlError: a VM refused a request for a reason that only a socket has
    ├─ PauseTimeout: vCPUs did not stop in time; nothing is paused
    ├─ NameInUseError (also ValueError): a VM of that name runs already
    ├─ VmGoneError (also ConnectionError): no VM responds, or it has ended
    ├─ GuestError
    │  ├─ UnexpectedExit: the decoded exit
    │  └─ GuestTimeout
    ├─ LabError: an emulated host ended before its command
    │  └─ LabTimeout
    ├─ GuestBuildError (also RuntimeError): of :mod:`kvmhost.guests.build`
    └─ ReclaimError: the errors of :mod:`kvmhost.reclaim.errors`

Every one of them survives pickling, so that it can cross a process boundary. Those of
:data:`BY_KIND` also cross a control socket: a client raises what the machine raised.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

__all__ = [
    "BY_KIND",
    "CapabilityError",
    "ControlError",
    "GuestError",
    "GuestTimeout",
    "HostError",
    "ImageError",
    "InUseError",
    "IoctlError",
    "KvmHostError",
    "LabError",
    "LabTimeout",
    "LayoutError",
    "LostPageError",
    "NameInUseError",
    "PagerError",
    "PauseTimeout",
    "StateError",
    "TableError",
    "UnexpectedExit",
    "VmGoneError",
    "fields_of",
    "from_fields",
]


class KvmHostError(Exception):
    """Base of all exceptions that kvmhost defines."""


class IoctlError(KvmHostError, OSError):
    """A system call on a descriptor failed.

    :param request: name of the request, for example ``KVM_CREATE_VM``
    :param errno_: positive errno
    :param arguments: what was passed, by field name; integers print in hex
    """

    def __init__(self, request: str, errno_: int, arguments: dict[str, Any] | None = None) -> None:
        self.request = request
        self.arguments = dict(arguments or {})
        OSError.__init__(self, errno_, os.strerror(errno_))

    def __str__(self) -> str:
        shown = ", ".join(f"{k}={_show(v)}" for k, v in self.arguments.items())
        return f"{self.request}({shown}): {self.strerror} (errno {self.errno})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.request, self.errno, self.arguments))


class HostError(KvmHostError, OSError):
    """The operating system refused a file or memory: disk full, no memory, a limit, a path.

    :param what: the file, or the purpose of the memory
    :param errno_: positive errno
    :param remedy: how to fix it; by default a remedy for that errno
    """

    def __init__(self, what: str, errno_: int, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy or _REMEDIES.get(errno_, "")
        OSError.__init__(self, errno_, os.strerror(errno_))

    @property
    def is_bad_path(self) -> bool:
        """Whether another path would help: not a full disk, a limit or a lack of memory."""
        return self.errno in _BAD_PATH

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.what}: {self.strerror}{remedy}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.what, self.errno, self.remedy))


_BAD_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
}

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another file system",
    errno.EDQUOT: "free some space, or raise the disk quota",
    errno.EFBIG: "raise the limit on file size (ulimit -f)",
    errno.ENOMEM: "free some memory, or raise the limit on it (ulimit -v, memory cgroup)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EROFS: "choose another file system",
}


class CapabilityError(KvmHostError):
    """The host or the kernel lacks something; the message ends with a remedy.

    :param name: what does not work, for example ``tracker idle``
    :param needed: what it needs
    :param found: what was found instead: a noun, or a clause that begins with ``which``
    :param remedy: what to do, as an imperative
    """

    def __init__(self, name: str, needed: str, found: str, remedy: str) -> None:
        super().__init__(name, needed, found, remedy)
        self.name, self.needed, self.found, self.remedy = name, needed, found, remedy

    def __str__(self) -> str:
        found = self.found if self.found.startswith("which ") else f"found {self.found}"
        text = f"{self.name} needs {self.needed}"
        text += f", {found}" if self.found else ""
        return f"{text}; {self.remedy}" if self.remedy else text


class LayoutError(KvmHostError, ValueError):
    """An invalid argument or memory layout: overlap, alignment or range.

    :param field: the argument that is wrong, where one is known
    """

    def __init__(self, problem: str, *, field: str = "") -> None:
        super().__init__(problem)
        self.problem, self.field = problem, field


class ImageError(KvmHostError, ValueError):
    """A guest image is damaged, unsupported or does not fit.

    :param file: path of the image
    :param field: the header field or part that is wrong
    :param problem: the defect
    :param offset: byte offset in the file, where one is known
    """

    def __init__(self, file: str, field: str, problem: str, offset: int | None = None) -> None:
        super().__init__(file, field, problem, offset)
        self.file, self.field, self.problem, self.offset = file, field, problem, offset

    def __str__(self) -> str:
        where = f" at offset {self.offset:#x}" if self.offset is not None else ""
        return f"{self.file}: {self.field}{where}: {self.problem}"


class PagerError(KvmHostError):
    """A pager operation failed; the guest's data is unchanged."""


class LostPageError(PagerError):
    """Contents of guest pages are lost, as after a machine check.

    :param gfns: which pages, ascending
    :param reason: the defect of the first of them
    """

    def __init__(self, gfns: list[int], reason: str) -> None:
        super().__init__(gfns, reason)
        self.gfns, self.reason = gfns, reason

    def __str__(self) -> str:
        shown = ", ".join(f"{gfn:#x}" for gfn in self.gfns[:8])
        more = f" and {len(self.gfns) - 8} more" if len(self.gfns) > 8 else ""
        return f"machine check: the store cannot give back gfn {shown}{more}: {self.reason}"


class TableError(KvmHostError):
    """An entry of a page table that others own does not make sense, or its root is gone.

    :param problem: what is wrong with it
    :param gfn: where the walk was
    :param level: of the entry; 1 is the base page
    :param entry: its value, in CPU order
    :param cleared: accessed bits that were cleared before it was met
    """

    def __init__(
        self, problem: str, gfn: int = 0, level: int = 0, entry: int = 0, cleared: int = 0
    ) -> None:
        super().__init__(problem, gfn, level, entry, cleared)
        self.problem, self.gfn, self.level = problem, gfn, level
        self.entry, self.cleared = entry, cleared

    def __str__(self) -> str:
        if not self.level:
            return self.problem
        before = f"; {self.cleared} accessed bits were cleared before" if self.cleared else ""
        where = f"entry {self.entry:#018x} of level {self.level} for gfn {self.gfn:#x}"
        return f"{where} {self.problem}{before}"


class StateError(KvmHostError, RuntimeError):
    """An object is in a state that does not allow the operation.

    :param what: the object, for example ``machine 'a'``
    :param state: ``is closed``, ``is not started``
    :param remedy: what to do first, if that helps
    """

    def __init__(self, what: str, state: str = "is closed", remedy: str = "") -> None:
        super().__init__(what, state, remedy)
        self.what, self.state, self.remedy = what, state, remedy

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.what} {self.state}{remedy}"


class InUseError(StateError):
    """Other readers of the VM are in the way: of another tracker, or of one more view.

    :param what: what they use, for example ``tracker guestpt``
    :param state: who they are
    :param remedy: what to do
    """


class ControlError(KvmHostError):
    """A VM refused a control request, for a reason specific to the control socket.

    Examples are an unknown path, a lease of another holder, a body that is too large, and an
    error without its own class. Errors of the machine itself keep their class.

    :param status: HTTP status code
    :param problem: the server's message
    """

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(status, problem)
        self.status, self.problem = status, problem

    def __str__(self) -> str:
        return self.problem


class PauseTimeout(KvmHostError):
    """vCPUs did not stop within the time-out of a pause; nothing is paused.

    :param vcpus: indexes of those that did not
    """

    def __init__(self, vcpus: list[int], seconds: float) -> None:
        super().__init__(vcpus, seconds)
        self.vcpus, self.seconds = vcpus, seconds

    def __str__(self) -> str:
        which = ", ".join(map(str, self.vcpus))
        return f"vCPU {which} did not stop within {self.seconds:g} s; the machine is not paused"


class NameInUseError(KvmHostError, ValueError):
    """A VM of that name runs already.

    :param pid: its process, 0 if that is not known
    """

    def __init__(self, name: str, pid: int = 0) -> None:
        super().__init__(name, pid)
        self.name, self.pid = name, pid

    def __str__(self) -> str:
        who = f" (process {self.pid})" if self.pid else ""
        return f"a VM named {self.name!r} runs already{who}; stop it or take another --name"


class VmGoneError(KvmHostError, ConnectionError):
    """No VM responds at a socket, or it ended during a request.

    :param vm: name or socket path, as the caller gave it
    """

    def __init__(self, vm: str, problem: str) -> None:
        super().__init__(vm, problem)
        self.vm, self.problem = vm, problem

    def __str__(self) -> str:
        return f"VM {self.vm!r}: {self.problem}"


class GuestError(KvmHostError):
    """A guest ended abnormally."""


class UnexpectedExit(GuestError):
    """A vCPU left guest mode for a reason that no device or machine handles."""

    def __init__(self, vcpu: int, reason: str, detail: str = "") -> None:
        super().__init__(vcpu, reason, detail)
        self.vcpu, self.reason, self.detail = vcpu, reason, detail

    def __str__(self) -> str:
        tail = f": {self.detail}" if self.detail else ""
        return f"vCPU {self.vcpu}: {self.reason}{tail}"


class GuestTimeout(GuestError):
    """A guest did not end within its time-out."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"guest still running after {self.seconds:g} s"


class LabError(KvmHostError):
    """An emulated host of the lab ended, or hangs, before its command has ended.

    :param host: name of the host
    :param problem: what happened
    :param evidence: the line of its console, or of QEMU, that says most about it
    """

    def __init__(self, host: str, problem: str, evidence: str = "") -> None:
        super().__init__(host, problem, evidence)
        self.host, self.problem, self.evidence = host, problem, evidence

    def __str__(self) -> str:
        evidence = f": {self.evidence}" if self.evidence else ""
        return f"lab host {self.host}: {self.problem}{evidence}"


class LabTimeout(LabError):
    """The command in an emulated host did not end within its time-out."""

    def __init__(self, host: str, seconds: float, evidence: str = "") -> None:
        LabError.__init__(self, host, f"not done after {seconds:g} s", evidence)
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.host, self.seconds, self.evidence))


#: Errors that cross a control socket, by the name that the reply gives as ``kind``.
BY_KIND: Mapping[str, type[KvmHostError]] = {
    kind.__name__: kind
    for kind in (
        CapabilityError,
        GuestError,
        GuestTimeout,
        HostError,
        ImageError,
        IoctlError,
        LayoutError,
        LostPageError,
        PagerError,
        PauseTimeout,
        InUseError,
        StateError,
        UnexpectedExit,
    )
}

#: Constructor arguments in order, by kind: the attributes that hold them.
_FIELDS = {
    "CapabilityError": ("name", "needed", "found", "remedy"),
    "GuestTimeout": ("seconds",),
    "HostError": ("what", "errno", "remedy"),
    "ImageError": ("file", "field", "problem", "offset"),
    "IoctlError": ("request", "errno", "arguments"),
    "LayoutError": ("problem",),
    "LostPageError": ("gfns", "reason"),
    "PauseTimeout": ("vcpus", "seconds"),
    "InUseError": ("what", "state", "remedy"),
    "StateError": ("what", "state", "remedy"),
    "UnexpectedExit": ("vcpu", "reason", "detail"),
}


def fields_of(error: KvmHostError) -> tuple[str, list[Any]]:
    """Return kind and constructor arguments of an error, for :func:`from_fields`.

    :return: of the nearest class in :data:`BY_KIND`; an empty kind if there is none
    """
    for base in type(error).__mro__:
        if BY_KIND.get(base.__name__) is base:
            names = _FIELDS.get(base.__name__)
            values = [str(error)] if names is None else [getattr(error, name) for name in names]
            return base.__name__, values
    return "", []


def from_fields(kind: str, values: list[Any], field: str = "") -> KvmHostError | None:
    """Make an error from what :func:`fields_of` returned; None if that is not possible.

    :param field: the argument that was wrong, of a ``LayoutError``
    """
    if kind not in BY_KIND or len(values) != len(_FIELDS.get(kind, ("problem",))):
        return None
    try:
        made = BY_KIND[kind](*values)
        str(made)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None  # from a server that uses the name differently
    if isinstance(made, LayoutError):
        made.field = field
    return made


def _show(value: Any) -> str:
    return hex(value) if isinstance(value, int) and not isinstance(value, bool) else str(value)
