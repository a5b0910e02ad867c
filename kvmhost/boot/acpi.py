"""ACPI tables of the ``pc`` machine, as bytes.

RSDP (revision 2, so with RSDT and XSDT), FADT, FACS, MADT and a DSDT with the
objects that power-off needs. Source: ACPI Specification 6.5, chapters 5 and 20 (AML).
"""

from __future__ import annotations

import struct

__all__ = ["PM_CONTROL_PORT", "PM_EVENT_PORT", "PM_TIMER_PORT", "SCI_IRQ", "acpi_tables"]

PM_EVENT_PORT = 0x600
PM_CONTROL_PORT = 0x604
PM_TIMER_PORT = 0x608
SMI_PORT, ACPI_ENABLE, ACPI_DISABLE = 0xB2, 0xF1, 0xF0
SCI_IRQ = 9

LOCAL_APIC_GPA, IO_APIC_GPA = 0xFEE0_0000, 0xFEC0_0000

_OEM, _TABLE_ID = b"KVMHST", b"KVMHOST "
#: Name (_S5, Package (4) { 0, 0, 0, 0 }): sleep type 0 is power-off.
_DSDT_AML = b"\x08_S5_\x12\x06\x04\0\0\0\0"
# Lines that are level-triggered and active high: PCI's and the SCI's.
_LEVEL_IRQS = (5, 9, 10, 11)


def acpi_tables(gpa: int, n_cpus: int) -> tuple[bytes, bytes]:
    """Build the tables.

    :param gpa: where all but the RSDP will lie, page-aligned
    :param n_cpus: processors, APIC ids from 0 on
    :return: the RSDP, and the rest
    """
    blob = bytearray()

    def put(table: bytes) -> int:
        blob.extend(bytes(-len(blob) % 64))
        at = gpa + len(blob)
        blob.extend(table)
        return at

    facs = put(struct.pack("<4sIIIII", b"FACS", 64, 0, 0, 0, 0).ljust(64, b"\0"))
    dsdt = put(_table(b"DSDT", 1, _DSDT_AML))
    listed = [put(_fadt(facs, dsdt)), put(_madt(n_cpus))]
    rsdt = put(_table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    return _rsdp(rsdt, xsdt), bytes(blob)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    head = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, _OEM, _TABLE_ID, 1, b"KVMH", 1
    )
    table = bytearray(head + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def _rsdp(rsdt: int, xsdt: int) -> bytes:
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, rsdt, 36, xsdt, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    return bytes(rsdp)


def _fadt(facs: int, dsdt: int) -> bytes:
    body = bytearray(244 - 36)

    def put(layout: str, offset: int, *values: int) -> None:
        struct.pack_into(layout, body, offset - 36, *values)

    put("<II", 36, facs, dsdt)
    put("<H", 46, SCI_IRQ)
    put("<IBB", 48, SMI_PORT, ACPI_ENABLE, ACPI_DISABLE)
    put("<I", 56, PM_EVENT_PORT)
    put("<I", 64, PM_CONTROL_PORT)
    put("<I", 76, PM_TIMER_PORT)
    put("<BBxB", 88, 4, 2, 4)  # lengths: event, control, timer
    put("<HH", 96, 0xFFF, 0xFFF)  # no C2, no C3
    put("<B", 108, 0x32)  # century in CMOS
    put("<H", 109, 0b11)  # legacy devices, keyboard controller
    # WBINVD works, C1 everywhere, no power or sleep button, reset register.
    put("<I", 112, 1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 10)
    put("<BBBBQB", 116, 1, 8, 0, 1, 0xCF9, 6)
    put("<QQ", 132, facs, dsdt)
    put("<BBBBQ", 148, 1, 32, 0, 2, PM_EVENT_PORT)
    put("<BBBBQ", 172, 1, 16, 0, 2, PM_CONTROL_PORT)
    put("<BBBBQ", 208, 1, 32, 0, 3, PM_TIMER_PORT)
    return _table(b"FACP", 3, bytes(body))


def _madt(n_cpus: int) -> bytes:
    body = struct.pack("<II", LOCAL_APIC_GPA, 1)
    for index in range(n_cpus):
        if index < 255:
            body += struct.pack("<BBBBI", 0, 8, index, index, 1)
        else:  # x2APIC
            body += struct.pack("<BBHIII", 9, 16, 0, index, 1, index)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IO_APIC_GPA, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)  # the PIT is at input 2
    for irq in _LEVEL_IRQS:
        body += struct.pack("<BBBBIH", 2, 10, 0, irq, irq, 0xD)
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)  # NMI at LINT1 of all
    return _table(b"APIC", 1, body)
