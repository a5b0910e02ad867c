"""The state of a vCPU, piece by piece: what a snapshot saves and restores.

Every piece has a ``get_…`` that returns a :class:`~kvmhost.kvm.structs.Struct` and a
``set_…`` that takes one, its fields, or its bytes. The vCPU must not be running.
In which order pieces are restored matters: CPUID first, then sregs, xsave, xcrs, MSRs,
local APIC, events, and mp_state last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.errors import IoctlError, LayoutError
from kvmhost.kvm.descriptor import Attributes, Descriptor, Source, as_struct
from kvmhost.kvm.structs import Struct

__all__ = ["VcpuState", "msr_table"]

_EIO = 5


class _Registers(Descriptor):
    """Registers that every processor has."""

    def get_regs(self) -> Struct:
        """Return ``struct kvm_regs``: the general registers.

        >>> vcpu.get_regs().rip  # doctest: +SKIP
        65520

        Source: KVM_GET_REGS. arm64 has KVM_GET_ONE_REG alone.
        """
        return self._get("KVM_GET_REGS", "kvm_regs")

    def set_regs(self, regs: Source) -> None:
        """Set the general registers.

        >>> regs = vcpu.get_regs(); regs.rip = 0x1000; vcpu.set_regs(regs)  # doctest: +SKIP

        Source: KVM_SET_REGS.
        """
        self._set("KVM_SET_REGS", "kvm_regs", regs)

    def get_sregs(self) -> Struct:
        """Return ``struct kvm_sregs``: segments, tables, control registers, one interrupt.

        >>> vcpu.get_sregs().cs  # doctest: +SKIP
        kvm_segment(base=0xffff0000, limit=0xffff, selector=0xf000, type=0xb, …)

        Source: KVM_GET_SREGS.
        """
        return self._get("KVM_GET_SREGS", "kvm_sregs")

    def set_sregs(self, sregs: Source) -> None:
        """Set segments, tables and control registers.

        >>> sregs = vcpu.get_sregs(); sregs.cs.base = 0; vcpu.set_sregs(sregs)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for a state that no processor can be in

        Source: KVM_SET_SREGS.
        """
        given = as_struct("kvm_sregs", sregs)
        self._set("KVM_SET_SREGS", "kvm_sregs", given, **_controls(given))

    def get_sregs2(self) -> Struct:
        """Return ``struct kvm_sregs2``: as :meth:`get_sregs`, with the PDPTRs of PAE paging.

        >>> vcpu.get_sregs2().pdptrs  # doctest: +SKIP
        [0, 0, 0, 0]

        Source: KVM_GET_SREGS2, with KVM_CAP_SREGS2.
        """
        return self._get("KVM_GET_SREGS2", "kvm_sregs2")

    def set_sregs2(self, sregs: Source) -> None:
        """Set segments, tables, control registers and PDPTRs.

        :raises IoctlError: ``EINVAL`` for a state that no processor can be in

        Source: KVM_SET_SREGS2.
        """
        given = as_struct("kvm_sregs2", sregs)
        self._set("KVM_SET_SREGS2", "kvm_sregs2", given, **_controls(given))

    def get_debugregs(self) -> Struct:
        """Return ``struct kvm_debugregs``: DR0 to DR3 (``db``), DR6, DR7.

        >>> vcpu.get_debugregs()  # doctest: +SKIP
        kvm_debugregs(db=[0, 0, 0, 0], dr6=0xffff0ff0, dr7=0x400, flags=0)

        Source: KVM_GET_DEBUGREGS.
        """
        return self._get("KVM_GET_DEBUGREGS", "kvm_debugregs")

    def set_debugregs(self, debugregs: Source) -> None:
        """Set the debug registers.

        >>> vcpu.set_debugregs({"db": [0x1000, 0, 0, 0], "dr6": 0xFFFF0FF0, "dr7": 0x400})
        ... # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for flags, or upper halves of DR6 and DR7

        Source: KVM_SET_DEBUGREGS.
        """
        self._set("KVM_SET_DEBUGREGS", "kvm_debugregs", debugregs)


class _Floating(Descriptor):
    """Floating-point and vector registers."""

    def get_fpu(self) -> Struct:
        """Return ``struct kvm_fpu``: x87 and SSE registers.

        >>> vcpu.get_fpu().xmm.numpy().shape  # 16 registers of 16 bytes  # doctest: +SKIP
        (16, 16)

        Source: KVM_GET_FPU.
        """
        return self._get("KVM_GET_FPU", "kvm_fpu")

    def set_fpu(self, fpu: Source) -> None:
        """Set x87 and SSE registers.

        >>> fpu = vcpu.get_fpu(); fpu.mxcsr = 0x1F80; vcpu.set_fpu(fpu)  # doctest: +SKIP

        Source: KVM_SET_FPU.
        """
        self._set("KVM_SET_FPU", "kvm_fpu", fpu)

    def get_xsave(self) -> Struct:
        """Return ``struct kvm_xsave``: 4096 bytes in XSAVE's standard form.

        >>> bytes(vcpu.get_xsave())[160:176]  # xmm0  # doctest: +SKIP
        b'\\x00…

        :raises IoctlError: ``EINVAL`` where the state is longer: use :meth:`get_xsave2`

        Source: KVM_GET_XSAVE. Offsets of the parts are in the host's CPUID leaf 0xd.
        """
        return self._get("KVM_GET_XSAVE", "kvm_xsave")

    def get_xsave2(self, n_bytes: int) -> Struct:
        """Return ``struct kvm_xsave`` of any length.

        >>> vcpu.get_xsave2(vm.check_extension(Cap.XSAVE2))  # doctest: +SKIP

        :param n_bytes: the value of the VM's KVM_CAP_XSAVE2, at least 4096. KVM would
            write past the end of a smaller buffer, so a smaller number means 4096

        Source: KVM_GET_XSAVE2.
        """
        area = Struct.table("kvm_xsave", max(0, n_bytes - 4096 + 3) // 4)
        self._pass("KVM_GET_XSAVE2", area, n_bytes=n_bytes)
        return area

    def set_xsave(self, area: Source) -> None:
        """Set all that XSAVE covers, from :meth:`get_xsave` or :meth:`get_xsave2`.

        >>> other.set_xsave(vcpu.get_xsave())  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for parts that the guest's CPUID lacks

        Source: KVM_SET_XSAVE.
        """
        self._set("KVM_SET_XSAVE", "kvm_xsave", area)

    def get_xcrs(self) -> Struct:
        """Return ``struct kvm_xcrs``: extended control registers, currently only XCR0.

        >>> vcpu.get_xcrs().xcrs[0]  # doctest: +SKIP
        kvm_xcr(xcr=0, value=1)

        Source: KVM_GET_XCRS.
        """
        return self._get("KVM_GET_XCRS", "kvm_xcrs")

    def set_xcrs(self, xcrs: Source) -> None:
        """Set the extended control registers.

        >>> xcrs = vcpu.get_xcrs(); xcrs.xcrs[0].value = 7; vcpu.set_xcrs(xcrs)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for parts that the guest's CPUID lacks

        Source: KVM_SET_XCRS.
        """
        self._set("KVM_SET_XCRS", "kvm_xcrs", xcrs)


class _Identity(Descriptor):
    """The identification of the processor: CPUID, MSRs, frequency."""

    def set_cpuid(self, cpuid2: Source) -> None:
        """Set the CPUID leaves, from ``struct kvm_cpuid2``; before the first run.

        >>> vcpu.set_cpuid(kvm.supported_cpuid())  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for a change after the first run, ``E2BIG`` for
            more entries than KVM takes (256)

        Source: KVM_SET_CPUID2.
        """
        self._set("KVM_SET_CPUID2", "kvm_cpuid2", cpuid2)

    def get_cpuid(self) -> Struct:
        """Return ``struct kvm_cpuid2``: the current CPUID leaves.

        >>> len(vcpu.get_cpuid().entries)  # doctest: +SKIP
        75

        Not always what was set: KVM keeps bits that mirror state (OSXSAVE) up to date.

        Source: KVM_GET_CPUID2.
        """
        return self._get_table("KVM_GET_CPUID2", "kvm_cpuid2", 128)

    def set_cpuid1(self, cpuid: Source) -> None:
        """Set the CPUID leaves, from ``struct kvm_cpuid``: without sub-leaves.

        >>> vcpu.set_cpuid1({"entries": [{"function": 0, "eax": 1}]})  # doctest: +SKIP

        Source: KVM_SET_CPUID, the form before Linux 2.6.26.
        """
        self._set("KVM_SET_CPUID", "kvm_cpuid", cpuid)

    def supported_hv_cpuid(self) -> Struct:
        """Return ``struct kvm_cpuid2`` of the Hyper-V leaves that this vCPU may have.

        Source: KVM_GET_SUPPORTED_HV_CPUID, with KVM_CAP_HYPERV_CPUID.
        """
        return self._get_table("KVM_GET_SUPPORTED_HV_CPUID", "kvm_cpuid2")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Return MSRs by index.

        >>> vcpu.get_msrs([0x10, 0x277])  # TSC and PAT  # doctest: +SKIP
        {16: 81526344, 631: 1974748653749254}

        :return: in the order requested; the dict may be incomplete: KVM stops at the first
            MSR that it refuses

        Source: KVM_GET_MSRS.
        """
        table = msr_table(dict.fromkeys(indices, 0))
        n_read = self._pass("KVM_GET_MSRS", table, nmsrs=table.nmsrs)
        return {entry.index: entry.data for entry in table.entries[:n_read]}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set MSRs, in the order of ``values``.

        >>> vcpu.set_msrs({0xC000_0082: entry})  # LSTAR  # doctest: +SKIP

        :raises IoctlError: ``EIO`` with the first MSR that KVM refuses; those before it
            are set

        Source: KVM_SET_MSRS.
        """
        table = msr_table(values)
        n_set = self._pass("KVM_SET_MSRS", table, nmsrs=table.nmsrs)
        if n_set < len(values):
            refused = table.entries[n_set]
            shown = {"index": refused.index, "data": refused.data}
            raise IoctlError("KVM_SET_MSRS", _EIO, shown)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the frequency of the guest's TSC, in kHz.

        >>> vcpu.set_tsc_khz(vcpu.get_tsc_khz())  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` without KVM_CAP_TSC_CONTROL and far from the host's

        Source: KVM_SET_TSC_KHZ.
        """
        self._call("KVM_SET_TSC_KHZ", khz, khz=khz)

    def get_tsc_khz(self) -> int:
        """Return the frequency of the guest's TSC, in kHz.

        >>> vcpu.get_tsc_khz()  # doctest: +SKIP
        2595120

        :raises IoctlError: ``EIO`` on a host without a stable TSC

        Source: KVM_GET_TSC_KHZ.
        """
        return self._call("KVM_GET_TSC_KHZ")

    def reg_list(self) -> list[int]:
        """Return the ids that :meth:`get_one_reg` takes.

        :raises IoctlError: ``EINVAL`` or ``ENOTTY`` on x86 before Linux 6.18

        Source: KVM_GET_REG_LIST. On arm64 the whole state of a vCPU.
        """
        return list(self._get_table("KVM_GET_REG_LIST", "kvm_reg_list").reg)

    def get_one_reg(self, register: int) -> int:
        """Return one register of up to 64 bits by its id.

        >>> vcpu.get_one_reg(0x2030_0002_0000_0174)  # MSR 0x174  # doctest: +SKIP
        0

        :raises IoctlError: ``ENOENT``, ``EINVAL`` or ``ENOTTY`` if there is none
        :raises LayoutError: if the id is one of a wider register

        Source: KVM_GET_ONE_REG.
        """
        value = ffi.new("uint64_t *")
        self._pass("KVM_GET_ONE_REG", _one_reg(register, value), id=register)
        return int(value[0])

    def set_one_reg(self, register: int, value: int) -> None:
        """Set one register of up to 64 bits by its id.

        >>> vcpu.set_one_reg(0x2030_0002_0000_0174, 0x10)  # doctest: +SKIP

        :raises LayoutError: if the id is one of a wider register

        Source: KVM_SET_ONE_REG.
        """
        data = ffi.new("uint64_t *", value)
        self._pass("KVM_SET_ONE_REG", _one_reg(register, data), id=register)


class _Events(Descriptor):
    """What is about to happen to the processor."""

    def get_vcpu_events(self) -> Struct:
        """Return ``struct kvm_vcpu_events``: pending and injected exceptions, interrupts and NMIs.

        >>> vcpu.get_vcpu_events().nmi  # doctest: +SKIP
        (injected=0, pending=0, masked=0)

        Source: KVM_GET_VCPU_EVENTS.
        """
        return self._get("KVM_GET_VCPU_EVENTS", "kvm_vcpu_events")

    def set_vcpu_events(self, events: Source) -> None:
        """Set pending events; ``flags`` selects the valid optional fields.

        >>> other.set_vcpu_events(vcpu.get_vcpu_events())  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for flags that KVM does not know

        Source: KVM_SET_VCPU_EVENTS.
        """
        self._set("KVM_SET_VCPU_EVENTS", "kvm_vcpu_events", events)

    def get_mp_state(self) -> int:
        """Return ``KVM_MP_STATE_…``: running, halted, or waiting for INIT and SIPI.

        >>> vcpu.get_mp_state() == lib.KVM_MP_STATE_RUNNABLE  # doctest: +SKIP
        True

        Source: KVM_GET_MP_STATE.
        """
        return int(self._get("KVM_GET_MP_STATE", "kvm_mp_state").mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set ``KVM_MP_STATE_…``.

        >>> second.set_mp_state(lib.KVM_MP_STATE_RUNNABLE)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for a state that x86 does not have, or, without
            local APICs in the kernel, any but RUNNABLE

        Source: KVM_SET_MP_STATE.
        """
        self._make("KVM_SET_MP_STATE", "kvm_mp_state", mp_state=state)

    def get_lapic(self) -> Struct:
        """Return ``struct kvm_lapic_state``: the local APIC's page of registers.

        >>> lapic_register(vcpu.get_lapic(), 0x20) >> 24  # the APIC's id  # doctest: +SKIP
        0

        :raises IoctlError: ``EINVAL`` without local APICs in the kernel

        Source: KVM_GET_LAPIC.
        """
        return self._get("KVM_GET_LAPIC", "kvm_lapic_state")

    def set_lapic(self, state: Source) -> None:
        """Set the local APIC's registers.

        >>> other.set_lapic(vcpu.get_lapic())  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` without local APICs in the kernel, or for a bad id

        Source: KVM_SET_LAPIC.
        """
        self._set("KVM_SET_LAPIC", "kvm_lapic_state", state)

    def get_nested_state(self, n_bytes: int) -> bytes:
        """Return ``struct kvm_nested_state`` and what follows it.

        >>> vcpu.get_nested_state(vm.check_extension(Cap.NESTED_STATE))  # doctest: +SKIP

        :param n_bytes: size of the buffer: the value of KVM_CAP_NESTED_STATE
        :raises IoctlError: ``EINVAL`` without KVM_CAP_NESTED_STATE, ``E2BIG``

        Source: KVM_GET_NESTED_STATE.
        """
        # SAFETY: the buffer lives until the call returns; KVM keeps to the size in it.
        buffer = ffi.new("uint8_t[]", max(n_bytes, 128))
        head = Struct.view(
            "kvm_nested_state", ffi.cast("struct kvm_nested_state *", buffer), buffer
        )
        head.size = len(buffer)
        self._pass("KVM_GET_NESTED_STATE", buffer, size=len(buffer))
        return bytes(ffi.buffer(buffer))[: head.size]

    def set_nested_state(self, state: bytes) -> None:
        """Set what :meth:`get_nested_state` returned.

        :raises IoctlError: ``EINVAL`` without KVM_CAP_NESTED_STATE or for a bad state
        :raises LayoutError: if the size in its header is not its length

        Source: KVM_SET_NESTED_STATE.
        """
        head = ffi.new("struct kvm_nested_state *")
        ffi.memmove(head, state, min(len(state), ffi.sizeof("struct kvm_nested_state")))
        if head.size != len(state):
            raise LayoutError(f"nested state: {len(state)} bytes, its header says {head.size}")
        # SAFETY: KVM reads the header and then the size in it, which lies within the buffer.
        buffer = ffi.new("uint8_t[]", bytes(state).ljust(128, b"\0"))
        self._pass("KVM_SET_NESTED_STATE", buffer, size=len(state))


class VcpuState(_Registers, _Floating, _Identity, _Events, Attributes):
    """All pieces of a vCPU's state."""

    def get_tsc_offset(self) -> int:
        """Return what is added to the host's TSC for the guest, modulo 2**64.

        >>> vcpu.get_tsc_offset()  # doctest: +SKIP
        18446743936478052326

        :raises IoctlError: ``ENXIO`` or ``ENOTTY`` before Linux 5.16

        Source: KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.
        """
        return self.get_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET)

    def set_tsc_offset(self, offset: int) -> None:
        """Set what is added to the host's TSC for the guest, modulo 2**64.

        Source: KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.
        """
        self.set_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, offset % (1 << 64))


def msr_table(values: Mapping[int, int]) -> Struct:
    """Return ``struct kvm_msrs`` of indices and values.

    >>> msr_table({0x10: 5}).entries[0].index
    16
    """
    entries = [{"index": index, "data": data} for index, data in values.items()]
    return Struct("kvm_msrs", entries=entries)


def _controls(sregs: Struct) -> dict[str, int]:
    return {name: int(getattr(sregs, name)) for name in ("cr0", "cr3", "cr4", "efer")}


def _one_reg(register: int, value: Any) -> Struct:
    # KVM_REG_SIZE, Linux v6.12, include/uapi/linux/kvm.h: the id encodes how many bytes KVM copies.
    n_bytes = 1 << (register >> 52 & 0xF)
    if n_bytes > ffi.sizeof("uint64_t"):
        raise LayoutError(f"register {register:#x} has {n_bytes} bytes; need 8 or less")
    # SAFETY: an address only; the caller holds value, which has 8 bytes, until the call returns.
    return Struct("kvm_one_reg", id=register, addr=int(ffi.cast("uintptr_t", value)))
