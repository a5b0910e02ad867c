"""Probes for the memory pressure interfaces and limits of this host.

Each probe returns ``(works, what was found, remedy)`` and undoes its changes.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["probe_cgroup_v1", "probe_cgroup_v2", "probe_psi", "probe_psi_trigger", "probe_swap"]

Probe = tuple[bool, str, str]

_PSI = Path("/proc/pressure/memory")
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
#: 500 ms of stall in 2 s; unprivileged windows must be multiples of 2 s.
_TRIGGER = b"some 500000 2000000\n"


def probe_cgroup_v1(root: Path = _V1) -> Probe:
    """Create a child in the v1 memory hierarchy."""
    if not (root / "memory.limit_in_bytes").exists():
        return False, f"no v1 memory hierarchy at {root}", "use cgroup v2"
    return _make_child(root, "memory.limit_in_bytes")


def probe_cgroup_v2(roots: tuple[Path, ...] = _V2) -> Probe:
    """Create a child with the memory controller in the v2 hierarchy."""
    for root in roots:
        controllers = root / "cgroup.controllers"
        if not controllers.exists():
            continue
        if "memory" not in controllers.read_text().split():
            remedy = "unmount the v1 memory hierarchy, or use that"
            return False, f"{root} has no memory controller", remedy
        return _make_child(root, "memory.max")
    return False, "no v2 hierarchy is mounted", "mount -t cgroup2 none /sys/fs/cgroup"


def probe_psi(path: Path = _PSI) -> Probe:
    """Read the pressure file."""
    try:
        first = path.read_text().splitlines()[0]
    except (OSError, IndexError) as error:
        return False, f"{path}: {error}", "boot with psi=1 (CONFIG_PSI)"
    return True, first, ""


def probe_psi_trigger(path: Path = _PSI) -> Probe:
    """Set a trigger; closing the descriptor removes it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return False, f"{path}: {error.strerror}", "run as root; totals can be read without"
    try:
        os.write(fd, _TRIGGER)
    except OSError as error:
        return False, f"{path}: {error.strerror}", "run with CAP_SYS_RESOURCE"
    finally:
        os.close(fd)
    return True, _TRIGGER.decode().strip(), ""


def probe_swap(path: Path = Path("/proc/swaps")) -> Probe:
    """Look for active swap."""
    try:
        areas = [line.split()[0] for line in path.read_text().splitlines()[1:]]
    except OSError as error:
        return False, f"{path}: {error.strerror}", "none needed: the pager has its own store"
    if not areas:
        return False, "no swap is on", "none needed: the pager has its own store"
    return True, ", ".join(areas), ""


def _make_child(root: Path, limit: str) -> Probe:
    child = root / f"kvmhost-doctor-{os.getpid()}"
    try:
        child.mkdir()
    except OSError as error:
        return False, f"{child}: {error.strerror}", "run as root, or in a delegated cgroup"
    try:
        if not os.access(child / limit, os.W_OK):
            return False, f"{child} has no writable {limit}", "enable +memory for the children"
    finally:
        child.rmdir()
    return True, f"groups can be made in {root}", ""
