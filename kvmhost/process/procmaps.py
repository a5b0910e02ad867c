"""Mappings of another process: which of them may be a guest's memory.

Guest memory that can be tracked from another process is a shared, writable mapping of a
memfd, of a file in tmpfs or hugetlbfs, or System V shared memory. The kernel cuts a
mapping where its flags differ (``madvise``, userfaultfd); parts that follow each other
both in the address space and in the file are merged.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.units import PAGE_BYTES

__all__ = ["Mapping", "choose_mapping", "shared_mappings", "shared_ranges"]

_MEMORY_PATHS = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage")


@dataclasses.dataclass(frozen=True)
class Mapping:
    """A shared mapping: addresses ``[start, end)`` of the process, and what is mapped there.

    :param offset_bytes: in the file, of the first byte
    :param path: as in ``/proc/PID/maps``
    :param quiet: userfaultfd keeps the kernel from mapping the neighbours of a page
    """

    start: int
    end: int
    offset_bytes: int
    device: str
    inode: int
    path: str
    quiet: bool = False

    @property
    def n_pages(self) -> int:
        """Size in pages of 4 KiB."""
        return (self.end - self.start) // PAGE_BYTES

    @property
    def is_memory(self) -> bool:
        """Whether it appears to be memory, as opposed to a device or a file on a disk."""
        return self.path.startswith(_MEMORY_PATHS)

    def __str__(self) -> str:
        size = f"{(self.end - self.start) >> 10} KiB"
        return f"{self.start:#x}-{self.end:#x} {self.path} ({size})"


def shared_mappings(pid: int, proc: Path = Path("/proc")) -> list[Mapping]:
    """Return the shared writable mappings of a process, largest first.

    :raises LayoutError: if there is no such process
    :raises CapabilityError: if this process lacks permission
    """
    try:
        text = (proc / str(pid) / "smaps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise LayoutError(f"process {pid}: no such process") from None
    except PermissionError as error:
        raise CapabilityError(
            "attach",
            f"to read the mappings of process {pid}",
            error.strerror or "",
            "run as the user of that process, or as root",
        ) from error
    found: list[Mapping] = []
    for mapping in _parse(text):
        if found and _follows(found[-1], mapping):
            whole = dataclasses.replace(
                found[-1], end=mapping.end, quiet=found[-1].quiet and mapping.quiet
            )
            found[-1] = whole
        else:
            found.append(mapping)
    return sorted(found, key=lambda mapping: mapping.start - mapping.end)


def shared_ranges(maps: Path) -> list[tuple[int, int]]:
    """Return the address ranges of shared mappings, ascending.

    :raises FileNotFoundError, ProcessLookupError: if the process has ended
    """
    found = []
    for line in maps.read_text().splitlines():
        words = line.split(maxsplit=2)
        if words[1][3] == "s":
            start, end = (int(part, 16) for part in words[0].split("-"))
            found.append((start, end))
    return found


def choose_mapping(mappings: list[Mapping], wanted: str = "") -> Mapping:
    """Return the mapping that a user's argument selects.

    :param wanted: an address inside it in hex, or a part of its path; empty: the largest
        that looks like memory
    :raises LayoutError: if none matches; lists the existing ones
    """
    if not wanted:
        memory = [mapping for mapping in mappings if mapping.is_memory]
        if memory:
            return memory[0]
        raise LayoutError(_none_fits("no shared mapping of memory (memfd, tmpfs)", mappings))
    try:
        address = int(wanted, 16)
    except ValueError:
        fitting = [mapping for mapping in mappings if wanted in mapping.path]
    else:
        fitting = [mapping for mapping in mappings if mapping.start <= address < mapping.end]
    if not fitting:
        raise LayoutError(_none_fits(f"no shared mapping {wanted!r}", mappings))
    return fitting[0]


def _none_fits(problem: str, mappings: list[Mapping]) -> str:
    there = "; ".join(str(mapping) for mapping in mappings[:5]) or "none at all"
    return f"{problem}; shared writable mappings: {there}"


def _follows(last: Mapping, mapping: Mapping) -> bool:
    return (
        last.end == mapping.start
        and (last.device, last.inode, last.path) == (mapping.device, mapping.inode, mapping.path)
        and last.offset_bytes + (last.end - last.start) == mapping.offset_bytes
    )


def _parse(text: str) -> list[Mapping]:
    found: list[Mapping] = []
    keep = False
    for line in text.splitlines():
        words = line.split(maxsplit=5)
        if words and not words[0].endswith(":"):
            keep = words[1][1] == "w" and words[1][3] == "s"
            if keep:
                start, end = (int(part, 16) for part in words[0].split("-"))
                path = words[5] if len(words) > 5 else ""
                found.append(Mapping(start, end, int(words[2], 16), words[3], int(words[4]), path))
        elif keep and words and words[0] == "VmFlags:":
            # uw: write-protection, ui: minor faults, by userfaultfd.
            quiet = bool({"uw", "ui"} & set(line.split()[1:]))
            found[-1] = dataclasses.replace(found[-1], quiet=quiet)
    return found
