"""Machines made, run and thrown away again and again: nothing stays behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import DEADLINE_S

from kvmhost.boot.image import read_image
from kvmhost.boot.loaders import load_image
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.pc import PcMachine

pytestmark = pytest.mark.requires_kvm

MIB = 1 << 20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def held() -> dict[str, int]:
    """Count what a process holds."""
    return {
        "fds": len(list(Path("/proc/self/fd").iterdir())),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "threads": threading.active_count(),
    }


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def repeat(times: int, once: Callable[[], None], allowed_growth_bytes: int) -> None:
    """Run ``once`` again and again; the first runs fill caches and arenas."""
    for _ in range(max(5, times // 10)):
        once()
    before, memory = held(), resident_bytes()
    for _ in range(times):
        once()
    after = held()
    assert after["fds"] == before["fds"]
    assert after["threads"] == before["threads"]
    # The allocator may map an arena more, but not one a machine.
    assert after["mappings"] - before["mappings"] <= 8
    assert resident_bytes() - memory <= allowed_growth_bytes


@pytest.mark.parametrize(
    "times", [30, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_tiny_guests_of_two_vcpus(times: int) -> None:
    image = read_image(image_path("hello"))

    def once() -> None:
        with Machine(image, mem_bytes=8 * MIB, n_vcpus=2, engine="kvm") as machine:
            machine.start()
            assert machine.wait(DEADLINE_S) == 0
            assert machine.console_text().count("hello from") == 2

    repeat(times, once, 8 * MIB)


@pytest.mark.parametrize(
    "times", [15, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_pc_guests_of_two_vcpus(times: int, pc_guest: Callable[[str], Path]) -> None:
    image = load_image(pc_guest("smp.elf"))

    def once() -> None:
        with PcMachine(image, n_vcpus=2) as machine:
            machine.start()
            assert machine.wait(DEADLINE_S) == 5

    repeat(times, once, 8 * MIB)
