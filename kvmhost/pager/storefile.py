"""The file of a store: created for one VM, private to its user, never reused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.ownership import check_own_file, locate, same_file

__all__ = ["HEADER_BYTES", "StoreFile"]

#: Size of the header before the first slot; see ``FILE_HEADER_BYTES`` in ``slab.c``.
HEADER_BYTES = 4096
_MAGIC = b"kvmhost store of evicted pages\n"
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class StoreFile:
    """An open, locked, empty store file with mode 0600; :meth:`close` removes it.

    The file is created here, so that no other process has it open. A stale file of
    a killed VM of this user is removed first; any other file of that name is refused and
    not changed: another process could have another user's file open.

    :raises LayoutError: if the file cannot be created, is in use, or something else has
        its name
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = self._folder = -1
        try:
            with _store_errors(path):
                self._folder, self._name, _, _ = locate(path, follow_last=False)
                self._remove_leftover()
                self._create()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file. Idempotent."""
        if self.fd >= 0 and same_file(self.fd, self._name, self._folder):
            os.unlink(self._name, dir_fd=self._folder)
        fds, self.fd, self._folder = (self.fd, self._folder), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _remove_leftover(self) -> None:
        try:
            fd = os.open(self._name, _FLAGS, dir_fd=self._folder)
        except FileNotFoundError:
            return
        try:
            status = os.fstat(fd)
            check_own_file(self.path, status)
            self._take_lock(fd)
            if status.st_size and os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                raise LayoutError(f"{self.path}: exists and is not a store; take another name")
            if same_file(fd, self._name, self._folder):
                os.unlink(self._name, dir_fd=self._folder)
        finally:
            os.close(fd)

    def _create(self) -> None:
        flags = _FLAGS | os.O_CREAT | os.O_EXCL
        self.fd = os.open(self._name, flags, 0o600, dir_fd=self._folder)
        # The umask may have cleared more bits.
        os.fchmod(self.fd, 0o600)
        self._take_lock(self.fd)
        header = _MAGIC + f"process {os.getpid()}\n".encode()
        if os.pwrite(self.fd, header, 0) != len(header):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _take_lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LayoutError(f"{self.path}: another VM uses it") from None


@contextlib.contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except LayoutError as error:
        raise LayoutError(f"store file {error}") from None
    except OSError as error:
        raise LayoutError(f"store file {path}: {error.strerror}") from error
