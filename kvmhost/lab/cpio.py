"""Archives of the kernel's initial file system: cpio in the "new ASCII" format.

Source: Documentation/driver-api/early-userspace/buffer-format.rst, Linux v6.12.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

__all__ = ["cpio_archive"]


def cpio_archive(files: Mapping[str, bytes], folders: tuple[str, ...] = ()) -> bytes:
    """Return an archive of files, all executable, and of empty folders.

    The kernel unpacks archives that follow one another, each padded to 4 bytes, into one
    file system.

    :param files: contents by path, relative, without links; folders on the way are added
    """
    names = dict.fromkeys(folders)
    names |= {parent: None for path in files for parent in _parents(path)}
    parts = [
        _entry(number, name, stat.S_IFDIR | 0o755, b"")
        for number, name in enumerate(sorted(names), start=1)
    ]
    for number, (name, data) in enumerate(files.items(), start=len(parts) + 1):
        parts.append(_entry(number, name, stat.S_IFREG | 0o755, data))
    parts.append(_entry(0, "TRAILER!!!", 0, b""))
    return b"".join(parts)


def _parents(path: str) -> list[str]:
    words = path.split("/")[:-1]
    return ["/".join(words[: n + 1]) for n in range(len(words))]


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    raw = name.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
    # namesize, check
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
