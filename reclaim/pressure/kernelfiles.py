"""The only access of reclaim to kernel files.

Every path is relative to a root, so that tests can use a directory instead.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvmhost.files import read_regular
from kvmhost.reclaim.errors import KernelFileError

__all__ = ["KernelFiles"]

#: Kernel files that are read here have a size of some kilobytes.
_MAX_BYTES = 16 << 20


class KernelFiles:
    """Files below a root; every failure is a :class:`~kvmhost.reclaim.errors.KernelFileError`.

    :param root: directory used as ``/``
    """

    def __init__(self, root: Path | str = "/") -> None:
        self.root = Path(root)

    def read(self, path: str) -> str:
        """Return a file's text.

        :raises KernelFileError: if it cannot be read, or is not a regular file
        """
        try:
            return read_regular(self._at(path), _MAX_BYTES).decode("utf-8", "replace")
        except OSError as error:
            raise KernelFileError(path, error.errno or 0) from error

    def write(self, path: str, value: str) -> None:
        """Write a value in one system call, as control files require."""
        try:
            fd = os.open(self._at(path), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise KernelFileError(path, error.errno or 0, value) from error

    def exists(self, path: str) -> bool:
        """Return whether a path exists."""
        return self._at(path).exists()

    def mkdir(self, path: str) -> None:
        """Create one directory."""
        try:
            self._at(path).mkdir()
        except OSError as error:
            raise KernelFileError(path, error.errno or 0) from error

    def rmdir(self, path: str) -> None:
        """Remove a directory; control files of a cgroup do not prevent this."""
        try:
            self._at(path).rmdir()
        except OSError as error:
            raise KernelFileError(path, error.errno or 0) from error

    def _at(self, path: str) -> Path:
        return self.root / path.lstrip("/")
