"""Binary statistics of a VM or a vCPU, as named, typed values.

The kernel describes every statistic in the file itself: name, kind, unit, exponent,
number of items. The description is read once; a :meth:`Stats.read` is one pread.

Source: KVM_GET_STATS_FD, Documentation/virt/kvm/api.rst, section 4.133, Linux v6.12.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import os
import typing

from kvmhost._ffi import ffi
from kvmhost.errors import IoctlError, KvmHostError
from kvmhost.kvm.descriptor import Descriptor
from kvmhost.kvm.structs import Struct

if typing.TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Kind", "Stat", "StatDescriptor", "Stats", "Unit"]


class Kind(enum.IntEnum):
    """What the number of a statistic does. ``KVM_STATS_TYPE_*``."""

    CUMULATIVE = 0  #: counts up
    INSTANT = 1  #: goes up and down
    PEAK = 2  #: the highest so far
    LINEAR_HIST = 3  #: buckets of equal size
    LOG_HIST = 4  #: buckets that double


class Unit(enum.IntEnum):
    """What is counted. ``KVM_STATS_UNIT_*``."""

    NONE = 0
    BYTES = 1
    SECONDS = 2
    CYCLES = 3
    BOOLEAN = 4


@dataclasses.dataclass(frozen=True)
class StatDescriptor:
    """How the kernel describes one statistic.

    :ivar base: 2 or 10; the true value is number times ``base ** exponent``
    :ivar n_items: numbers that it has: 1, or the buckets of a histogram
    :ivar offset: of the first number in the data, in bytes
    :ivar bucket_size: of a linear histogram
    """

    name: str
    kind: Kind | int
    unit: Unit | int
    base: int
    exponent: int
    n_items: int
    offset: int
    bucket_size: int

    def unit_text(self) -> str:
        """Return the unit with its exponent.

        >>> StatDescriptor("x", Kind.PEAK, Unit.SECONDS, 10, -9, 1, 0, 0).unit_text()
        'ns'
        """
        names = {Unit.BYTES: "B", Unit.SECONDS: "s", Unit.CYCLES: "cycles", Unit.BOOLEAN: "bool"}
        unit = names.get(Unit(self.unit), "") if self.unit in list(Unit) else f"unit {self.unit}"
        if not self.exponent:
            return unit
        prefix = _PREFIXES.get((self.base, self.exponent))
        return f"{prefix}{unit}" if prefix else f"{self.base}^{self.exponent} {unit}".rstrip()

    def edges(self) -> list[int]:
        """Return where the buckets of a histogram begin; the last one has no end.

        >>> StatDescriptor("x", Kind.LOG_HIST, 0, 10, 0, 4, 0, 0).edges()
        [0, 1, 2, 4]
        """
        if self.kind == Kind.LINEAR_HIST:
            return [i * self.bucket_size for i in range(self.n_items)]
        if self.kind == Kind.LOG_HIST:
            return [0, *(1 << i for i in range(self.n_items - 1))]
        return []


@dataclasses.dataclass(frozen=True)
class Stat:
    """One statistic with its numbers."""

    descriptor: StatDescriptor
    raw: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.descriptor.name

    @property
    def value(self) -> int | float | bool | tuple[int, ...]:
        """The value in whole units: seconds, bytes, cycles; a histogram's counts."""
        told = self.descriptor
        if told.kind in (Kind.LINEAR_HIST, Kind.LOG_HIST) or told.n_items != 1:
            return self.raw
        if told.unit == Unit.BOOLEAN:
            return bool(self.raw[0])
        if told.exponent >= 0:
            return self.raw[0] * int(told.base**told.exponent)
        return float(self.raw[0] / told.base**-told.exponent)

    def __str__(self) -> str:
        told = self.descriptor
        if told.edges():
            pairs = zip(told.edges(), self.raw, strict=True)
            counts = ", ".join(f"{edge}+: {count}" for edge, count in pairs if count)
            return f"{self.name}: {{{counts}}} {told.unit_text()}".rstrip()
        numbers = " ".join(map(str, self.raw))
        return f"{self.name}: {numbers} {told.unit_text()}".rstrip()


class Stats(Descriptor):
    """An open statistics descriptor. Owns it; keeps the VM alive.

    >>> with vcpu.stats() as stats:  # doctest: +SKIP
    ...     print(stats.id, stats.read()["exits"].value)
    kvm-4711/vcpu-0 12

    :ivar id: the kernel's name of the VM or vCPU
    :ivar descriptors: by name, in the kernel's order
    :raises KvmHostError: if the file does not match its header
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        try:
            header = Struct.from_bytes("kvm_stats_header", self._pread(_HEADER_BYTES, 0))
            self.id = _text(self._pread(header.name_size, header.id_offset))
            self._data_offset: int = header.data_offset
            self.descriptors = self._describe(header)
        except BaseException:
            self.close()
            raise
        ends = [told.offset + 8 * told.n_items for told in self.descriptors.values()]
        self._n_bytes = max(ends, default=0)

    def read(self) -> dict[str, Stat]:
        """Return all statistics, by name, read at one time."""
        words = memoryview(self._pread(self._n_bytes, self._data_offset)).cast("Q")
        return {
            name: Stat(told, tuple(words[told.offset // 8 : told.offset // 8 + told.n_items]))
            for name, told in self.descriptors.items()
        }

    def values(self) -> dict[str, int | float | bool | tuple[int, ...]]:
        """Return all values in whole units, by name: for JSON and tables."""
        return {name: stat.value for name, stat in self.read().items()}

    def numpy(self) -> npt.NDArray[np.uint64]:
        """Return all numbers as the kernel lays them out; ``offset // 8`` is an index."""
        import numpy as np

        return np.frombuffer(self._pread(self._n_bytes, self._data_offset), np.uint64)

    def _describe(self, header: Struct) -> dict[str, StatDescriptor]:
        each = _DESC_BYTES + header.name_size
        data = self._pread(each * header.num_desc, header.desc_offset)
        found = {}
        for i in range(header.num_desc):
            told = _descriptor(data[i * each : (i + 1) * each])
            found[told.name] = told
        return found

    def _pread(self, n_bytes: int, offset: int) -> bytes:
        try:
            data = os.pread(self.fd, n_bytes, offset)
        except OSError as error:
            shown = {"length": n_bytes, "offset": offset}
            raise IoctlError("pread", error.errno or errno.EIO, shown) from error
        if len(data) != n_bytes:
            raise KvmHostError(
                f"statistics: {len(data)} bytes at offset {offset}, the header says {n_bytes}"
            )
        return data


def _descriptor(data: bytes) -> StatDescriptor:
    raw = Struct.from_bytes("kvm_stats_desc", data)
    kind, unit = raw.flags & 0xF, raw.flags >> 4 & 0xF
    return StatDescriptor(
        name=_text(data[_DESC_BYTES:]),
        kind=Kind(kind) if kind in list(Kind) else kind,
        unit=Unit(unit) if unit in list(Unit) else unit,
        base=2 if raw.flags >> 8 & 0xF else 10,
        exponent=raw.exponent,
        n_items=raw.size,
        offset=raw.offset,
        bucket_size=raw.bucket_size,
    )


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("ascii", "replace")


_HEADER_BYTES = int(ffi.sizeof("struct kvm_stats_header"))
_DESC_BYTES = int(ffi.offsetof("struct kvm_stats_desc", "name"))
_PREFIXES = {
    (10, -9): "n", (10, -6): "u", (10, -3): "m", (10, 3): "k", (10, 6): "M",
    (2, 10): "Ki", (2, 20): "Mi", (2, 30): "Gi",
}  # fmt: skip
