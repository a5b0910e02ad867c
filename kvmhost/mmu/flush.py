"""Deferred remote TLB flush: the orders of 2009, as steps for the explorer.

A thread that zaps an entry may defer the flush by raising a dirty mark, and a thread that
needs the flush later requests it if the mark is raised. Two orderings decide whether a
flush can be lost:

- the zapping side changes the entry and raises the mark: in which order?
- the flushing side flushes and lowers the mark: in which order, and by what?

The protocol of ``_core/mmu_ops.c`` (and of ``kvm_flush_remote_tlbs()``): change the entry,
then raise the mark, then drop the MMU lock; read the mark, flush, and lower the mark only if
it still is what was read. The mark is a count, so that a mark raised in between differs.

:func:`explore_reload` has the case for which the mark is read at all: a vCPU that loads a new
root protects the guest's tables against writes and reads them in, while its TLB may hold a
translation for writing of an entry that another vCPU has zapped with its flush deferred.
"""

from __future__ import annotations

from kvmhost.mmu.explorer import BLOCKED, Report, State, Step, explore

__all__ = ["LOWER_ORDERS", "RAISE_ORDERS", "explore_flush", "explore_reload"]


def _lock(s: State) -> object:
    if s["locked"]:
        return BLOCKED
    s["locked"] = True
    return None


def _unlock(s: State) -> None:
    s["locked"] = False


def _zap(s: State) -> None:
    s["present"] = False


def _raise_mark(s: State) -> None:
    s["mark"] += 1


def _lower(s: State) -> None:
    s["mark"] = 0


def _flush(s: State) -> None:
    s["cached"] = False


def _read_mark(s: State) -> None:
    s["seen"] = s["mark"]


def _lower_if_unchanged(s: State) -> None:
    if s["mark"] == s["seen"]:
        s["mark"] = 0


def _access(s: State) -> None:
    """Use the page: from the TLB, or by a walk that fills it while the entry is there."""
    if s["present"]:
        s["cached"] = True


RAISE_ORDERS: dict[str, list[Step]] = {
    "raise, then zap": [_lock, _raise_mark, _zap, _unlock],
    "zap, then raise": [_lock, _zap, _raise_mark, _unlock],
}
LOWER_ORDERS: dict[str, list[Step]] = {
    "lower, then flush": [_lower, _flush],
    "flush, then lower": [_flush, _lower],
    "read, flush, lower if unchanged": [_read_mark, _flush, _lower_if_unchanged],
}


def explore_flush(raise_order: str, lower_order: str, *, mark: int = 0) -> Report:
    """Explore one vCPU, one zap that defers its flush, and one flush, in all orders.

    A schedule fails if the mark is down at the end although the TLB still holds a
    translation of a zapped entry.

    :param mark: value of the mark at the start; 1 if an earlier zap left it up
    """
    state: State = {"present": True, "cached": True, "mark": mark, "seen": 0, "locked": False}
    actors: dict[str, list[Step]] = {
        "zap": RAISE_ORDERS[raise_order],
        "flush": LOWER_ORDERS[lower_order],
        "vcpu": [_access, _access],
    }

    def nothing_lost(s: State) -> bool:
        return bool(s["present"] or not s["cached"] or s["mark"])

    return explore(state, actors, nothing_lost)


def _zap_or_not(s: State) -> None:
    s["mark"] += s["present"]
    s["present"] = s["writable"] = False


def _protect(s: State) -> None:
    s["protected"] = s["present"] and s["writable"]
    s["writable"] = False


def _flush_if_protected(s: State) -> None:
    if s["protected"]:
        s["cached"], s["mark"] = False, 0


def _flush_if_protected_or_deferred(s: State) -> None:
    if s["protected"] or s["mark"]:
        s["cached"], s["mark"] = False, 0


def _read_in(s: State) -> None:
    s["known"], s["read in"] = s["content"], True


def _write_through_tlb(s: State) -> None:
    """Write the guest's table if the TLB allows it; else the write faults, and is seen."""
    if s["cached"]:
        s["content"] += 1


def explore_reload(*, asks_mark: bool) -> Report:
    """Explore ``invlpg`` on one vCPU and a reload of the root on another, in all orders.

    A schedule fails if the guest's table, once it is read in, changes without a fault.

    :param asks_mark: flush if a page was protected *or* a flush was deferred; else only if
        a page was protected
    """
    state: State = {
        "present": True,
        "writable": True,
        "cached": True,
        "mark": 0,
        "locked": False,
        "protected": False,
        "content": 0,
        "known": 0,
        "read in": False,
    }
    flush = _flush_if_protected_or_deferred if asks_mark else _flush_if_protected
    actors: dict[str, list[Step]] = {
        "invlpg": [_lock, _zap_or_not, _unlock],
        "reload": [_lock, _protect, flush, _read_in, _unlock, _write_through_tlb],
    }
    return explore(state, actors, lambda s: s["content"] == s["known"])
