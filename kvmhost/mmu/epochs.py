"""Epochs, as steps for the explorer: freeing under readers, and new memslots under faults.

:func:`explore_free` has one reader and one thread that unlinks an object and frees it
once it sees no reader, as ``kh_epoch_enter()`` and ``oldest_reader()`` in
``_core/mmu_epoch.c`` do; the C code has the steps' names in brackets. Memory is weak: a
store stays in a buffer of its thread until the thread, or a full fence, drains the
buffer, and loads do not wait for it. So every load may pass the stores before it, as C11
allows an acquire load after a sequentially consistent store to another place, and what
arm64 and powerpc do.

:func:`explore_slots` has one fault and one change of memslots that takes a slot away, as
``kh_mmu_fault_finish()``, ``kh_mmu_set_slots()`` and ``Table.set_slots()`` do: with the grace
period between new slots and unmap that ``kvm_swap_active_memslots()`` has, or without.

Departure: one reader slot and one object; a grace period is one step that waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.mmu.explorer import BLOCKED, Report, State, Step, explore

__all__ = ["FENCES", "explore_free", "explore_slots"]

_END = 99

#: Which threads have a full fence between store and loads; the code uses the last.
FENCES = ("neither", "reader", "writer", "both")


def _publish(s: State) -> None:
    s["reader buffer"] = True


def _drain_reader(s: State) -> object:
    """Make the reader's slot visible; at any time, and by its fence at the latest."""
    if s["reader buffer"]:
        s["slot"], s["reader buffer"] = True, False
    return None


def _load(s: State) -> None:
    s["held"] = s["linked"]


def _use(s: State) -> None:
    if s["held"] and s["freed"]:
        s["used after free"] = True


def _exit(s: State) -> None:
    s["reader buffer"] = s["slot"] = False


def _unlink(s: State) -> None:
    s["writer buffer"] = True


def _drain_writer(s: State) -> None:
    if s["writer buffer"]:
        s["linked"], s["writer buffer"] = False, False


def _scan(s: State) -> int | None:
    """If there is a reader, leave the object to a later scan; otherwise free it."""
    return _END if s["slot"] else None


def _free(s: State) -> None:
    s["freed"] = True


def explore_free(fences: str) -> Report:
    """Explore a reader, a writer and their store buffers in all orders.

    A schedule fails if the reader uses what was freed.

    :param fences: one of :data:`FENCES`
    """
    reader: list[Step] = [_publish, _load, _use, _exit]
    writer: list[Step] = [_unlink, _scan, _free]
    if fences in ("reader", "both"):
        reader.insert(1, _drain_reader)
    if fences in ("writer", "both"):
        writer.insert(1, _drain_writer)
    state: State = {
        "reader buffer": False,
        "writer buffer": False,
        "slot": False,
        "linked": True,
        "held": False,
        "freed": False,
        "used after free": False,
    }
    actors: dict[str, Sequence[Step]] = {
        "reader": reader,
        "writer": writer,
        "reader's buffer": [_drain_reader],
        "writer's buffer": [_drain_writer],
    }
    return explore(state, actors, lambda s: not s["used after free"])


def _enter(s: State) -> None:
    s["inside"] = True


def _find(s: State) -> int | None:
    return None if s["slot there"] else 3


def _map(s: State) -> None:
    s["leaf"] = True


def _leave(s: State) -> None:
    s["inside"] = False


def _swap(s: State) -> None:
    s["slot there"] = False
    s["waits for"] = s["inside"]


def _grace(s: State) -> object:
    return BLOCKED if s["waits for"] and s["inside"] else None


def _unmap(s: State) -> None:
    s["leaf"] = False


def explore_slots(grace: bool) -> Report:
    """Explore a fault and the removal of its slot in all orders.

    A schedule fails if a leaf of the removed slot is left.

    :param grace: whether a grace period passes between new slots and unmap
    """
    state: State = {"slot there": True, "inside": False, "waits for": False, "leaf": False}
    actors: dict[str, Sequence[Step]] = {
        "fault": [_enter, _find, _map, _leave],
        "change": [_swap, _grace, _unmap] if grace else [_swap, _unmap],
    }
    return explore(state, actors, lambda s: not s["leaf"])
