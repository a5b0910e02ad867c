"""Files: written whole or not at all, read only where they are regular and bounded."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import typing
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import HostError, LayoutError

__all__ = [
    "TEMPORARY",
    "NamelessFile",
    "check_target",
    "new_directory",
    "open_regular",
    "os_errors",
    "read_regular",
    "replacing",
    "sync_directory",
    "write_file",
]

#: What the name of a file or directory begins with until it is whole.
TEMPORARY = ".tmp-"


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[typing.IO[bytes]]:
    """Write a file through a temporary one beside it and a rename.

    A reader sees the old contents or the new ones. If anything fails, the temporary file
    is removed and what was at ``path`` stays. A symbolic link stays a link, its target is
    replaced. A device or a pipe is written in place: a rename would remove it.

    :param sync: also have the contents on the disk before the rename
    :raises HostError: if the system refuses to create, write or rename the file
    """
    with os_errors(path):
        target = path.resolve()
        if _is_special(target):
            with target.open("wb", buffering=0) as file:
                yield typing.cast("typing.IO[bytes]", file)
            return
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        fd, partial = _open_beside(target)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                if target.exists():
                    os.fchmod(fd, stat.S_IMODE(target.stat().st_mode))
                if sync:
                    os.fsync(fd)
            partial.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if sync:
            sync_directory(target.parent)


def write_file(path: Path, raw: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all; see :func:`replacing`."""
    with replacing(path, sync=sync) as file:
        file.write(raw)


class NamelessFile:
    """A file without a name until it is complete: whatever ends the process, it is gone.

    For what holds guest memory: mode 0600, and no link is followed. Where the file system
    has no O_TMPFILE it has a temporary name meanwhile.

    :raises HostError: if the system refuses
    :raises LayoutError: if what is at ``path`` already is not a regular file
    """

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, path.name
        self._hidden: str | None = None
        self.fd = self._folder = -1
        try:
            with os_errors(path):
                self._folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                self._refuse_special()
                self.fd = self._open()
        except BaseException:
            self.close()
            raise

    def _refuse_special(self) -> None:
        try:
            there = os.lstat(self._name, dir_fd=self._folder)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(there.st_mode):
            raise LayoutError(f"{self._path}: exists and is not a regular file")

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=self._folder)
        except OSError as error:
            # EISDIR comes from kernels that do not know the flag.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.EISDIR):
                raise
        self._hidden = f"{TEMPORARY}{os.urandom(6).hex()}"
        return os.open(self._hidden, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._folder)

    def commit(self) -> None:
        """Bring it to the disk and give it its name, in the place of what has that now.

        :raises HostError: if it cannot be written or named
        """
        with os_errors(self._path):
            os.fsync(self.fd)
            folder = self._folder
            if self._hidden is None:
                hidden = f"{TEMPORARY}{os.urandom(6).hex()}"
                # A name of its own first: a link cannot take the place of another file.
                os.link(f"/proc/self/fd/{self.fd}", hidden, dst_dir_fd=folder)
                self._hidden = hidden
            os.replace(self._hidden, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            self._hidden = None
            sync_directory(self._path.parent)

    def close(self) -> None:
        """Close it; without :meth:`commit` nothing is left. Idempotent."""
        if self._hidden is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._hidden, dir_fd=self._folder)
            self._hidden = None
        for fd in (self.fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self.fd = self._folder = -1


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory under a temporary name beside it and rename it; nothing is replaced.

    :raises HostError: if the system refuses, or something is at ``path`` already
    """
    with os_errors(path):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        partial = path.with_name(f"{TEMPORARY}{os.urandom(6).hex()}")
        partial.mkdir()
        try:
            yield partial
            partial.rename(path)
        except BaseException:
            import shutil

            shutil.rmtree(partial, ignore_errors=True)
            raise


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its descriptor.

    A FIFO in its place does not make the caller wait, and a device is not read.

    :raises OSError: if it cannot be opened; ``EINVAL`` if it is not a regular file
    """
    # O_NONBLOCK: opening a FIFO for reading returns at once; regular files ignore it.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_regular(path: str | Path, most_bytes: int) -> bytes:
    """Read a whole regular file.

    :raises OSError: as :func:`open_regular`; ``EFBIG`` if it has more than ``most_bytes``,
        before anything of it is read
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        raw = b"" if size > most_bytes else _read_up_to(file, most_bytes + 1)
    if size > most_bytes or len(raw) > most_bytes:
        raise OSError(errno.EFBIG, f"Larger than {most_bytes} bytes", str(path))
    return raw


def _read_up_to(file: io.FileIO, most_bytes: int) -> bytes:
    parts, left = [], most_bytes
    while left and (part := file.read(min(left, 1 << 24))):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def check_target(path: Path) -> None:
    """Refuse a place where no file can be written, before any work is done for it.

    :raises HostError: if it is a directory, or its directory is missing or read-only
    """
    with os_errors(path):
        target = path.resolve()
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_special(target):
            return
        fd, partial = _open_beside(target)
        os.close(fd)
        partial.unlink()


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk, where its file system can do that."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def os_errors(what: object) -> Iterator[None]:
    """Turn an :class:`OSError` into a :class:`HostError` that names ``what``.

    Errors of kvmhost's own that are also an ``OSError`` pass unchanged.
    """
    try:
        yield
    except HostError:
        raise
    except OSError as error:
        if type(error).__module__ != "builtins" or error.errno is None:
            raise
        raise HostError(str(what), error.errno) from error


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _open_beside(target: Path) -> tuple[int, Path]:
    """Create a hidden temporary file in the target's directory, with the umask's mode."""
    partial = target.with_name(f"{TEMPORARY}{os.urandom(6).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(partial, flags, 0o666), partial
