"""Paths of the control sockets, and the locks on VM names.

Each VM has ``NAME.sock`` and ``NAME.lock`` in the runtime directory. The lock is
an flock(2) that the kernel releases when the VM's process ends for any reason; so a
socket whose lock is free is stale, and the next VM of that name removes it.

The directory is opened once and used by its descriptor: if its path later leads elsewhere,
nothing outside of the directory is removed or followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from kvmhost.errors import CapabilityError, LayoutError, NameInUseError
from kvmhost.files import is_locked
from kvmhost.ownership import check_own_file, open_folder, open_private_folder, same_file

__all__ = [
    "RUNTIME_DIR_ENV",
    "NameLock",
    "check_name",
    "files_in",
    "is_name",
    "lock_path",
    "open_runtime_dir",
    "running_names",
    "runtime_dir",
    "socket_path",
    "to_socket_path",
]

RUNTIME_DIR_ENV = "KVMHOST_RUNTIME_DIR"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
#: sizeof(sun_path) without the final NUL; unix(7).
_MAX_PATH_BYTES = 107


def runtime_dir() -> Path:
    """Return the directory of sockets and locks, made with mode 0700 if it is not there.

    ``$KVMHOST_RUNTIME_DIR``, else the user's runtime directory (as the XDG base
    directory specification has it), else ``kvmhost-UID`` in the directory for
    temporary files.

    :raises CapabilityError: if another user can change its contents or those of a
        parent directory
    """
    path = _chosen_dir()
    try:
        _make(path)
        os.close(open_private_folder(path))
    except LayoutError as error:
        raise _unusable(path, str(error)) from error
    except OSError as error:
        raise _unusable(path, f"{path}: {error.strerror}") from error
    return path


@contextlib.contextmanager
def open_runtime_dir() -> Iterator[int]:
    """Open the directory of :func:`runtime_dir`.

    :return: its descriptor (``O_PATH``), open in the body
    :raises CapabilityError: as :func:`runtime_dir`
    """
    folder = _open_private(runtime_dir())
    try:
        yield folder
    finally:
        os.close(folder)


def files_in(folder: int, pattern: re.Pattern[str]) -> list[str]:
    """Return the names in an open directory that match as a whole, sorted."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        with os.scandir(fd) as entries:
            return sorted(entry.name for entry in entries if pattern.fullmatch(entry.name))
    finally:
        os.close(fd)


def is_name(name: str) -> bool:
    """Whether a VM may have that name, see :func:`check_name`."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return a VM's name unchanged.

    :raises LayoutError: unless it is 1 to 64 letters, digits, ``_``, ``.`` or ``-``,
        and starts with a letter or digit
    """
    if not is_name(name):
        raise LayoutError(
            f"name {name!r}: need 1 to 64 letters, digits, '_', '.' or '-', "
            "with a letter or digit first"
        )
    return name


def socket_path(name: str) -> Path:
    """Return the socket of the VM of that name.

    :raises LayoutError: for a bad name, or a path too long for a unix socket
    """
    path = runtime_dir() / f"{check_name(name)}.sock"
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise LayoutError(
            f"socket path {path} is longer than {_MAX_PATH_BYTES} bytes; "
            f"take a shorter name or another ${RUNTIME_DIR_ENV}"
        )
    return path


def lock_path(name: str) -> Path:
    """Return the lock file of the VM of that name."""
    return runtime_dir() / f"{check_name(name)}.lock"


def to_socket_path(name_or_path: str | Path) -> Path:
    """Return the socket that a user means: with a slash it is a path, else a name.

    :raises LayoutError: for a bad name
    """
    if isinstance(name_or_path, Path) or "/" in name_or_path:
        return Path(name_or_path)
    return socket_path(name_or_path)


def running_names() -> list[str]:
    """Return the names of the VMs that hold their lock now, sorted.

    Other services have their files there too, under names that no VM can have.
    """
    with open_runtime_dir() as folder:
        locks = files_in(folder, re.compile(rf"{_NAME.pattern}\.lock"))
        return [lock.removesuffix(".lock") for lock in locks if _is_held(lock, folder)]


class NameLock:
    """Holds a VM's name until :meth:`release` or the end of the process.

    :param path: the lock file, for a holder that is not a VM
    :ivar folder: descriptor of its directory, while the name is held
    :raises NameInUseError: if another process holds it
    :raises LayoutError: for a bad name, or a lock file that is not this user's alone
    :raises CapabilityError: if its directory is not this user's alone
    """

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name, self.path = name, path or lock_path(name)
        self._fd = self.folder = -1
        try:
            self.folder = _open_private(self.path.parent)
            # A holder removes its lock file on release; a lock on a removed file does not count.
            while self._fd < 0 or not same_file(self._fd, self.path.name, self.folder):
                self._close_file()
                self._fd = _lock(self.path, self.folder, name)
        except BaseException:
            self._close()
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    @property
    def held(self) -> bool:
        """Whether the name is held."""
        return self._fd >= 0

    def release(self) -> None:
        """Release the name and remove the lock file. Idempotent."""
        if self._fd >= 0 and same_file(self._fd, self.path.name, self.folder):
            self.remove(self.path.name)
        self._close()

    def remove(self, name: str) -> None:
        """Remove a file beside the lock, if it is there; links are not followed."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.folder)

    def _close_file(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _close(self) -> None:
        self._close_file()
        if self.folder >= 0:
            fd, self.folder = self.folder, -1
            os.close(fd)

    def __enter__(self) -> NameLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _chosen_dir() -> Path:
    given = os.environ.get(RUNTIME_DIR_ENV)
    if given:
        return Path(given)
    # What systemd sets the variable to; a plain su or cron has the folder without it.
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if base != tempfile.gettempdir() and os.access(base, os.W_OK | os.X_OK):
        return Path(base) / "kvmhost"
    return Path(tempfile.gettempdir()) / f"kvmhost-{os.geteuid()}"


def _make(path: Path) -> None:
    """Make a directory with mode 0700, and those above it for an explicit one."""
    if path.is_dir():
        return
    if RUNTIME_DIR_ENV in os.environ and not path.parent.exists():
        _make(path.parent)
    # The parent is opened by the rules for private ones: no link of another user, and no
    # directory that another user can exchange, so that nothing is made elsewhere.
    parent = open_folder(path.parent, private=True)
    try:
        os.mkdir(path.name, 0o700, dir_fd=parent)
    except FileExistsError:
        pass  # Created concurrently, or not a directory: opening it reports that.
    finally:
        os.close(parent)


def _open_private(path: Path) -> int:
    try:
        return open_private_folder(path)
    except LayoutError as error:
        raise _unusable(path, str(error)) from error
    except OSError as error:
        raise _unusable(path, f"{path}: {error.strerror}") from error


def _unusable(path: Path, found: str) -> CapabilityError:
    return CapabilityError(
        "runtime directory",
        f"{path} of uid {os.geteuid()} that nobody else can change",
        found,
        f"set {RUNTIME_DIR_ENV} to a directory of your own",
    )


def _lock(path: Path, folder: int, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path.name, flags, 0o600, dir_fd=folder)
    try:
        check_own_file(path, os.fstat(fd), readable=True)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NameInUseError(name, _closing_pid(fd)) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _closing_pid(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    os.close(fd)
    return int(text) if text.isdigit() else 0


def _is_held(lock: str, folder: int) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return False
    try:
        return is_locked(fd)
    finally:
        os.close(fd)
