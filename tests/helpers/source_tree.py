"""Where the packages' sources are: in a checkout, and in an unpacked sdist.

In a checkout ``guests``, ``reclaim`` and ``tools`` are folders of the root, linked into
``kvmhost``. An sdist has no links: there they are folders of ``kvmhost`` alone. Tests name
modules by their *room*, the path that they have in a checkout (``reclaim/policy/age.py``).
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["LINKED", "PACKAGES", "ROOT", "folder_of", "modules_of", "room_of"]

ROOT = Path(__file__).resolve().parents[2]
#: Folders of the root that are linked into kvmhost/, so that one importable name is installed.
LINKED = ("guests", "reclaim", "tools")
PACKAGES = ("kvmhost", *LINKED)
_IN_KVMHOST = {*LINKED, "docs"}


def folder_of(room: str) -> Path:
    """Return the folder, or file, of a room."""
    linked = room.partition("/")[0] in LINKED
    return ROOT / room if not linked or (ROOT / room).exists() else ROOT / "kvmhost" / room


def room_of(path: Path) -> str:
    """Return the room of a folder or file, without a link on the way."""
    parts = path.resolve().relative_to(ROOT).parts
    inside = parts[0] == "kvmhost" and parts[1:2] and parts[1] in _IN_KVMHOST
    return "/".join(parts[1:] if inside else parts)


def modules_of(*rooms: str) -> list[Path]:
    """Return the modules below rooms, each once; those of kvmhost without the linked packages."""
    return sorted(
        path
        for room in rooms
        for path in folder_of(room).rglob("*.py")
        if room != "kvmhost" or room_of(path).startswith("kvmhost/")
    )
