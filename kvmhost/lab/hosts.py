"""The emulated hosts of the lab: one description each.

A host is an unmodified kernel of the distribution under QEMU's software emulation (TCG), with
a processor that has virtualization extensions; its KVM runs guests. Nothing here depends on
the processor of the machine outside.
"""

from __future__ import annotations

import dataclasses
import enum

from kvmhost.errors import LayoutError
from kvmhost.lab.devicetree import AddedProperty
from kvmhost.suggest import unknown_name

__all__ = ["HOSTS", "LabHost", "RootKind", "find_host"]


class RootKind(enum.Enum):
    """Where the root file system inside a host comes from."""

    #: The root of the machine outside, read-only under an overlay.
    MACHINE = "the machine's own, read-only"
    #: A root of the host's architecture, made of packages.
    PACKAGES = "made of packages"


@dataclasses.dataclass(frozen=True)
class LabHost:
    """One emulated host.

    :ivar name: architecture and kernel release, and what else distinguishes it
    :ivar architecture: as Debian names it
    :ivar about: processor and second-stage paging, one line
    :ivar kernel: table of ``pins.toml`` with the kernel's packages
    :ivar qemu: the emulator's executable
    :ivar machine: QEMU's machine type with its properties, without ``memory-backend``
    :ivar cpu: QEMU's processor model
    :ivar console: serial console, as the kernel names it
    :ivar modules: what the initial file system loads; built-in ones are skipped
    :ivar root: where the root file system comes from
    :ivar arguments: further arguments of the kernel
    :ivar buses: of a machine with one slot to a PCI bus, and buses only with QEMU's default
        devices: where ports and root go
    :ivar added_property: what QEMU leaves out of its device tree, if anything
    """

    name: str
    architecture: str
    about: str
    kernel: str
    qemu: str
    machine: str
    cpu: str
    console: str
    modules: tuple[str, ...]
    root: RootKind = RootKind.MACHINE
    arguments: tuple[str, ...] = ()
    buses: tuple[str, ...] = ()
    added_property: AddedProperty | None = None


#: Page sizes of POWER9's radix tables: encoding in tlbie << 29 | shift, of 4 KiB, 64 KiB, 2 MiB
#: and 1 GiB. Sources: QEMU, POWER9_radix_page_info of target/ppc/cpu_init.c, PNV_FDT_ADDR of
#: include/hw/ppc/pnv.h; Linux, radix_dt_scan_page_sizes().
_RADIX_PAGE_SIZES = AddedProperty(
    pa=0x0100_0000,
    node="PowerPC,POWER9@",
    name="ibm,processor-radix-AP-encodings",
    cells=(0x0000_000C, 0xA000_0010, 0x2000_0015, 0x4000_001E),
)

#: Modules that every host needs: its devices, the root file system, zram for swap.
COMMON_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "zram")


def _amd64(release: str) -> LabHost:
    return LabHost(
        name=f"amd64-{release}",
        architecture="amd64",
        about="AMD, SVM with nested paging (tdp_mmu)",
        kernel=f"amd64-{release}",
        qemu="qemu-system-x86_64",
        machine="pc",
        # numpy's AVX2 code gives wrong answers under QEMU 7.2.
        cpu="max,avx2=off",
        console="ttyS0",
        modules=(*COMMON_MODULES, "kvm", "kvm-amd"),
    )


def _arm64(release: str, *, hardware_access: bool = True) -> LabHost:
    """Return a host at EL2; without hardware access flags, an old page faults when it is used."""
    flag = "hardware access flag" if hardware_access else "no hardware access flag"
    return LabHost(
        name=f"arm64-{release}" + ("" if hardware_access else "-noaf"),
        architecture="arm64",
        about=f"EL2, stage 2, {flag}",
        kernel=f"arm64-{release}",
        qemu="qemu-system-aarch64",
        machine="virt,virtualization=on,gic-version=3",
        # The architected algorithm of pointer authentication is slow to emulate.
        cpu="max,pauth-impdef=on" if hardware_access else "cortex-a72",
        console="ttyAMA0",
        modules=COMMON_MODULES,
        root=RootKind.PACKAGES,
    )


def _ppc64el(release: str) -> LabHost:
    return LabHost(
        name=f"ppc64el-{release}",
        architecture="ppc64el",
        about="POWER9 bare metal, radix, 64 KiB pages",
        kernel=f"ppc64el-{release}",
        qemu="qemu-system-ppc64",
        machine="powernv9",
        cpu="power9",
        console="hvc0",
        modules=(*COMMON_MODULES, "kvm", "kvm-hv"),
        root=RootKind.PACKAGES,
        buses=("pcie.1", "pcie.0"),
        added_property=_RADIX_PAGE_SIZES,
    )


HOSTS: dict[str, LabHost] = {
    host.name: host
    for host in (
        _amd64("6.1"),
        _amd64("6.12"),
        _amd64("7.3"),
        _arm64("6.12"),
        _arm64("6.12", hardware_access=False),
        _arm64("7.3"),
        _arm64("7.3", hardware_access=False),
        _ppc64el("6.1"),
    )
}


def find_host(name: str) -> LabHost:
    """Return the host of that name.

    :raises LayoutError: if there is none
    """
    if name not in HOSTS:
        problem = unknown_name("host", name, HOSTS)
        raise LayoutError(f"{problem}; kvmhost lab list shows all", field="host")
    return HOSTS[name]
