"""Tables as a KVM builds them, written into a file, by the manuals' layouts alone."""

from __future__ import annotations

import struct

import numpy as np

from kvmhost.lab.ram import HostMemory, RamPart
from kvmhost.mmu.kvmtable import KvmTable, TableRoot

__all__ = ["ALL", "MIB", "PARTS", "Ept", "Npt", "Radix", "Stage2", "file_words", "open_table"]

MIB = 1 << 20
#: A host with a hole: 2 MiB at 0, 2 MiB more at 4 GiB.
PARTS = (RamPart(0, 0, 2 * MIB), RamPart(1 << 32, 2 * MIB, 2 * MIB))


class Writer:
    """Builds tables of one format in a file, one entry at a time, by the manuals' layouts."""

    byte_order = "<"
    widths: tuple[int, ...] = ()  # index widths from the root down
    page_shift = 12

    def __init__(self, path, parts=PARTS):
        self.path, self.parts = path, parts
        with path.open("wb") as file:
            file.truncate(max(p.offset + p.n_bytes for p in parts))
        # Every other table lies above the hole.
        self.free = [0x10_0000, (1 << 32) + 0x10_0000]
        self.turn = 0
        self.root = self.table(self.widths[0])

    def offset(self, pa):
        for part in self.parts:
            if part.pa <= pa < part.pa + part.n_bytes:
                return part.offset + pa - part.pa
        raise AssertionError(hex(pa))

    def table(self, width):
        self.turn ^= 1
        n_bytes = 8 << width
        pa = -(-self.free[self.turn] // max(n_bytes, 4096)) * max(n_bytes, 4096)
        self.free[self.turn] = pa + n_bytes
        return pa

    def read(self, pa):
        with self.path.open("rb") as file:
            file.seek(self.offset(pa))
            return struct.unpack(self.byte_order + "Q", file.read(8))[0]

    def write(self, pa, value):
        with self.path.open("r+b") as file:
            file.seek(self.offset(pa))
            file.write(struct.pack(self.byte_order + "Q", value))

    def entry_pa(self, gfn, level=1):
        """Address of an entry; makes the tables above it."""
        table, below = self.root, sum(self.widths)
        for depth, width in enumerate(self.widths):
            below -= width
            at = table + 8 * (gfn >> below & (1 << width) - 1)
            if len(self.widths) - depth == level:
                return at
            if not self.read(at):
                child = self.widths[depth + 1]
                self.write(at, self.pointer(self.table(child), child))
            table = self.read(at) & self.frame
        raise AssertionError(level)

    def leaf(self, gfn, *, young=False, level=1):
        self.write(self.entry_pa(gfn, level), self.leaf_value(gfn, level) | young * self.accessed)

    def young(self, gfn, level=1):
        return bool(self.read(self.entry_pa(gfn, level)) & self.accessed)


class Npt(Writer):
    frame, accessed = 0x000F_FFFF_FFFF_F000, 1 << 5
    widths = (9, 9, 9, 9)

    def pointer(self, pa, width):
        return pa | 0x827  # MMU-present, A, U, W, P

    def leaf_value(self, gfn, level):
        return gfn << 12 | 0xE07 | (0x80 if level > 1 else 0)  # + host- and MMU-writable

    def table_root(self):
        return TableRoot("npt", self.root, levels=len(self.widths))


class Npt5(Npt):
    widths = (9, 9, 9, 9, 9)


class Ept(Npt):
    accessed = 1 << 8

    def pointer(self, pa, width):
        return pa | 0x907

    def leaf_value(self, gfn, level):
        return gfn << 12 | 0x877 | 3 << 57 | (0x80 if level > 1 else 0)

    def table_root(self):
        return TableRoot("ept", self.root, levels=4)


class Stage2(Writer):
    """40 bits of IPA: two concatenated start tables of native level 1."""

    frame, accessed = 0x0003_FFFF_FFFF_F000, 1 << 10
    widths = (10, 9, 9)

    def pointer(self, pa, width):
        return pa | 3

    def leaf_value(self, gfn, level):
        return gfn << 12 | 0x3C1 | (1 << 51) | (1 << 55) | (2 if level == 1 else 0) | 0x3C

    def table_root(self):
        return TableRoot("stage2", self.root, ipa_bits=self.page_shift + sum(self.widths))


class Stage2Wide(Stage2):
    """52 bits of IPA: sixteen concatenated start tables of native level 0."""

    widths = (13, 9, 9, 9)


class Radix(Writer):
    byte_order = ">"
    frame, accessed = 0x01FF_FFFF_FFFF_FF00, 0x100
    widths = (13, 9, 9, 9)

    def pointer(self, pa, width):
        return 1 << 63 | pa | width

    def leaf_value(self, gfn, level):
        return 3 << 62 | gfn << self.page_shift | 0x87

    def table_root(self):
        return TableRoot("radix", self.root, page_shift=self.page_shift)


class Radix64(Radix):
    page_shift = 16
    widths = (13, 9, 9, 5)


ALL = [Npt, Npt5, Ept, Stage2, Stage2Wide, Radix, Radix64]


def open_table(writer):
    memory = HostMemory(writer.path, writer.parts)
    return memory, KvmTable(memory.table_memory(), writer.table_root())


def file_words(path):
    return np.fromfile(path, dtype="<u8")
