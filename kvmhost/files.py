"""File access: atomic writes, and reads of regular files of bounded size.

The files contain guest data: memory contents or access times. New files have mode 0600 by
default, paths are resolved by :mod:`kvmhost.ownership`, and files of other users are not
written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import stat
import typing
from collections.abc import Iterator
from pathlib import Path

from kvmhost.errors import HostError, LayoutError
from kvmhost.ownership import (
    Located,
    check_own_file,
    is_trusted,
    locate,
    open_folder,
    why_not_private,
)

__all__ = [
    "PRIVATE",
    "TEMPORARY",
    "NamelessFile",
    "check_target",
    "is_locked",
    "new_directory",
    "open_log",
    "open_regular",
    "os_errors",
    "own_directory",
    "read_regular",
    "replacing",
    "write_file",
]

#: Prefix of the name of a file or directory until it is complete.
TEMPORARY = ".tmp-"
#: Mode of files with guest memory, young bitmaps, or plots of them.
PRIVATE = 0o600


@contextlib.contextmanager
def replacing(
    path: Path, *, sync: bool = True, mode: int = PRIVATE, follow_last: bool = True
) -> Iterator[typing.IO[bytes]]:
    """Write a file through a temporary one beside it and a rename.

    A reader sees the old contents or the new ones. If anything fails, the temporary file
    is removed and ``path`` is unchanged. A symbolic link of this user or root is
    kept, and its target is replaced. A device or a pipe is written in place: a rename would
    remove it. A file of this user keeps its mode.

    :param sync: also flush the contents to disk before the rename
    :param mode: of a new file, before the umask
    :param follow_last: else a link at ``path`` itself is replaced
    :raises HostError: if the system refuses to create, write or rename the file
    :raises LayoutError: for a link of another user on the way, or another user's pipe
    """
    with os_errors(path), _located(path, follow_last) as place:
        folder, name, there, _ = place
        if _is_special(place):
            with os.fdopen(_open_special(path, place), "wb", buffering=0) as special:
                yield typing.cast("typing.IO[bytes]", special)
            return
        fd, partial = _open_beside(folder, mode)
        try:
            with os.fdopen(fd, "wb") as file:
                yield file
                file.flush()
                if there is not None and _is_own_file(there):
                    os.fchmod(fd, stat.S_IMODE(there.st_mode))
                if sync:
                    os.fsync(fd)
            os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=folder)
            raise
        if sync:
            _sync(folder)


def write_file(
    path: Path, raw: bytes, *, sync: bool = True, mode: int = PRIVATE, follow_last: bool = True
) -> None:
    """Write a file atomically; see :func:`replacing`."""
    with replacing(path, sync=sync, mode=mode, follow_last=follow_last) as file:
        file.write(raw)


def open_log(path: Path, *, keep: bool, follow_last: bool = False) -> int:
    """Open a file that is written incrementally while others may read it.

    :param keep: append to its contents; else it is truncated
    :param follow_last: follow a link of this user or root in the last component
    :return: a descriptor for writing, in append mode
    :raises HostError: if the system refuses
    :raises LayoutError: if it is a link, belongs to another user, or is writable by others
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
    with os_errors(path), _located(path, follow_last) as place:
        folder, name, there, _ = place
        if there is None:
            created = flags | os.O_CREAT | os.O_EXCL
            return os.open(name, created, PRIVATE, dir_fd=folder)
        if _is_special(place):
            return _open_special(path, place)
        if stat.S_ISLNK(there.st_mode):
            raise LayoutError(f"{path}: is a symbolic link, which is not followed here")
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        try:
            check_own_file(path, os.fstat(fd), readable=True)
            if not keep:
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        return fd


class NamelessFile:
    """A file without a name until it is complete, so that a crash leaves no partial file.

    For files with guest memory: mode 0600, and no link is followed. On a file system
    without O_TMPFILE it has a temporary name meanwhile.

    :raises HostError: if the system refuses
    :raises LayoutError: if an existing file at ``path`` is not a regular file
    """

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, path.name
        self._hidden: str | None = None
        self.fd = self._folder = -1
        try:
            with os_errors(path):
                self._folder = open_folder(path.parent)
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
        """Flush the file to disk and give it its name, replacing an existing file.

        :raises HostError: if it cannot be written or named
        """
        with os_errors(self._path):
            os.fsync(self.fd)
            folder = self._folder
            if self._hidden is None:
                hidden = f"{TEMPORARY}{os.urandom(6).hex()}"
                # A temporary name first: linkat(2) cannot replace an existing file.
                os.link(f"/proc/self/fd/{self.fd}", hidden, dst_dir_fd=folder)
                self._hidden = hidden
            os.replace(self._hidden, self._name, src_dir_fd=folder, dst_dir_fd=folder)
            self._hidden = None
            _sync(folder)

    def close(self) -> None:
        """Close the file; without :meth:`commit` it is discarded. Idempotent."""
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

    It has mode 0700.

    :raises HostError: if the system refuses, or something is at ``path`` already
    :raises LayoutError: for a link of another user on the way
    """
    with os_errors(path), _located(path, follow_last=False) as place:
        folder, name, there, _ = place
        if there is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        partial = path.with_name(f"{TEMPORARY}{os.urandom(6).hex()}")
        os.mkdir(partial.name, 0o700, dir_fd=folder)
        try:
            yield partial
            os.rename(partial.name, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            import shutil

            with contextlib.suppress(OSError):
                shutil.rmtree(partial.name, dir_fd=folder)
            raise


def is_locked(fd: int) -> bool:
    """Return whether another open file description holds an exclusive flock(2) on a file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


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
            raise OSError(errno.EINVAL, "not a regular file", str(path))
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
        raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", str(path))
    return raw


def _read_up_to(file: io.FileIO, most_bytes: int) -> bytes:
    # In pieces where fstat(2) does not report the size, as for files of procfs.
    step = min(max(os.fstat(file.fileno()).st_size + 1, 1 << 16), 1 << 24)
    parts, left = [], most_bytes
    while left and (part := file.read(min(left, step))):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def own_directory(path: Path) -> None:
    """Create a directory with mode 0700, or check that an existing one is private.

    :raises HostError: if it cannot be made
    :raises LayoutError: if it is a link, another user's, or others can write to it
    """
    with os_errors(path), _located(path, follow_last=False) as place:
        folder, name, there, _ = place
        if there is None:
            os.mkdir(name, 0o700, dir_fd=folder)
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
        problem = "is not a directory" if not stat.S_ISDIR(there.st_mode) else ""
        problem = problem or why_not_private(there)
        if problem:
            raise LayoutError(f"{path}: {problem}")


def check_target(path: Path) -> None:
    """Check that a file can be written at a path, before any work is done for it.

    :raises HostError: if it is a directory, or its directory is missing or read-only
    :raises LayoutError: as :func:`replacing`
    """
    with os_errors(path), _located(path, follow_last=True) as place:
        if _is_special(place):
            _check_special(path, place)
            return
        fd, partial = _open_beside(place.folder, PRIVATE)
        os.close(fd)
        os.unlink(partial, dir_fd=place.folder)


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


@contextlib.contextmanager
def _located(path: Path, follow_last: bool) -> Iterator[Located]:
    """Resolve a path; close its folder at the end of the context."""
    place = locate(path, follow_last=follow_last)
    try:
        yield place
    finally:
        os.close(place.folder)


def _is_own_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _is_special(place: Located) -> bool:
    """Whether the file is written in place: a device, a pipe, an open descriptor.

    :raises IsADirectoryError: if it is a directory
    """
    if place.status is None:
        return False
    kind = stat.S_IFMT(place.status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return place.by_kernel or kind not in (stat.S_IFREG, stat.S_IFLNK)


def _check_special(path: Path, place: Located) -> None:
    """Refuse a pipe of another user, who could read the data.

    A descriptor of this process is accepted: its caller provided it.
    """
    assert place.status is not None
    uid = place.status.st_uid
    if stat.S_ISFIFO(place.status.st_mode) and not place.by_kernel and not is_trusted(uid):
        raise LayoutError(f"{path}: is a pipe of uid {uid}; take another name")


def _open_special(path: Path, place: Located) -> int:
    _check_special(path, place)
    nofollow = 0 if place.by_kernel else os.O_NOFOLLOW
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | nofollow
    return os.open(place.name, flags, dir_fd=place.folder)


def _open_beside(folder: int, mode: int) -> tuple[int, str]:
    """Create a hidden temporary file in a folder."""
    partial = f"{TEMPORARY}{os.urandom(6).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(partial, flags, mode, dir_fd=folder), partial


def _sync(folder: int) -> None:
    """Flush the names in a folder to disk, if its file system supports that."""
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except PermissionError:
        return  # A folder with write but not read permission.
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(fd)
