"""Finds the VMs that run on this host, of this user or of all, and asks each for its state.

Each user's sockets are in a runtime directory of their own (:mod:`kvmhost.control.paths`).
Root finds those of other users where they are by default; a directory that another user chose
with ``$KVMHOST_RUNTIME_DIR`` is known to that user alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from kvmhost.control import schema
from kvmhost.control.client import Client
from kvmhost.control.paths import files_in, is_name, running_names, runtime_dir, socket_path
from kvmhost.errors import KvmHostError, VmGoneError

__all__ = ["ListedVm", "VmSocket", "ask_all", "find_sockets", "is_listening"]

_USER_FOLDER = re.compile(r"kvmhost-([0-9]{1,10})")
_UID = re.compile(r"[0-9]{1,10}")
_SOCKET = re.compile(r".+\.sock")
#: VMs that are asked at a time.
_N_ASKED = 16
#: Most VMs of other users that are asked; a user can create any number of sockets.
_MAX_OTHERS = 1024


class ListedVm(msgspec.Struct, frozen=True):
    """One VM that runs.

    :ivar vm: what other commands take: its name, or the path of its socket if it is another
        user's
    :ivar uid: user id of the owner of its runtime directory
    :ivar socket: path of its control socket
    :ivar state, counters: what it answered; None if it did not
    :ivar problem: why there is no answer; else empty
    """

    vm: str
    uid: int
    socket: str
    state: schema.VmState | None = None
    counters: schema.Counters | None = None
    problem: str = ""


class VmSocket(msgspec.Struct, frozen=True):
    """Where a VM may answer; the fields are those of :class:`ListedVm`."""

    vm: str
    uid: int
    path: Path


def find_sockets(*, everyone: bool = False) -> list[VmSocket]:
    """Return the sockets of VMs, this user's first, each user's by name.

    :param everyone: those of other users too, as far as this process may read their
        directories; without privilege there are none
    """
    uid = os.geteuid()
    found = [VmSocket(name, uid, socket_path(name)) for name in running_names()]
    return found + (_others(uid) if everyone else [])


def ask_all(found: Sequence[VmSocket], *, timeout_s: float) -> list[ListedVm]:
    """Ask every VM for its state, several at a time.

    A VM that ended meanwhile is left out. One that does not answer, or refuses, is listed
    with the reason.

    :param timeout_s: how long one VM may take to answer
    """
    if not found:
        return []
    with ThreadPoolExecutor(min(_N_ASKED, len(found))) as pool:
        answers = pool.map(lambda one: _ask(one, timeout_s), found)
    return [answer for answer in answers if answer is not None]


def _ask(one: VmSocket, timeout_s: float) -> ListedVm | None:
    try:
        with Client(one.path, timeout_s=timeout_s) as client:
            return ListedVm(one.vm, one.uid, str(one.path), client.state(), client.counters())
    except VmGoneError as error:
        if not is_listening(one.path):
            return None
        return ListedVm(one.vm, one.uid, str(one.path), problem=error.problem)
    except KvmHostError as error:
        return ListedVm(one.vm, one.uid, str(one.path), problem=str(error))


def is_listening(path: Path) -> bool:
    """Whether a process listens on a socket, even if it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # Its queue of connections is full.
        except OSError:
            return False
        return True


def _others(uid: int) -> list[VmSocket]:
    own = runtime_dir()
    found: list[VmSocket] = []
    for folder, owner in _default_folders():
        if owner == uid or folder == own:
            continue
        with _opened(folder, owner) as fd:
            names = [] if fd is None else files_in(fd, _SOCKET)
        stems = (name.removesuffix(".sock") for name in names)
        paths = [folder / f"{stem}.sock" for stem in stems if is_name(stem)]
        found += [VmSocket(str(path), owner, path) for path in paths]
    return found[:_MAX_OTHERS]


def _default_folders() -> Iterator[tuple[Path, int]]:
    """Yield the runtime directories of all users with their uids, where they are by default."""
    for entry in _listed(Path("/run/user")):
        if _UID.fullmatch(entry):
            yield Path("/run/user", entry, "kvmhost"), int(entry)
    base = Path(tempfile.gettempdir())
    for entry in _listed(base):
        if match := _USER_FOLDER.fullmatch(entry):
            yield base / entry, int(match[1])


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


@contextlib.contextmanager
def _opened(folder: Path, owner: int) -> Iterator[int | None]:
    """Open a directory of that owner, not through a link; None if it is not one."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        status = os.fstat(fd)
        yield fd if status.st_uid == owner and not status.st_mode & stat.S_IWOTH else None
    finally:
        os.close(fd)
