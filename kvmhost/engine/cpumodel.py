"""The processor model of a ``pc`` guest: CPUID, and the MSRs that firmware sets.

Two models. ``plain``, the default, is QEMU's default model (``qemu64``): the same on
every host, so that an image behaves the same under both. ``host`` is everything that KVM
supports. KVM may add to the model: it cannot hide features that the hardware exposes to
the guest directly.

Source: target/i386/cpu.c of QEMU 7.2 (model and caches); its firmware for the MTRRs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["CPU_MODELS", "MCG_CAP", "firmware_msrs", "pc_cpuid"]

CPU_MODELS = ("plain", "host")

#: Ten machine-check banks, software recovery, control register. Masked by what KVM has.
MCG_CAP = 0x100_010A

_Entry = tuple[int, int, int, int, int, int, int]
_CPUID_ENTRY = struct.Struct("<7I12x")
_BIT_X2APIC, _BIT_TSC_DEADLINE, _BIT_HYPERVISOR = 1 << 21, 1 << 24, 1 << 31
_BIT_HTT = 1 << 28

_MAX_BASIC, _MAX_EXTENDED = 0xD, 0x8000_000A
_SIGNATURE = 0x0006_0FB1  # family 15, model 107, stepping 1
_NAME = b"QEMU Virtual CPU version 2.5+".ljust(48, b"\0")
_PHYSICAL_BITS, _VIRTUAL_BITS = 40, 48
_ALL = 0xFFFF_FFFF
#: Masks for KVM's supported bits: (eax, ebx, ecx, edx).
_MASKS = {
    0x1: (0, _ALL, 0x8020_2001, 0x078B_FBFD),
    0x6: (0, 0, 0, 0),
    0x7: (0, 0, 0, 0),
    0xD: (0, 0, 0, 0),
    0x4000_0001: (0x0100_007B, 0, 0, 0),
    0x8000_0001: (0, 0, 0x3, 0x2193_FBFD),
    0x8000_0007: (0, 0, 0, 0),
    0x8000_0008: (0, 0, _ALL, 0),
    0x8000_000A: (0, 0, 0, 0),
}
#: Values that the model adds.
_VALUES = {
    0x1: (_SIGNATURE, 0, 0, 0),
    0x5: (0, 0, 3, 0),
    0x8000_0001: (_SIGNATURE, 0, 0, 0),
    0x8000_0002: struct.unpack_from("<4I", _NAME, 0),
    0x8000_0003: struct.unpack_from("<4I", _NAME, 16),
    0x8000_0004: struct.unpack_from("<4I", _NAME, 32),
    # Caches: 64 KiB and 64 KiB, 512 KiB, 16 MiB.
    0x8000_0005: (0x01FF_01FF, 0x01FF_01FF, 0x4002_0140, 0x4002_0140),
    0x8000_0006: (0, 0x4200_4200, 0x0200_8140, 0x0080_8140),
}

_MTRR_DEF_TYPE, _MTRR_BASE, _MTRR_MASK = 0x2FF, 0x200, 0x201
_WRITE_BACK, _WRITE_PROTECT = 0x0606_0606_0606_0606, 0x0505_0505_0505_0505
#: The low 640 KiB are write-back, the upper 256 KiB of the first MiB write-protected.
_FIXED_MTRRS = {0x250: _WRITE_BACK, 0x258: _WRITE_BACK} | dict.fromkeys(
    range(0x268, 0x270), _WRITE_PROTECT
)
#: Vendor of leaf 0: ebx, ecx, edx.
_INTEL = struct.unpack("<3I", b"Genu" + b"ntel" + b"ineI")
_MICROCODE, _AMD_REVISION, _INTEL_REVISION = 0x8B, 0x0100_0065, 1 << 32


def pc_cpuid(supported: bytes, index: int, n_vcpus: int, model: str = "plain") -> bytes:
    """Return ``struct kvm_cpuid2`` for one processor.

    :param supported: the answer of KVM_GET_SUPPORTED_CPUID
    :param model: one of :data:`CPU_MODELS`
    """
    entries = list(_CPUID_ENTRY.iter_unpack(_entries(supported)))
    if model == "plain":
        entries = list(_plain(entries))
    out, count = b"", 0
    intel = any(entry[0] == 0 and entry[4:7] == _INTEL for entry in entries)
    for entry in entries:
        if entry[0] in (0xB, 0x1F):
            continue
        out += _CPUID_ENTRY.pack(*_identify(entry, index, n_vcpus, model, intel))
        count += 1
    bits = _id_bits(n_vcpus)
    for sub, shift, number, kind in ((0, 0, 1, 1), (1, bits, n_vcpus, 2)):
        out += _CPUID_ENTRY.pack(0xB, sub, 1, shift, number, sub | kind << 8, index)
        count += 1
    return struct.pack("<II", count, 0) + out


def firmware_msrs(cpuid: bytes, low_end: int) -> dict[int, int]:
    """Return the MSR values that firmware sets: memory types, microcode revision.

    :param cpuid: what :func:`pc_cpuid` returned
    :param low_end: first gpa behind the memory below 4 GiB
    """
    by_leaf = {entry[0]: entry for entry in _CPUID_ENTRY.iter_unpack(cpuid[8:])}
    # ebx, edx, ecx of leaf 0 spell the vendor's name.
    amd = struct.pack("<I", by_leaf[0][4]) in (b"Auth", b"Hygo")
    bits = by_leaf[0x8000_0008][3] & 0xFF if 0x8000_0008 in by_leaf else 36
    devices = 0x8000_0000 if low_end <= 0x8000_0000 else 0xC000_0000
    return _FIXED_MTRRS | {
        _MTRR_BASE: devices,  # uncached, up to 4 GiB
        _MTRR_MASK: (1 << bits) - ((1 << 32) - devices) | 1 << 11,
        _MTRR_DEF_TYPE: 0xC06,
        _MICROCODE: _AMD_REVISION if amd else _INTEL_REVISION,
    }


def _entries(cpuid: bytes) -> bytes:
    return cpuid[8 : 8 + (len(cpuid) - 8) // _CPUID_ENTRY.size * _CPUID_ENTRY.size]


def _id_bits(n_vcpus: int) -> int:
    return max(0, (n_vcpus - 1).bit_length())


def _plain(entries: list[_Entry]) -> Iterator[_Entry]:
    """Reduce what KVM supports to the model; leaves that KVM does not have are added."""
    seen = set()
    vendor = next((registers[1:] for function, _, _, *registers in entries if not function), None)
    for function, sub, flags, *registers in entries:
        limit = _MAX_EXTENDED if function >= 0x8000_0000 else _MAX_BASIC
        if function > limit and not 0x4000_0000 <= function < 0x4000_0010:
            continue
        if function == 7 and sub:  # Sub-leaf 0 reports that there are no others.
            continue
        seen.add(function)
        if function in (0, 0x8000_0000):
            registers[0] = limit
            # Intel's own leaf 0x80000000 has no vendor; the model names it in both.
            registers[1:] = vendor or registers[1:]
        mask = _MASKS.get(function, (0,) * 4 if function in _VALUES else (_ALL,) * 4)
        values = _VALUES.get(function, (0,) * 4)
        eax, ebx, ecx, edx = (
            register & kept | value
            for register, kept, value in zip(registers, mask, values, strict=True)
        )
        if function == 0x8000_0008:
            eax = min(registers[0] & 0xFF, _PHYSICAL_BITS) | _VIRTUAL_BITS << 8
        yield function, sub, flags, eax, ebx, ecx, edx
    for function in sorted(set(_VALUES) - seen):
        eax, ebx, ecx, edx = _VALUES[function]
        yield function, 0, 0, eax, ebx, ecx, edx


def _identify(entry: _Entry, index: int, n_vcpus: int, model: str, intel: bool) -> _Entry:
    """Set the index and the number of processors."""
    function, sub, flags, eax, ebx, ecx, edx = entry
    bits = _id_bits(n_vcpus)
    if function == 1:
        siblings = min(n_vcpus, 255) << 16 if n_vcpus > 1 else 0
        ebx = ebx & 0xFFFF | siblings | (index & 0xFF) << 24
        ecx |= _BIT_X2APIC | _BIT_HYPERVISOR | (_BIT_TSC_DEADLINE if model == "host" else 0)
        edx = edx | _BIT_HTT if n_vcpus > 1 else edx & ~_BIT_HTT
    elif function == 4 and eax & 0x1F:
        eax = eax & 0x3FFF | min((1 << bits) - 1, 63) << 26
    elif function == 0x8000_0001:
        # CmpLegacy; Linux ignores the topology of an Intel processor that has it.
        ecx = ecx | 2 if n_vcpus > 1 and not intel else ecx & ~2
    elif function == 0x8000_0008:
        ecx = ecx & ~0xF0FF | min(n_vcpus - 1, 255) | bits << 12
    elif function == 0x8000_001E:
        eax, ebx, ecx = index, index & 0xFF, 0
    return function, sub, flags, eax, ebx, ecx, edx
