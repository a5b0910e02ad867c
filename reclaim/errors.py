"""The exceptions of reclaim.

::

    ReclaimError (a KvmHostError)
    ├─ KernelFileError (also OSError): interface, value written
    ├─ RecordError (also ValueError): a record or an imported file is damaged; file, field, offset
    └─ ConfigError (also ValueError): file, line, key

Each survives pickling. What a host lacks is a
:class:`kvmhost.errors.CapabilityError`, as everywhere in the project.
"""

from __future__ import annotations

import os
from typing import Any

from kvmhost.errors import KvmHostError

__all__ = ["ConfigError", "KernelFileError", "ReclaimError", "RecordError"]


class ReclaimError(KvmHostError):
    """Base of everything that reclaim raises on purpose."""


class KernelFileError(ReclaimError, OSError):
    """A kernel file or directory could not be read, written, made or removed.

    :param interface: its path
    :param errno_: positive errno
    :param value: what was written; None for anything but a write
    """

    def __init__(self, interface: str, errno_: int, value: str | None = None) -> None:
        self.interface, self.value = interface, value
        OSError.__init__(self, errno_, os.strerror(errno_))

    def __str__(self) -> str:
        action = "" if self.value is None else f" (writing {self.value!r})"
        return f"{self.interface}{action}: {self.strerror}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.interface, self.errno, self.value))


class RecordError(ReclaimError, ValueError):
    """A record, or a file to import, is damaged or is none; nothing of it was used.

    :param file: path of the file; for a record the one inside it
    :param field: the part that is wrong
    :param problem: what is wrong with it
    :param offset: byte offset in the file, where one is known
    """

    def __init__(self, file: str, field: str, problem: str, offset: int | None = None) -> None:
        super().__init__(file, field, problem, offset)
        self.file, self.field, self.problem, self.offset = file, field, problem, offset

    def __str__(self) -> str:
        where = f" at offset {self.offset:#x}" if self.offset is not None else ""
        return f"{self.file}: {self.field}{where}: {self.problem}"


class ConfigError(ReclaimError, ValueError):
    """A configuration cannot be used.

    :param file: its path; ``flags`` for what came on a command line
    :param line: from 1 on; 0 where no single line is to blame
    :param key: as ``daemon.interval``; empty for the whole file
    """

    def __init__(self, file: str, line: int, key: str, problem: str) -> None:
        super().__init__(file, line, key, problem)
        self.file, self.line, self.key, self.problem = file, line, key, problem

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.key}: {self.problem}" if self.key else f"{where}: {self.problem}"
