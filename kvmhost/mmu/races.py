"""Harvest against hardware, unmap, map and split on one entry, as steps for the explorer.

Three ways to clear an accessed bit that was read as set:

- ``"store"``: write back the value that was read, without the bit;
- ``"and-not"``: atomically clear the bit, in whichever state the entry is by then;
- ``"swap"``: compare-and-swap, and read the entry again if it failed.

The entry is ``(kind, accessed, dirty)``; a split turns a ``huge`` leaf into a ``table``
whose own accessed bit the harvest must not change. The invariants at the end of every
schedule: accesses that set the bit, and leaves born with it, were each reported by
exactly one harvest, dropped with the leaf by the unmap, or are still set; no dirty bit
was lost, no unmapped entry reappeared, no table entry changed.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmhost.mmu.explorer import Report, State, Step, explore

__all__ = ["CLEARS", "explore_harvest"]

CLEARS = ("store", "and-not", "swap")

Entry = tuple[str, bool, bool]
_ABSENT: Entry = ("absent", False, False)


def _entry(s: State) -> Entry:
    entry: Entry = s["entry"]
    return entry


def _add(s: State, name: str) -> None:
    s[name] += 1


def _is_leaf(entry: Entry) -> bool:
    return entry[0] in ("leaf", "huge")


def _harvester(who: str, clear: str) -> list[Step]:
    seen = f"seen {who}"

    def read(s: State) -> int | None:
        s[seen] = _entry(s)
        return None if _is_leaf(_entry(s)) and _entry(s)[1] else 99

    def store(s: State) -> None:
        kind, _, dirty = s[seen]
        s["entry"] = (kind, False, dirty)
        _add(s, "reported")

    def and_not(s: State) -> None:
        kind, accessed, dirty = _entry(s)
        s["entry"] = (kind, False, dirty)
        if accessed:
            _add(s, "reported")

    def swap(s: State) -> int | None:
        if _entry(s) != s[seen]:
            return 0
        kind, _, dirty = _entry(s)
        s["entry"] = (kind, False, dirty)
        _add(s, "reported")
        return None

    return [read, {"store": store, "and-not": and_not, "swap": swap}[clear]]


def _hardware() -> list[Step]:
    def set_accessed_and_dirty(s: State) -> None:
        entry = _entry(s)
        if not _is_leaf(entry):
            return
        if not entry[1]:
            _add(s, "set")
        s["entry"] = (entry[0], True, True)
        s["wrote"] = True

    return [set_accessed_and_dirty]


def _unmapper() -> list[Step]:
    def exchange(s: State) -> None:
        entry = _entry(s)
        if _is_leaf(entry):
            if entry[1]:
                _add(s, "dropped")
            s["wrote"] = False
            s["entry"] = _ABSENT
            s["unmapped"] = True

    return [exchange]


def _mapper() -> list[Step]:
    def map_young(s: State) -> None:
        if _entry(s)[0] == "absent":
            s["entry"] = ("leaf", True, False)
            s["unmapped"] = False
            _add(s, "set")

    return [map_young]


def _splitter() -> list[Step]:
    def read(s: State) -> int | None:
        s["seen split"] = _entry(s)
        return None if _entry(s)[0] == "huge" else 99

    def link(s: State) -> int | None:
        if _entry(s) != s["seen split"]:
            return 0
        _, accessed, dirty = _entry(s)
        # The leaves below inherit the bits; the table entry itself has A set.
        s["below"] = (accessed, dirty)
        s["entry"] = ("table", True, False)
        return None

    return [read, link]


_ACTORS = {
    "hardware": _hardware,
    "unmap": _unmapper,
    "map": _mapper,
    "split": _splitter,
}


def _right(s: State) -> bool:
    kind, accessed, dirty = _entry(s)
    below_accessed, below_dirty = s["below"] or (False, False)
    if kind == "table" and not accessed:
        return False
    if s["unmapped"] and kind != "absent":
        return False
    left = int(_is_leaf((kind, accessed, dirty)) and accessed) + int(below_accessed)
    if s["set"] != s["reported"] + s["dropped"] + left:
        return False
    return not s["wrote"] or bool(dirty or below_dirty)


def explore_harvest(
    clear: str, others: Sequence[str], *, huge: bool = False, harvesters: int = 1
) -> Report:
    """Explore harvests that use one clearing method against other actors, in all orders.

    :param others: of ``"hardware"``, ``"unmap"``, ``"map"``, ``"split"``
    :param huge: the entry is a huge leaf at the start (which a split needs)
    """
    entry: Entry = ("huge" if huge else "leaf", True, False)
    state: State = {
        "entry": entry,
        "below": None,
        "set": 1,
        "reported": 0,
        "dropped": 0,
        "wrote": False,
        "unmapped": False,
        "seen split": None,
    }
    actors: dict[str, Sequence[Step]] = {name: _ACTORS[name]() for name in others}
    for i in range(harvesters):
        state[f"seen {i}"] = None
        actors[f"harvest {i}"] = _harvester(str(i), clear)
    return explore(state, actors, _right)
