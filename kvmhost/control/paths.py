"""Where the control sockets are, and who holds a VM's name.

Each VM has ``NAME.sock`` and ``NAME.lock`` in the runtime directory. The lock is
an flock(2) that lives as long as the VM's process does, however that ends; so a
socket whose lock is free is a leftover, and is removed by the next VM of the name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path
from types import TracebackType

from kvmhost.errors import CapabilityError, LayoutError, NameInUseError

__all__ = [
    "RUNTIME_DIR_ENV",
    "NameLock",
    "check_name",
    "lock_path",
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

    :raises CapabilityError: if it belongs to someone else, or others may write in it
    """
    path = _chosen_dir()
    try:
        path.mkdir(mode=0o700, parents=RUNTIME_DIR_ENV in os.environ, exist_ok=True)
        status = path.stat() if RUNTIME_DIR_ENV in os.environ else path.lstat()
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    if not stat.S_ISDIR(status.st_mode):
        raise _unusable(path, "no directory")
    if status.st_uid != os.geteuid():
        raise _unusable(path, f"one that belongs to uid {status.st_uid}")
    if status.st_mode & 0o022:
        raise _unusable(path, f"mode {stat.S_IMODE(status.st_mode):o}")
    return path


def check_name(name: str) -> str:
    """Return a VM's name as it is.

    :raises LayoutError: unless it is 1 to 64 letters, digits, ``_``, ``.`` or ``-``,
        and starts with a letter or digit
    """
    if not _NAME.fullmatch(name):
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
    locks = [path for path in runtime_dir().glob("*.lock") if _NAME.fullmatch(path.stem)]
    return sorted(path.stem for path in locks if _is_held(path))


class NameLock:
    """Holds a VM's name until :meth:`release` or the end of the process.

    :param path: the lock file, for what is no VM
    :raises NameInUseError: if another process holds it
    :raises LayoutError: for a bad name
    """

    def __init__(self, name: str, path: Path | None = None) -> None:
        self.name, self.path = name, path or lock_path(name)
        self._fd = -1
        # A holder removes its lock file at the end; a lock on a removed file is none.
        while self._fd < 0 or not _is_same_file(self._fd, self.path):
            self.release()
            self._fd = _lock(self.path, name)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    @property
    def held(self) -> bool:
        """Whether the name is held."""
        return self._fd >= 0

    def release(self) -> None:
        """Give the name back and remove the lock file. Idempotent."""
        if self._fd < 0:
            return
        if _is_same_file(self._fd, self.path):
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

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


def _unusable(path: Path, found: str) -> CapabilityError:
    return CapabilityError(
        "runtime directory",
        f"{path} of uid {os.geteuid()} that others cannot write to",
        found,
        f"set {RUNTIME_DIR_ENV} to a directory of your own",
    )


def _lock(path: Path, name: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
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


def _is_same_file(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.lstat())
    return False


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
