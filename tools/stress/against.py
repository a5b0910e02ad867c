"""Runs the kernel's own selftest, where someone has built it, and reads its times."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from kvmhost.errors import GuestTimeout, HostError, LayoutError
from kvmhost.printable import printable

__all__ = ["SelftestError", "command_line", "parse_times", "run_selftest"]

_GIB = 1 << 30
#: ``run1 = 6.873000000s, reset = 0.000200000s, …``
_TIME = re.compile(r"\b(run1|reset|run2|ro|rw) = ([0-9]+\.[0-9]+)s")
_SKIPPED = 4  # KSFT_SKIP


class SelftestError(HostError):
    """The kernel's selftest failed, or printed no times; the text says which."""

    def __str__(self) -> str:
        return self.what


def command_line(
    path: Path, span_bytes: int, slot_bytes: int, n_vcpus: int, huge: bool
) -> list[str]:
    """Return its command for the same sizes.

    :raises LayoutError: for a size that it cannot take: it counts in GiB
    """
    for option, n_bytes in (("--mem", span_bytes), ("--slot-size", slot_bytes)):
        if n_bytes % _GIB:
            raise LayoutError(f"{option}: the selftest of --against takes whole GiB")
    sizes = ["-m", str(span_bytes // _GIB), "-s", str(slot_bytes // _GIB)]
    return [str(path), "-c", str(n_vcpus), *sizes, *(["-H"] if huge else [])]


def run_selftest(command: list[str], timeout_s: float) -> dict[str, float]:
    """Run it and return its seconds by phase.

    :raises HostError: if it cannot be run
    :raises SelftestError: if it fails or prints no times
    :raises GuestTimeout: if it takes longer
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GuestTimeout(timeout_s) from None
    except OSError as error:
        raise HostError(command[0], error.errno or 0) from error
    name = Path(command[0]).name
    lines = (done.stderr or done.stdout).strip().splitlines()
    if done.returncode:
        why = "was skipped" if done.returncode == _SKIPPED else f"ended with {done.returncode}"
        detail = f": {printable(lines[-1])}" if lines else ""
        raise SelftestError(f"{name} {why}{detail}", 0)
    times = parse_times(done.stdout)
    if not times:
        raise SelftestError(f"{name} printed no times of phases", 0)
    return times


def parse_times(text: str) -> dict[str, float]:
    """Return the seconds by phase in the selftest's output."""
    return {name: float(seconds) for name, seconds in _TIME.findall(text)}
