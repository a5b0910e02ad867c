"""Probes the features of this host that kvmhost uses.

Each probe performs the operation: it opens the device, creates a VM, scans a page. None
compares versions, and none leaves a change behind.
"""

from __future__ import annotations

import dataclasses
import importlib
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmhost.errors import CapabilityError, KvmHostError

__all__ = ["Finding", "probe_host"]

#: Parameters of the KVM modules that determine how guest memory is translated.
_PAGING = ("kvm_intel/parameters/ept", "kvm_amd/parameters/npt", "kvm/parameters/tdp_mmu")

#: As in the patches of July 2026; no released header has it.
_UFFD_FEATURE_RWP = 1 << 17
#: Capabilities that kvmhost uses if they are available.
_USED_CAPS = (
    "IRQCHIP",
    "NR_VCPUS",
    "MAX_VCPUS",
    "NR_MEMSLOTS",
    "SYNC_MMU",
    "INTERNAL_ERROR_DATA",
    "READONLY_MEM",
    "IMMEDIATE_EXIT",
    "MANUAL_DIRTY_LOG_PROTECT2",
    "DIRTY_LOG_RING",
    "DIRTY_LOG_RING_ACQ_REL",
    "BINARY_STATS_FD",
    "MEMORY_FAULT_INFO",
    "GUEST_MEMFD",
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one probe.

    :ivar works: None for information without a verdict
    :ivar found: what was found, or why it does not work
    :ivar remedy: how to make it work
    """

    area: str
    name: str
    works: bool | None
    found: str
    remedy: str = ""


def probe_host() -> Iterator[Finding]:
    """Probe everything that kvmhost uses; engines have the area ``engine``."""
    yield Finding("host", "kernel", None, platform.release())
    yield Finding("host", "python", sys.version_info >= (3, 11), platform.python_version())
    yield from _kvm()
    yield _engine("emulated", _try_emulated)
    yield from _trackers()
    yield from _ways()
    yield from _memory()
    yield from _lab()


def _engine(name: str, attempt: Callable[[], str]) -> Finding:
    try:
        return Finding("engine", name, True, attempt())
    except CapabilityError as error:
        return Finding("engine", name, False, error.found, error.remedy)
    except KvmHostError as error:
        return Finding("engine", name, False, str(error), "see dmesg")


def _kvm() -> Iterator[Finding]:
    from kvmhost.kvm import Cap, System

    yield _engine("kvm", _try_kvm)
    try:
        with System() as system:
            values = {cap.name: system.check_extension(cap) for cap in Cap}
            for name in _USED_CAPS:
                found = str(values[name]) if values[name] else "missing"
                yield Finding("kvm", f"KVM_CAP_{name}", None, found)
            yield Finding("kvm", "capabilities", None, ", ".join(_present(values)))
            yield Finding("kvm", "not offered", None, ", ".join(_missing(values)) or "nothing")
            yield Finding("kvm", "statistics", None, _try_statistics())
    except KvmHostError:
        return  # the engine's finding has the reason
    yield Finding("kvm", "paging", None, _paging())


def _present(values: dict[str, int]) -> list[str]:
    """Return names, with KVM's value if it is more than 1."""
    shown = {name: value for name, value in values.items() if value}
    return [name if value == 1 else f"{name}={value:#x}" for name, value in shown.items()]


def _missing(values: dict[str, int]) -> list[str]:
    return [name for name, value in values.items() if not value]


def _try_statistics() -> str:
    from kvmhost.kvm import System

    try:
        with (
            System() as system,
            system.create_vm() as vm,
            vm.create_vcpu(0) as vcpu,
            vm.stats() as of_vm,
            vcpu.stats() as of_vcpu,
        ):
            counts = len(of_vm.read()), len(of_vcpu.read())
    except KvmHostError as error:
        return f"none: {error}"
    return f"{counts[0]} of a VM, {counts[1]} of a vCPU"


def _try_kvm() -> str:
    from kvmhost.kvm import System

    with System() as system, system.create_vm() as vm, vm.create_vcpu(0):
        return "/dev/kvm opens; a VM and a vCPU can be made"


def _paging() -> str:
    """Return the paging mode by module parameters; only calibration on a guest verifies it."""
    told = []
    for name in _PAGING:
        try:
            told.append(f"{Path(name).name}={(Path('/sys/module') / name).read_text().strip()}")
        except OSError:
            continue
    claim = ", ".join(told) or "the modules do not tell"
    return f"{claim}; the guestpt tracker finds out on a running guest"


def _try_emulated() -> str:
    from kvmhost.boot.longmode import EntryState
    from kvmhost.engine.unicorncpu import UnicornCpu
    from kvmhost.memory.guest import GuestMemory

    with GuestMemory.of_size(1 << 20) as memory:
        UnicornCpu(memory, EntryState(rip=0, rsp=0, rdi=0, rsi=0, cr3=0)).close()
    return "Unicorn enters 64-bit mode at privilege level 3"


def _trackers() -> Iterator[Finding]:
    try:
        probe_all = importlib.import_module("kvmhost.trackers").probe_all
    except AttributeError:
        return
    for name, support in probe_all().items():
        works = bool(support.works)
        remedy = "" if works else "none needed: the other trackers do without it"
        yield Finding("tracker", name, works, support.reason or "works", remedy)


def _ways() -> Iterator[Finding]:
    """Yield a finding for each method of tracking other processes."""
    from kvmhost.process.methods import probe_methods

    for name, support in probe_methods().items():
        remedy = "" if support.works else "none needed: young --pid takes another way"
        yield Finding("--pid", name, support.works, support.reason, remedy)


def _memory() -> Iterator[Finding]:
    from kvmhost.pager.userfault import Userfault

    try:
        userfault = Userfault()
    except CapabilityError as error:
        yield Finding("memory", "userfaultfd", False, error.found, error.remedy)
    else:
        yield Finding("memory", "userfaultfd", True, f"features {userfault.features:#x}")
        yield Finding("memory", "userfaultfd RWP", None, _read_write_protect(userfault.features))
        userfault.close()
    problem = _try_pagemap_scan()
    yield Finding(
        "memory",
        "PAGEMAP_SCAN",
        not problem,
        problem or "scans",
        "" if not problem else "none needed: pagemap is read instead; Linux 6.7 has it",
    )
    yield from _store()


def _lab() -> Iterator[Finding]:
    """Yield a finding for each thing that emulated hosts need."""
    from kvmhost.lab.apt import probe_apt
    from kvmhost.lab.fetching import is_cached
    from kvmhost.lab.hosts import HOSTS
    from kvmhost.lab.qemu import probe_qemu, qemu_version

    for host in {host.qemu: host for host in HOSTS.values()}.values():
        try:
            probe_qemu(host)
        except CapabilityError as error:
            yield Finding("lab", host.qemu, False, error.found, error.remedy)
        else:
            yield Finding("lab", host.qemu, True, f"version {qemu_version(host)}")
    problem = probe_apt()
    remedy = "add a Debian mirror to apt's sources; without apt, copy the cache of another machine"
    found = problem or "apt-get, dpkg-deb, and the mirror of apt's sources"
    yield Finding("lab", "fetching", not problem, found, remedy if problem else "")
    cached = [name for name, host in HOSTS.items() if is_cached(host)]
    yield Finding("lab", "cached hosts", None, ", ".join(cached) or "none")


def _store() -> Iterator[Finding]:
    from kvmhost.pager.codec import find_codec, has_checksum

    for name, remedy in (
        ("lz4", "install lz4 from a wheel; pages go to zstd, or are kept uncompressed"),
        ("zstd", "none needed: lz4 is the default; install zstandard from a wheel"),
    ):
        try:
            find_codec(name)
        except CapabilityError as error:
            yield Finding("memory", f"compression {name}", False, error.found, remedy)
        else:
            yield Finding("memory", f"compression {name}", True, "works")
    works = has_checksum()
    remedy = "" if works else "install xxhash from a wheel; without it no store is in a file"
    yield Finding("memory", "page checksums", works, "xxh3" if works else "none", remedy)


def _read_write_protect(features: int) -> str:
    """Report the mode that traps reads and writes; docs/trackers.md explains why it is unused."""
    offered = features & _UFFD_FEATURE_RWP
    return f"{'offered' if offered else 'not offered'}; no tracker uses it yet"


def _try_pagemap_scan() -> str:
    from kvmhost._ffi import ffi, lib

    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"/proc/self/pagemap: {error.strerror}"
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page[0] = 1
            words = ffi.new("uint64_t *")
            # SAFETY: the view is released before the mapping closes.
            with ffi.from_buffer(page) as view:
                address = int(ffi.cast("uintptr_t", view))
                result = lib.kh_pagemap_scan(fd, address, 1, words)
    finally:
        os.close(fd)
    return os.strerror(-result) if result < 0 else ""
