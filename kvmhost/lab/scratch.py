"""Temporary folders of the lab; those of processes that were killed are removed by the next one.

Each process holds a lock (flock) on its folder. The kernel drops it when the process ends, however
it ends: a folder of this user that is not locked belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmhost.files import os_errors
from kvmhost.temporary import temporary_folder

__all__ = ["remove_abandoned", "scratch_folder"]

_PREFIX = "kvmhost-lab-work-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder, and remove it after the body; first remove abandoned ones.

    :raises HostError: if it cannot be made
    """
    remove_abandoned()
    while True:
        with contextlib.ExitStack() as stack:
            with os_errors(tempfile.gettempdir()):
                folder = stack.enter_context(temporary_folder(_PREFIX))
            if _lock(folder, stack, wait=True):
                yield folder
                return
        # Another process took it for abandoned between its making and the lock.


def remove_abandoned() -> None:
    """Remove the temporary folders of this user's processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.ExitStack() as stack:
            if _lock(folder, stack, wait=False):
                shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, stack: contextlib.ExitStack, *, wait: bool) -> bool:
    """Lock a folder for as long as the stack is open; False if it is another's, or gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        there, held = os.lstat(folder), os.fstat(fd)
    except OSError:
        return False
    return held.st_uid == os.geteuid() and (there.st_dev, there.st_ino) == (
        held.st_dev, held.st_ino,
    )  # fmt: skip
