"""What the output of every measurement begins with: version and host."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TypedDict

from kvmhost import __version__
from kvmhost.tools.outputs.bench import HostRow

__all__ = ["BenchHead", "Head", "bench_head", "head", "host_row"]


class Head(TypedDict):
    """Fields of :class:`~kvmhost.tools.outputs.bench.MeasuredOutput`."""

    version: str
    host: HostRow


class BenchHead(Head):
    """Fields of :class:`~kvmhost.tools.outputs.bench.BenchOutput`, without the figures."""

    benchmark: str


def head() -> Head:
    """Return the version and this host."""
    return {"version": __version__, "host": host_row()}


def bench_head(name: str) -> BenchHead:
    """Return the same with the name of a benchmark."""
    return {"version": __version__, "host": host_row(), "benchmark": name}


def host_row() -> HostRow:
    """Return the processor and the kernel of this host."""
    return HostRow(
        processor=_processor(),
        architecture=platform.machine(),
        n_cpus=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
    )


def _processor() -> str:
    """Return the processor's name: ``model name`` on x86, ``cpu`` on PowerPC, none on Arm."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "cpu"):
            return value.strip()
    return ""
