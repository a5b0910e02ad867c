"""MSR filters: ranges of MSRs with a bit for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.errors import LayoutError

__all__ = ["MsrRange", "build_msr_filter"]

_MAX_RANGES = 16


@dataclasses.dataclass(frozen=True)
class MsrRange:
    """MSRs ``[base, base + n_msrs)``, and which of them the guest may use.

    :param allowed: little-endian bitmap, bit 0 is ``base``
    :param flags: ``KVM_MSR_FILTER_READ`` and ``_WRITE``: accesses that the range decides
    """

    base: int
    n_msrs: int
    allowed: bytes
    flags: int = 3

    @classmethod
    def refuse(cls, first: int, n_msrs: int = 1, flags: int = 3) -> MsrRange:
        """Make a range in which every MSR is denied.

        >>> MsrRange.refuse(0x10, 9).allowed
        b'\\x00\\x00'
        """
        return cls(first, n_msrs, bytes(-(-n_msrs // 8)), flags)

    @classmethod
    def allow(cls, msrs: Iterable[int], flags: int = 3) -> MsrRange:
        """Make the range from the lowest to the highest of ``msrs``, which alone may be used.

        >>> MsrRange.allow([0x10, 0x12]).allowed
        b'\\x05'
        """
        chosen = sorted(set(msrs))
        base, n_msrs = chosen[0], chosen[-1] - chosen[0] + 1
        bits = sum(1 << (msr - base) for msr in chosen)
        return cls(base, n_msrs, bits.to_bytes(-(-n_msrs // 8), "little"), flags)


def build_msr_filter(ranges: Sequence[MsrRange], allow: bool) -> tuple[Any, list[Any]]:
    """Return ``struct kvm_msr_filter *`` and the objects that must outlive it.

    :raises LayoutError: for too many ranges or a bitmap of another size than the range
    """
    if len(ranges) > _MAX_RANGES:
        raise LayoutError(f"{len(ranges)} MSR ranges: at most {_MAX_RANGES}")
    default = lib.KVM_MSR_FILTER_DEFAULT_ALLOW if allow else lib.KVM_MSR_FILTER_DEFAULT_DENY
    made = ffi.new("struct kvm_msr_filter *", {"flags": default})
    keep = []
    for i, given in enumerate(ranges):
        if len(given.allowed) != -(-given.n_msrs // 8):
            raise LayoutError(
                f"MSRs {given.base:#x}: {len(given.allowed)} bytes for {given.n_msrs} bits"
            )
        bitmap = ffi.new("uint8_t[]", given.allowed)
        keep.append(bitmap)
        slot = made.ranges[i]
        slot.flags, slot.base, slot.nmsrs, slot.bitmap = (
            given.flags,
            given.base,
            given.n_msrs,
            bitmap,
        )
    return made, keep
