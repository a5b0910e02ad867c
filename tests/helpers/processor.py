"""What runs the tests: a real processor, or QEMU's emulation of one."""

from __future__ import annotations

from pathlib import Path

__all__ = ["processor_is_emulated"]


def processor_is_emulated() -> bool:
    """Whether this host is itself under QEMU's software emulation, as those of the lab are."""
    return "QEMU TCG CPU" in Path("/proc/cpuinfo").read_text()
