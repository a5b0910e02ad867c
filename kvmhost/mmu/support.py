"""Whether a secondary MMU can test and clear accessed bits in batches, and if not, why.

The predicate is that of 2023, ``kvm_arch_has_test_clear_young()``: a property of the host,
answered without looking at a VM. It may be a false positive. A VM that cannot batch at the
moment answers :attr:`BatchResult.NOT_NOW` to the call itself, and the caller falls back to
``clear_young`` for it:

- x86: a VM whose memslots have reverse maps, because a nested guest ran or KVM shadows its
  page tables (``kvm_memslots_have_rmaps()``);
- powerpc: a VM whose guest uses the hash MMU (``kvm_is_radix()`` is false).

A false negative is not allowed: it would hide young pages from a caller that asks nothing else.
"""

from __future__ import annotations

import dataclasses
import enum

from kvmhost.mmu.table import Mmu

__all__ = ["BatchResult", "BatchSupport", "arm64", "of_table", "powerpc", "x86"]


class BatchResult(enum.Enum):
    """What became of a ``test_clear_young`` call on one secondary MMU."""

    #: Every page of the range was tested; the bitmap is the answer.
    DONE = "done"
    #: The host has no batches; the bitmap is unchanged.
    UNSUPPORTED = "unsupported"
    #: The host has them, this VM cannot use them now. Bits of the memslots before the one
    #: that refused are flipped already.
    NOT_NOW = "supported, but not now"


@dataclasses.dataclass(frozen=True)
class BatchSupport:
    """The host's answer. ``reason`` says why not, ``fallback`` what the caller uses then.

    Both are empty where batches are supported.
    """

    reason: str = ""
    fallback: str = ""

    def __bool__(self) -> bool:
        return not self.reason


_YES = BatchSupport()
_BY_RANGE = "clear_young over the range"


def x86(*, ad_bits: bool = True, tdp: bool = True) -> BatchSupport:
    """Return the answer of an x86-64 host.

    :param ad_bits: KVM uses accessed and dirty bits (``kvm_ad_enabled()``); EPT has them as an
        option
    :param tdp: two-dimensional paging is on (``tdp_enabled``); without, KVM shadows
    """
    if not tdp:
        return BatchSupport("KVM shadows page tables: entries are found by reverse maps", _BY_RANGE)
    if not ad_bits:
        return BatchSupport("EPT without A/D bits: entries are access-tracked", _BY_RANGE)
    return _YES


def arm64(*, hardware_access: bool = True, protected: bool = False) -> BatchSupport:
    """Return the answer of an arm64 host.

    :param hardware_access: hardware sets the access flag (``cpu_has_hw_af()``)
    :param protected: pKVM owns the tables (``is_protected_kvm_enabled()``)
    """
    if protected:
        return BatchSupport("protected KVM: the host cannot read stage 2", _BY_RANGE)
    if not hardware_access:
        return BatchSupport("no hardware access flag: each access faults", _BY_RANGE)
    return _YES


def powerpc(*, radix: bool = True, on_pseries: bool = False) -> BatchSupport:
    """Return the answer of a powerpc host.

    :param radix: radix translation is possible (``kvmppc_radix_possible()``)
    :param on_pseries: the host is itself a guest of a hypervisor (``kvmhv_on_pseries()``)
    """
    if on_pseries:
        return BatchSupport("nested on pseries: the outer hypervisor owns the tables", _BY_RANGE)
    if not radix:
        return BatchSupport("hash MMU: no tree of tables to walk", _BY_RANGE)
    return _YES


def of_table(table: Mmu) -> BatchSupport:
    """Return the answer of a host whose KVM has built such a table."""
    if table.table_format == "stage2":
        return arm64(hardware_access=not table.sw_access)
    if table.table_format == "radix":
        return powerpc()
    return x86(ad_bits=not table.sw_access)
