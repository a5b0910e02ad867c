"""The file of a store: made for one VM, never written over if it is anything else."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from kvmhost.errors import LayoutError

__all__ = ["HEADER_BYTES", "StoreFile"]

#: What is before the first slot; see ``FILE_HEADER_BYTES`` in ``slab.c``.
HEADER_BYTES = 4096
_MAGIC = b"kvmhost store of evicted pages\n"


class StoreFile:
    """An open, locked, empty store file; it goes away with :meth:`close`.

    The pages of a VM that is gone are of no use to anybody: a store file that no
    process holds is begun anew. Any other file that is there already is left alone.

    :raises LayoutError: if the file cannot be made, is held, or is something else
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _open(path)
        try:
            _take(self.fd, path)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Remove the file. Idempotent."""
        if self.fd < 0:
            return
        self.path.unlink(missing_ok=True)
        os.close(self.fd)
        self.fd = -1


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise LayoutError(f"store file {path}: {error.strerror}") from error


def _take(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise LayoutError(f"store file {path}: not a regular file")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        raise LayoutError(f"store file {path}: another VM uses it") from error
    if status.st_size and os.pread(fd, len(_MAGIC), 0) != _MAGIC:
        raise LayoutError(f"store file {path}: exists and is no store; take another name")
    try:
        os.ftruncate(fd, 0)
        header = _MAGIC + f"process {os.getpid()}\n".encode()
        if os.pwrite(fd, header, 0) != len(header):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise LayoutError(f"store file {path}: {error.strerror}") from error
