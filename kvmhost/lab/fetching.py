"""Downloads what hosts need, and makes their kernels and initial file systems."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

from kvmhost.errors import CapabilityError, HostError, ImageError
from kvmhost.lab import cache
from kvmhost.lab.apt import Apt, opened_apt
from kvmhost.lab.hosts import LabHost
from kvmhost.lab.initrd import base_archive, recipe
from kvmhost.lab.kernel import KernelTree
from kvmhost.lab.pins import KernelPins, Pin, pinned
from kvmhost.lab.scratch import scratch_folder

__all__ = ["BootFiles", "boot_files", "fetch", "fetch_latest", "fetch_packages", "is_cached"]

#: Packages of a kernel that hold its image and modules.
_KERNEL_PACKAGE = re.compile(r"linux-(image|binary|modules)-\d")

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class BootFiles:
    """What QEMU loads.

    :ivar version: of the kernel's package
    """

    kernel: Path
    initrd: Path
    version: str


def boot_files(host: LabHost) -> BootFiles:
    """Return the kernel and initial file system of a host from the cache.

    :raises CapabilityError: if they are not there, or damaged
    """
    pins = cache.chosen_pins(host.kernel)
    folder = cache.entry_folder(pins, recipe(host))
    if problem := cache.check_entry(folder):
        raise CapabilityError(
            f"lab host {host.name}", "its kernel in the cache", f"which is not complete: {problem}",
            f"run: kvmhost lab fetch {host.name}",
        )  # fmt: skip
    return BootFiles(folder / "kernel", folder / "initrd", pins.version)


def is_cached(host: LabHost) -> bool:
    """Whether a host can boot without a download."""
    try:
        boot_files(host)
    except CapabilityError:
        return False
    return True


def fetch(host: LabHost, tell: Tell) -> BootFiles:
    """Make sure that the pinned kernel of a host is in the cache.

    :param tell: called with a line for each step that takes time
    :raises CapabilityError: if it cannot be downloaded
    :raises HostError: if the cache cannot be written
    """
    cache.keep_choice(host.kernel, None)
    return _make(host, pinned(host.kernel), tell)


def fetch_latest(host: LabHost, tell: Tell) -> BootFiles:
    """Take the newest kernel of the host's suite on the mirror, and use it from now on.

    :raises CapabilityError: if it cannot be downloaded
    :raises HostError: if the cache cannot be written
    """
    pins = _newest(pinned(host.kernel))
    files = _make(host, pins, tell)
    cache.keep_choice(host.kernel, pins)
    return boot_files(host) if files.version == pins.version else files


def fetch_packages(pins: Iterable[Pin], architecture: str, tell: Tell) -> list[Path]:
    """Return the archives of packages, in order; download those that the cache lacks.

    :raises CapabilityError: if one cannot be downloaded
    """
    wanted = list(pins)
    found = {pin: cache.find_package(pin) for pin in wanted}
    missing = sorted((pin for pin in wanted if found[pin] is None), key=lambda pin: pin.suite)
    for suite, group in groupby(missing, key=lambda pin: pin.suite):
        tell(f"package lists of {suite} for {architecture}")
        with opened_apt(suite, architecture) as apt:
            found |= {pin: _download(apt, pin, tell) for pin in group}
    return [path for pin in wanted if (path := found[pin]) is not None]


def _download(apt: Apt, pin: Pin, tell: Tell) -> Path:
    tell(f"{pin.name} {pin.version}")
    with scratch_folder() as folder:
        return cache.keep_package(pin, apt.download(pin, folder))


def _make(host: LabHost, pins: KernelPins, tell: Tell) -> BootFiles:
    folder = cache.entry_folder(pins, recipe(host))
    if cache.check_entry(folder) is not None:
        archives = fetch_packages(pins.packages, pins.architecture, tell)
        tell(f"kernel and initial file system of {host.name}")
        with scratch_folder() as unpacked:
            for archive in archives:
                unpack(archive, unpacked)
            with cache.filled_entry(folder) as partial:
                _fill(host, unpacked, partial)
    return BootFiles(folder / "kernel", folder / "initrd", pins.version)


def _fill(host: LabHost, unpacked: Path, folder: Path) -> None:
    tree = KernelTree(unpacked)
    busybox = next((p for p in (unpacked / "bin", unpacked / "usr/bin") if p.is_dir()), unpacked)
    initrd = base_archive(host, tree, (busybox / "busybox").read_bytes())
    shutil.copyfile(tree.image, folder / "kernel")
    (folder / "initrd").write_bytes(initrd)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive of a package.

    :raises ImageError: if it is damaged
    """
    command = ["dpkg-deb", "-x", str(archive), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ImageError(str(archive), "package", found.stderr.strip())


def _newest(pins: KernelPins) -> KernelPins:
    """Return pins of the newest versions: the kernel that the meta package names."""
    with opened_apt(pins.meta_suite, pins.architecture) as apt:
        names = _kernel_packages(apt, pins.meta)
        packages = [apt.newest(name) for name in names]
    others = [pin for pin in pins.packages if not _KERNEL_PACKAGE.match(pin.name)]
    for pin in others:
        with opened_apt(pin.suite, pins.architecture) as apt:
            packages.append(apt.newest(pin.name))
    return dataclasses.replace(pins, packages=tuple(packages))


def _kernel_packages(apt: Apt, meta: str) -> list[str]:
    """Return the packages of the kernel that a meta package stands for."""
    found: dict[str, None] = {}
    waiting = [meta]
    while waiting:
        for name in apt.dependencies(waiting.pop()):
            if _KERNEL_PACKAGE.match(name) and name not in found:
                found[name] = None
                waiting.append(name)
    if not found:
        raise HostError(f"{meta} of {apt.suite}: names no kernel", 2)
    return list(found)
