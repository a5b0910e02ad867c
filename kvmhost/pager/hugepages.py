"""Detects whether shared memory may use huge pages of sizes other than 2 MiB."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["has_odd_sizes"]

_SYSFS = Path("/sys/kernel/mm/transparent_hugepage")


def has_odd_sizes(sysfs: Path = _SYSFS) -> bool:
    """Whether the kernel may use huge pages for shared memory that cannot be detected.

    A huge page of 2 MiB is visible in its mapping; one of another size is not.
    Source: Documentation/admin-guide/mm/transhuge.rst, "Hugepages in tmpfs/shmem", v6.18.

    :param sysfs: directory of the settings; missing where the kernel has no huge pages
    """
    general = _chosen(sysfs / "shmem_enabled")
    try:
        whole = int((sysfs / "hpage_pmd_size").read_text()) >> 10
    except (OSError, ValueError):
        return False
    for setting in sysfs.glob("hugepages-*kB/shmem_enabled"):
        found = re.fullmatch(r"hugepages-(\d+)kB", setting.parent.name)
        chosen = _chosen(setting)
        if chosen == "inherit":
            chosen = general
        if found and int(found[1]) != whole and chosen not in ("", "never", "deny"):
            return True
    return False


def _chosen(setting: Path) -> str:
    """Return the word in brackets, or an empty one."""
    try:
        found = re.search(r"\[(\w+)\]", setting.read_text())
    except OSError:
        return ""
    return found[1] if found else ""
