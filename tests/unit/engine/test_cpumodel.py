"""The processor that a ``pc`` guest is shown."""

from __future__ import annotations

import struct

import pytest

from kvmhost.engine.cpumodel import firmware_msrs, pc_cpuid

_ENTRY = struct.Struct("<7I12x")
Registers = tuple[int, int, int, int]

AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)  # Auth, cAMD, enti
INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)


def supported(vendor: tuple[int, int, int] = AMD) -> bytes:
    """All features in every leaf that matters."""
    ones = (0xFFFF_FFFF,) * 4
    leaves = [(0, 0, (0x1F, *vendor)), (1, 0, ones), (6, 0, ones), (7, 0, ones), (7, 1, ones)]
    leaves += [(0xB, 0, ones), (0xD, 0, ones), (0x14, 0, ones), (0x1F, 0, ones)]
    leaves += [(0x4000_0000, 0, (0x4000_0001, 1, 2, 3)), (0x4000_0001, 0, ones)]
    leaves += [(0x8000_0000, 0, (0x8000_0021, *vendor)), (0x8000_0001, 0, ones)]
    leaves += [(0x8000_0008, 0, (0x3030, 7, 7, 7)), (0x8000_001E, 0, ones)]
    table = b"".join(_ENTRY.pack(function, sub, 0, *values) for function, sub, values in leaves)
    return struct.pack("<II", len(leaves), 0) + table


def leaves(cpuid: bytes) -> dict[tuple[int, int], Registers]:
    entries = list(_ENTRY.iter_unpack(cpuid[8:]))
    assert struct.unpack_from("<I", cpuid)[0] == len(entries)
    assert len({entry[:2] for entry in entries}) == len(entries)
    return {entry[:2]: entry[3:] for entry in entries}


def test_the_plain_processor_is_the_same_everywhere() -> None:
    found = leaves(pc_cpuid(supported(), 0, 1))
    assert found[0, 0] == (0xD, *AMD)
    assert found[1, 0] == (0x60FB1, 0xFFFF, 0x8020_2001, 0x078B_FBFD)
    assert found[7, 0] == found[0xD, 0] == (0, 0, 0, 0)
    assert {key for key in found if 0xD < key[0] < 0x4000_0000 or key == (7, 1)} == set()
    assert max(key[0] for key in found) == found[0x8000_0000, 0][0] - 2 == 0x8000_0008
    assert found[0x8000_0008, 0][0] == 0x3028
    name = b"".join(struct.pack("<4I", *found[0x8000_0002 + i, 0]) for i in range(3))
    assert name.rstrip(b"\0") == b"QEMU Virtual CPU version 2.5+"


def test_the_host_processor_has_all_that_kvm_supports() -> None:
    found = leaves(pc_cpuid(supported(), 0, 1, "host"))
    assert found[1, 0][2] == 0xFFFF_FFFF
    assert found[7, 1] == found[0xD, 0] == (0xFFFF_FFFF,) * 4
    assert (0x14, 0) in found


@pytest.mark.parametrize("model", ["plain", "host"])
def test_each_processor_knows_which_it_is(model: str) -> None:
    found = leaves(pc_cpuid(supported(), 2, 3, model))
    assert found[1, 0][1] >> 16 == 0x0203
    assert found[1, 0][3] >> 28 & 1
    assert (found[0xB, 1][1], found[0xB, 1][3]) == (3, 2)
    assert found[0x8000_0008, 0][2] & 0xF0FF == 0x2002
    assert (0x1F, 0) not in found


@pytest.mark.parametrize(
    ("vendor", "low_end", "base", "mask", "revision"),
    [
        (AMD, 128 << 20, 0x8000_0000, 0xFF_8000_0800, 0x0100_0065),
        (INTEL, 3 << 30, 0xC000_0000, 0xFF_C000_0800, 1 << 32),
    ],
)
def test_what_firmware_leaves(
    vendor: tuple[int, int, int], low_end: int, base: int, mask: int, revision: int
) -> None:
    msrs = firmware_msrs(pc_cpuid(supported(vendor), 0, 1), low_end)
    assert (msrs[0x200], msrs[0x201], msrs[0x2FF], msrs[0x8B]) == (base, mask, 0xC06, revision)
    assert msrs[0x26F] == 0x0505_0505_0505_0505


def test_an_intel_processor_names_its_vendor_twice_and_has_no_legacy_topology() -> None:
    table = bytearray(supported(INTEL))
    # As Intel's own: leaf 0x80000000 has no vendor.
    for at in range(8, len(table), _ENTRY.size):
        if struct.unpack_from("<I", table, at)[0] == 0x8000_0000:
            struct.pack_into("<3I", table, at + 16, 0, 0, 0)
    found = leaves(pc_cpuid(bytes(table), 0, 3))
    assert found[0, 0][1:] == found[0x8000_0000, 0][1:] == INTEL
    assert not found[0x8000_0001, 0][2] & 2
    assert leaves(pc_cpuid(supported(AMD), 0, 3))[0x8000_0001, 0][2] & 2
