"""Paths of daemon sockets: in the directory of the VM sockets, with names that VMs cannot have.

The default name of a daemon is ``pid-N``. As for VMs, the process holds a lock while it
runs, which distinguishes a socket in use from a stale one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvmhost.control.paths import (
    NameLock,
    check_name,
    files_in,
    open_runtime_dir,
    runtime_dir,
)
from kvmhost.errors import LayoutError, NameInUseError

__all__ = ["daemon_names", "lock_daemon", "socket_of", "sweep"]

_PREFIX = "_reclaimd."
#: sizeof(sun_path) without the final NUL; unix(7).
_MAX_PATH_BYTES = 107


def socket_of(name: str) -> Path:
    """Return the path of the socket of the daemon with that name.

    :raises LayoutError: for a bad name, or a path too long for a unix socket
    """
    path = runtime_dir() / f"{_PREFIX}{check_name(name)}.sock"
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise LayoutError(f"socket path {path} is longer than {_MAX_PATH_BYTES} bytes")
    return path


def lock_daemon(name: str) -> NameLock:
    """Lock a daemon's name.

    :raises NameInUseError: if a daemon with that name is already running
    """
    return NameLock(name, socket_of(name).with_suffix(".lock"))


def daemon_names() -> list[str]:
    """Return the names of the daemons whose sockets exist, sorted; some sockets may be stale."""
    with open_runtime_dir() as folder:
        found = files_in(folder, re.compile(rf"{re.escape(_PREFIX)}.*\.sock"))
    return [name.removeprefix(_PREFIX).removesuffix(".sock") for name in found]


def sweep() -> None:
    """Remove the files that killed daemons left behind."""
    directory = runtime_dir()
    with open_runtime_dir() as folder:
        locks = files_in(folder, re.compile(rf"{re.escape(_PREFIX)}.*\.lock"))
    for lock in locks:
        try:
            held = NameLock(lock.removesuffix(".lock"), directory / lock)
        except NameInUseError:
            continue
        held.remove(f"{held.name}.sock")
        held.release()
