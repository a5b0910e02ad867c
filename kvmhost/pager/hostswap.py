"""Whether the host has swap that guest pages could go to."""

from __future__ import annotations

from pathlib import Path

__all__ = ["swap_refusal"]


def swap_refusal(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> str | None:
    """Return why ``MADV_PAGEOUT`` cannot evict anything on this host, or None.

    Guest memory is shared memory, which can only be evicted to swap.

    :param proc: where ``swaps`` and ``meminfo`` are
    :param cgroup: the cgroup v2 hierarchy; a ``memory.swap.max`` of 0 in an ancestor forbids it
    """
    try:
        areas = (proc / "swaps").read_text().splitlines()[1:]
        free_kib = _field(proc / "meminfo", "SwapFree")
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if not areas:
        return f"{proc / 'swaps'} lists no swap area"
    if not free_kib:
        return f"{proc / 'meminfo'}: SwapFree is 0"
    return _forbidden(proc, cgroup)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    return 0


def _forbidden(proc: Path, cgroup: Path) -> str | None:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    ours = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = cgroup / ours.lstrip("/")
    while group != cgroup and cgroup in group.parents:
        limit = group / "memory.swap.max"
        if limit.exists() and limit.read_text().strip() == "0":
            return f"{limit} is 0"
        group = group.parent
    return None
