"""QEMU's command line for a host, and what is known of QEMU's versions.

Version 7.2 of QEMU crashes kernels of two x86 processors under multi-threaded emulation: the
kernel patches its own code, and the other processor goes on with the old. So a host has one
processor.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

from kvmhost.errors import CapabilityError
from kvmhost.lab.hosts import LabHost

__all__ = ["PORTS", "Devices", "command_line", "probe_qemu", "qemu_version"]

#: Serial ports by which host and machine outside talk, in the order of ``Devices.port_fds``.
#: ``lab.agent`` is for a command inside that answers questions.
PORTS = ("lab.control", "lab.out", "lab.err", "lab.agent")
#: Debian's package of an emulator, by its executable.
_PACKAGES = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-ppc64": "qemu-system-ppc",
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """Files and descriptors that a host is made of.

    :ivar ram: file that is the host's memory
    :ivar shared: folder that is the host's root, read-only, by the mount tag ``root``
    :ivar port_fds: sockets of :data:`PORTS`
    :ivar console: file that the console is written to; None: the terminal
    :ivar monitor_fd: socket of the monitor, by which the machine is started; None: no monitor
    """

    kernel: Path
    initrd: Path
    ram: Path
    mem_bytes: int
    shared: Path
    port_fds: tuple[int, ...]
    console: Path | None
    monitor_fd: int | None = None


def qemu_version(host: LabHost) -> str | None:
    """Return the version of the host's emulator, or None if it does not run here."""
    try:
        found = subprocess.run([host.qemu, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"version (\S+)", found.stdout)
    return match[1] if match else None


def probe_qemu(host: LabHost) -> None:
    """Check that the host's emulator is installed.

    :raises CapabilityError: if it is not
    """
    if shutil.which(host.qemu) is None or qemu_version(host) is None:
        package = _PACKAGES.get(host.qemu, "qemu-system")
        raise CapabilityError(
            f"lab host {host.name}", host.qemu, "no such program that runs",
            f"run: apt-get install {package}",
        )  # fmt: skip


def command_line(host: LabHost, devices: Devices) -> list[str]:
    """Return the command that emulates a host."""
    mem = str(devices.mem_bytes)
    kernel_arguments = (f"console={host.console}", "panic=-1", "nokaslr", *host.arguments)
    quiet = () if devices.console is None else ("quiet",)
    return [
        host.qemu,
        *("-accel", "tcg"),
        *("-machine", f"{host.machine},memory-backend=ram"),
        *("-cpu", host.cpu),
        *("-smp", "1"),
        *("-m", f"size={mem}b"),
        *("-object", f"memory-backend-file,id=ram,size={mem},mem-path={devices.ram},share=on"),
        *("-kernel", str(devices.kernel)),
        *("-initrd", str(devices.initrd)),
        *("-append", " ".join((*kernel_arguments, *quiet))),
        *("-no-user-config", "-no-reboot", "-display", "none"),
        *(("-nic", "none", "-vga", "none") if host.buses else ("-nodefaults",)),
        *_console(devices),
        *_ports(devices, *host.buses[:1]),
        *_root(devices.shared, *host.buses[1:]),
        *_monitor(devices),
    ]


def _console(devices: Devices) -> tuple[str, ...]:
    if devices.console is None:
        return ("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console")
    return ("-chardev", f"file,id=console,path={devices.console}", "-serial", "chardev:console")


def _ports(devices: Devices, bus: str = "") -> list[str]:
    words = ["-device", "virtio-serial-pci" + (f",bus={bus}" if bus else "")]
    for name, fd in zip(PORTS, devices.port_fds, strict=True):
        words += ["-chardev", f"socket,id={name},fd={fd}"]
        words += ["-device", f"virtserialport,chardev={name},name={name}"]
    return words


def _root(folder: Path, bus: str = "") -> tuple[str, ...]:
    options = "security_model=none,readonly=on,multidevs=remap"
    device = "virtio-9p-pci,fsdev=root,mount_tag=root" + (f",bus={bus}" if bus else "")
    return ("-fsdev", f"local,id=root,path={folder},{options}", "-device", device)


def _monitor(devices: Devices) -> tuple[str, ...]:
    if devices.monitor_fd is None:
        return ()
    socket = f"socket,id=monitor,fd={devices.monitor_fd}"
    return ("-S", "-chardev", socket, "-mon", "chardev=monitor,mode=control")
