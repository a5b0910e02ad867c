"""Resolves paths safely, and checks that files belong to this process's user alone.

In a folder that others can write to, another user may have created a file or a symbolic
link first, or may replace a folder by a link between two calls. So paths are resolved
one component at a time, by directory descriptor:

- a symbolic link is followed only if it belongs to this process's user or to root; a
  link of another user is refused in any position of the path;
- a file is then used through the descriptor of its folder, never by path again.

:func:`open_private_folder` also requires that no other user can change any folder in the
path: it opens the folders of sockets and locks.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

from kvmhost.errors import LayoutError

__all__ = [
    "Located",
    "check_own_file",
    "is_trusted",
    "locate",
    "open_folder",
    "open_private_folder",
    "same_file",
    "why_not_private",
]

#: As in Linux, include/linux/namei.h: MAXSYMLINKS.
_MAX_LINKS = 40
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLLOWED = os.O_PATH | os.O_CLOEXEC


class Located(NamedTuple):
    """A name in an open folder.

    :ivar folder: descriptor of the folder (``O_PATH``); the receiver closes it
    :ivar status: of the file of that name; None if there is none
    :ivar by_kernel: the name is a link that only the kernel can follow (``/proc/self/fd/1``);
        ``status`` is that of its target
    """

    folder: int
    name: str
    status: os.stat_result | None
    by_kernel: bool = False


def is_trusted(uid: int) -> bool:
    """Whether files of a user are trusted: those of root and of this process's user."""
    return uid in (0, os.geteuid())


def locate(path: Path, *, follow_last: bool = True) -> Located:
    """Resolve a path to a folder and a name in it.

    :param follow_last: follow a link in the last component too; else return the link
    :raises LayoutError: for a link of another user
    :raises OSError: if a folder on the way is missing
    """
    return _follow(path, path.parts or (".",), follow_last=follow_last, private=False)


def open_folder(path: Path, *, private: bool = False) -> int:
    """Open a folder, following only trusted links.

    :param private: refuse a path with a folder that another user can change
    :return: an ``O_PATH`` descriptor
    :raises LayoutError: as :func:`locate`
    :raises OSError: if the folder does not exist
    """
    return _follow(path, (*path.parts, "."), follow_last=True, private=private).folder


def open_private_folder(path: Path) -> int:
    """Open a folder of this process's user that no other user can change.

    Parent folders may also belong to root, and may be writable by others if the sticky
    bit prevents them from renaming files of other users, as in ``/tmp``.

    :return: an ``O_PATH`` descriptor
    :raises LayoutError: states which folder is not private, and why
    :raises OSError: if the folder does not exist
    """
    folder = open_folder(path, private=True)
    status = os.fstat(folder)
    problem = why_not_private(status)
    if problem:
        os.close(folder)
        raise LayoutError(f"{path}: {problem}")
    return folder


def why_not_private(status: os.stat_result) -> str:
    """Return why another user can change a folder or file; "" if none can."""
    if status.st_uid != os.geteuid():
        return f"belongs to uid {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def check_own_file(path: Path, status: os.stat_result, *, readable: bool = False) -> None:
    """Refuse an existing file unless only this user can access it.

    :param readable: others may read it
    :raises LayoutError: states the reason
    """
    if not stat.S_ISREG(status.st_mode):
        raise LayoutError(f"{path}: exists and is not a regular file")
    problem = why_not_private(status)
    if not problem and status.st_mode & 0o044 and not readable:
        problem = f"others can read it (mode {stat.S_IMODE(status.st_mode):04o})"
    if not problem and status.st_nlink > 1:
        problem = f"has {status.st_nlink} hard links"
    if problem:
        raise LayoutError(f"{path}: exists and {problem}; remove it or take another name")


def same_file(fd: int, name: str, folder: int) -> bool:
    """Whether a name in a folder is that of an open file."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), status)


def _follow(path: Path, names: tuple[str, ...], *, follow_last: bool, private: bool) -> Located:
    rest = list(reversed(names))
    folder = os.open("/" if path.is_absolute() else ".", _FOLLOWED | os.O_DIRECTORY)
    links = 0
    try:
        while True:
            if private:
                _check_folder(path, folder)
            name = rest.pop()
            status = _status(folder, name, missing_is_fine=not rest)
            if status is None:
                return Located(folder, name, None)
            if stat.S_ISLNK(status.st_mode) and (rest or follow_last):
                links += 1
                _check_link(path, name, status, links)
                if not _is_magic(status):
                    target = os.readlink(name, dir_fd=folder)
                    if target.startswith("/"):
                        folder = _enter(folder, "/", _FOLLOWED | os.O_DIRECTORY)
                    rest.extend(reversed(Path(target).parts or (".",)))
                elif rest:
                    folder = _enter(folder, name, _FOLLOWED | os.O_DIRECTORY)
                else:
                    return Located(folder, name, os.stat(name, dir_fd=folder), by_kernel=True)
            elif rest:
                folder = _enter(folder, name, _FOLDER)
            else:
                return Located(folder, name, status)
    except BaseException:
        os.close(folder)
        raise


def _status(folder: int, name: str, *, missing_is_fine: bool) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        if not missing_is_fine:
            raise
        return None


def _enter(folder: int, name: str, flags: int) -> int:
    """Open a folder in a folder, and close the latter."""
    entered = os.open(name, flags, dir_fd=folder)
    os.close(folder)
    return entered


def _check_link(path: Path, name: str, status: os.stat_result, links: int) -> None:
    if links > _MAX_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not is_trusted(status.st_uid):
        raise LayoutError(
            f"{path}: {name!r} is a symbolic link of uid {status.st_uid}, which is not followed"
        )


def _is_magic(status: os.stat_result) -> bool:
    """Whether a link is a magic link of procfs, whose text is not its target."""
    try:
        return status.st_dev == Path("/proc/self/fd").stat().st_dev
    except OSError:
        return False


def _check_folder(path: Path, folder: int) -> None:
    status = os.fstat(folder)
    if not is_trusted(status.st_uid):
        where = Path(f"/proc/self/fd/{folder}").readlink()
        raise LayoutError(
            f"{path}: {where} belongs to uid {status.st_uid}, who can exchange what is in it"
        )
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        mode = stat.S_IMODE(status.st_mode)
        where = Path(f"/proc/self/fd/{folder}").readlink()
        raise LayoutError(
            f"{path}: others can write to {where} (mode {mode:04o}) and exchange what is in it"
        )
