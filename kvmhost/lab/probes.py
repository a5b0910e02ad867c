"""Where the second-stage tables of guests begin: kernel probes, inside a host of the lab.

A kprobe on the function by which KVM gives the processor a root reports every root as it is
loaded; another one reports the end of a VM. Both are in a tracing instance of their own.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import platform
import re
from pathlib import Path
from typing import Self

from kvmhost.errors import CapabilityError
from kvmhost.files import os_errors

__all__ = ["RootProbe", "SeenRoot"]

_TRACING = Path("/sys/kernel/tracing")
_GROUP = "kvmhost_lab"

#: Probe of a root and of the end of a VM, by what uname calls the machine. Sources: Linux
#: v6.12, svm_load_mmu_pgd() of arch/x86/kvm/svm/svm.c, kvm_arch_vcpu_load() of
#: arch/arm64/kvm/arm.c, kvmhv_set_ptbl_entry() of arch/powerpc/kvm/book3s_hv_nested.c.
_PROBES = {
    "x86_64": ("svm_load_mmu_pgd vm=+0(%di):x64 pa=%si:x64 levels=%dx:u32", "%di"),
    "aarch64": (
        "kvm_arch_vcpu_load vm=vcpu->kvm:x64 pa=vcpu->arch.hw_mmu->pgd_phys:x64 "
        "ipa_bits=vcpu->arch.hw_mmu->pgt->ia_bits:u32",
        "%x0",
    ),
    "ppc64le": ("kvmhv_set_ptbl_entry vm=%gpr3:x64 entry=%gpr4:x64", "%gpr3"),
}
_FIELD = re.compile(r"(\w+)=(0x[0-9a-f]+|[0-9]+)")
#: Partition-table entry, first doubleword (Power ISA 3.0B, book III, 5.7.6.1): address and
#: size of the root.
_RPDB = 0x0FFF_FFFF_FFFF_FF00


@dataclasses.dataclass(frozen=True)
class SeenRoot:
    """A root that KVM loaded.

    :ivar vm: what tells VMs apart: the address of ``struct kvm``, or the LPID on powerpc
    """

    vm: int
    table_format: str
    pa: int
    levels: int = 0
    ipa_bits: int = 0
    page_shift: int = 12


class RootProbe:
    """Installs the probes; :meth:`roots` has what was loaded since.

    Start it before the guest: a root is reported when it is loaded, which on x86 may be once.

    :raises CapabilityError: if this kernel takes no such probe
    """

    def __init__(self, machine: str = "") -> None:
        self._machine = machine or platform.machine()
        self._roots: dict[int, SeenRoot] = {}
        self._instance = _TRACING / "instances" / _GROUP
        probe, vm_argument = _PROBES[self._machine]
        self.close()
        self._define(f"p:{_GROUP}/root {probe}")
        self._define(f"p:{_GROUP}/gone kvm_arch_destroy_vm vm={vm_argument}:x64")
        with os_errors(self._instance):
            self._instance.mkdir()
            for event in ("root", "gone"):
                (self._instance / "events" / _GROUP / event / "enable").write_text("1")
            self._pipe = os.open(self._instance / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        self._rest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._pipe)
        self.close()

    def _define(self, line: str) -> None:
        try:
            _append(line)
        except OSError as error:
            raise CapabilityError(
                "lab tables", f"the kernel probe {line.split()[1]}", str(error.strerror),
                "take a host with tracefs and kprobes; kvmhost lab list shows all",
            ) from error  # fmt: skip

    def close(self) -> None:
        """Remove the probes. Idempotent."""
        if not self._instance.parent.is_dir():
            return
        with os_errors(self._instance):
            if self._instance.is_dir():
                for event in ("root", "gone"):
                    (self._instance / "events" / _GROUP / event / "enable").write_text("0")
                self._instance.rmdir()
            defined = (_TRACING / "kprobe_events").read_text()
            for line in defined.splitlines():
                if (name := line.split()[0].partition(":")[2]).startswith(f"{_GROUP}/"):
                    _append(f"-:{name}")

    def roots(self) -> list[SeenRoot]:
        """Return the last root of each VM that exists, in the order of their first one."""
        for line in self._new_lines():
            fields = {name: int(value, 0) for name, value in _FIELD.findall(line)}
            if ": gone:" in line:
                self._roots.pop(fields["vm"], None)
            elif ": root:" in line:
                self._take(fields)
        return list(self._roots.values())

    def _take(self, fields: dict[str, int]) -> None:
        vm = fields["vm"]
        if self._machine == "ppc64le":
            if not fields["entry"]:  # the VM's entry of the partition table is cleared
                self._roots.pop(vm, None)
                return
            shift = os.sysconf("SC_PAGESIZE").bit_length() - 1
            self._roots[vm] = SeenRoot(
                vm, "radix", fields["entry"] & _RPDB, page_shift=16 if shift == 16 else 12
            )
        elif self._machine == "aarch64":
            self._roots[vm] = SeenRoot(vm, "stage2", fields["pa"], ipa_bits=fields["ipa_bits"])
        else:
            pa = fields["pa"] & 0x000F_FFFF_FFFF_F000
            self._roots[vm] = SeenRoot(vm, "npt", pa, levels=fields["levels"])

    def _new_lines(self) -> list[str]:
        while True:
            try:
                data = os.read(self._pipe, 1 << 16)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    raise
                break
            if not data:
                break
            self._rest += data.decode()
        *lines, self._rest = self._rest.split("\n")
        return lines


def _append(line: str) -> None:
    """Add a line to the definitions; open() in mode "a" would seek, which tracefs refuses."""
    fd = os.open(_TRACING / "kprobe_events", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)
