"""Fixtures and markers for all tests.

A ``requires_…`` marker skips a test where the machine cannot do what it needs.
Each probe does the act itself, once, and says what to do about it.
``TEST_DEMAND=kvm,uffd,cgroup,root,cap`` turns such a skip into a failure.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from waiting import DEADLINE_S

from kvmhost.errors import CapabilityError, IoctlError
from kvmhost.guests.build import SOURCES, build_guests, compile_pc_guest, pc_sources
from kvmhost.machine import Machine

# A shell starts its background jobs with SIGINT ignored, and every process below
# inherits that: the tests that interrupt a command would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup does so with SIGHUP. A handler is not inherited, and this process goes on.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


# Hosts that are busy or emulated are slow, and no example of a property has a time of its own.
hypothesis.settings.register_profile("kvmhost", deadline=None)
hypothesis.settings.load_profile("kvmhost")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build the guests again if one is older than its sources, as ``make`` does."""
    if hasattr(session.config, "workerinput"):
        return
    built = [path.stat().st_mtime for path in SOURCES.glob("*.elf")]
    sources = [path for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".S", ".ld")]
    if not built or min(built) < max(path.stat().st_mtime for path in sources):
        build_guests()


@functools.cache
def _no_kvm() -> str | None:
    from kvmhost.kvm.system import probe

    return probe()


@functools.cache
def _no_uffd() -> str | None:
    from kvmhost.pager.userfault import probe

    return probe()


@functools.cache
def _no_root() -> str | None:
    return None if os.geteuid() == 0 else f"runs as uid {os.geteuid()}; run the tests as root"


@functools.cache
def _no_cgroup() -> str | None:
    """Make a memory cgroup and remove it again, in v1 or v2."""
    reasons = []
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = root / f"kvmhost-probe-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            reasons.append(f"{group}: {error.strerror}")
            continue
        try:
            limits = [group / "memory.limit_in_bytes", group / "memory.max"]
            if any(path.exists() for path in limits):
                return None
            reasons.append(f"{root}: no memory controller")
        finally:
            group.rmdir()
    return "; ".join(reasons) + "; mount a memory cgroup hierarchy and run as root"


@functools.cache
def _no_cap(name: str) -> str | None:
    from kvmhost.kvm import Cap, System

    try:
        with System() as system:
            has = system.check_extension(Cap[name])
    except (CapabilityError, IoctlError) as error:
        return str(error)
    return None if has else f"this KVM lacks KVM_CAP_{name}; use a newer kernel"


@functools.cache
def _no_qemu() -> str | None:
    try:
        subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"qemu-system-x86_64: {error}; run .ci/packages as root"
    return None


_PROBES: dict[str, Callable[..., str | None]] = {
    "requires_kvm": _no_kvm,
    "requires_uffd": _no_uffd,
    "requires_root": _no_root,
    "requires_cgroup": lambda *_: _no_cgroup(),
    "requires_cap": _no_cap,
    "requires_qemu": _no_qemu,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    demanded = os.environ.get("TEST_DEMAND", "").split(",")
    for marker in item.iter_markers():
        probe = _PROBES.get(marker.name)
        reason = probe(*marker.args) if probe else None
        if reason is None:
            continue
        if marker.name.removeprefix("requires_") in demanded:
            pytest.fail(f"demanded by TEST_DEMAND: {marker.name}: {reason}", pytrace=False)
        pytest.skip(f"{marker.name}: {reason}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call":
        item.stash[_FAILED] = report.failed


_FAILED = pytest.StashKey[bool]()


@pytest.fixture
def make_vm(request: pytest.FixtureRequest) -> Iterator[Callable[..., Machine]]:
    """Return a maker of machines that are closed, and described if the test fails."""
    made: list[Machine] = []

    def make(*args: Any, **kwargs: Any) -> Machine:
        machine = Machine(*args, **kwargs)
        made.append(machine)
        return machine

    yield make
    if request.node.stash.get(_FAILED, False):
        for machine in made:
            print(describe(machine))
    for machine in made:
        machine.close()


def describe(machine: Machine) -> str:
    """Describe a machine for the report of a failed test."""
    lines = [f"engine {machine.engine.name}, error {machine.error!r}"]
    lines += [f"console: {machine.console_text()!r}", f"layout: {machine.layout}"]
    if machine.running:
        machine.pause()
    for vcpu in machine.vcpus:
        shown = " ".join(f"{name}={value:#x}" for name, value in vcpu.registers().items())
        lines.append(f"vCPU {vcpu.index}: doorbells {vcpu.doorbells}, {shown}")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def pc_guest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a compiler of ``guests/x86_64/pc``: ``hello.elf``, ``hello.flat``."""
    folder = tmp_path_factory.mktemp("pc")

    def compile_once(name: str) -> Path:
        image = folder / name
        if not image.exists():
            (source,) = (s for s in pc_sources() if s.stem == image.stem)
            compile_pc_guest(source, image)
        return image

    return compile_once


def footprint() -> dict[str, int]:
    """Count what a machine that is gone must not leave behind."""
    maps = Path("/proc/self/maps").read_text()
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {
        "fds": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
        "processes": len(children.split()),
        "memfd mappings": maps.count("/memfd:"),
        "shared memory files": len(list(Path("/dev/shm").iterdir())),
    }


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if the test leaves descriptors, threads, processes or mappings behind."""
    before = footprint()
    yield
    deadline = time.monotonic() + DEADLINE_S
    while (after := footprint()) != before and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread that has been told to end
    assert after == before
