"""Reverse maps of a shadow MMU, and their lock bit, as steps for the explorer.

Where KVM shadows page tables, a gfn's entries are found by a reverse map: a word that holds
nothing, one entry, or a chain of descriptors. Since v6.15 aging walks it without the MMU lock
("KVM: x86/mmu: Add infrastructure to allow walking rmaps outside of mmu_lock"). Bit 1 of the
word, ``KVM_RMAP_LOCKED``, is a spinlock for that:

- an empty map is not locked: there is nothing to walk, and only the holder of the MMU lock
  adds to it;
- who changes the map holds the MMU lock for write, takes the bit, and drops it with the store
  of the new word;
- aging takes the bit alone, and drops it by storing the word that it found.

Entries are not protected by the bit: one may be zapped while it is walked, so its accessed
bit is cleared by an atomic operation, and a compare-and-swap that fails is ignored.

Departure: one gfn; a chain is the set of its entries, a descriptor that was freed a mark.
"""

from __future__ import annotations

from kvmhost.mmu.explorer import BLOCKED, Report, State, Step, explore

__all__ = ["explore_rmap"]

_END = 99


def _take_mmu_lock(s: State) -> object:
    if s["mmu lock"]:
        return BLOCKED
    s["mmu lock"] = True
    return None


def _drop_mmu_lock(s: State) -> None:
    s["mmu lock"] = False


def _take_bit(s: State) -> object:
    """Take the bit, unless the map is empty; wait while somebody else has it."""
    if s["bit"]:
        return BLOCKED
    if s["entries"]:
        s["bit"] = True
    return None


def _remove_entry(s: State) -> None:
    """Take the last entry out, with its descriptor, and drop the bit by the store."""
    s["entries"] = s["entries"][:-1]
    s["freed"] += 1
    s["bit"] = False


def _add_entry(s: State) -> None:
    s["entries"] = (*s["entries"], "new")
    s["bit"] = False


def _ager(who: str, uses_bit: bool) -> list[Step]:
    found, freed = f"found {who}", f"freed before {who}"

    def take(s: State) -> object:
        if uses_bit and s["bit"]:
            return BLOCKED
        if not s["entries"]:
            return _END
        s[found], s[freed] = s["entries"], s["freed"]
        s["bit"] = s["bit"] or uses_bit
        return None

    def walk(s: State) -> None:
        s["walked freed"] = s["walked freed"] or s["freed"] != s[freed]

    def drop(s: State) -> None:
        """Store the word that was found, without the bit."""
        if uses_bit:
            s["entries"], s["bit"] = s[found], False

    return [take, walk, drop]


def explore_rmap(*, uses_bit: bool, agers: int = 2) -> Report:
    """Explore aging against a removal and an addition, in all orders.

    A schedule fails if aging walks a descriptor that was freed under it, if a change of the map
    is lost, or if the bit stays set.

    :param uses_bit: aging takes the lock bit; else it walks without any lock
    """
    state: State = {
        "entries": ("old", "old"),
        "bit": False,
        "mmu lock": False,
        "freed": 0,
        "walked freed": False,
    }
    change: list[Step] = [_take_mmu_lock, _take_bit, _remove_entry, _drop_mmu_lock]
    addition: list[Step] = [_take_mmu_lock, _take_bit, _add_entry, _drop_mmu_lock]
    actors: dict[str, list[Step]] = {"remove": change, "add": addition}
    for who in map(str, range(agers)):
        state |= {f"found {who}": (), f"freed before {who}": 0}
        actors[f"age {who}"] = _ager(who, uses_bit)

    def right(s: State) -> bool:
        return not s["walked freed"] and not s["bit"] and len(s["entries"]) == 2

    return explore(state, actors, right)
