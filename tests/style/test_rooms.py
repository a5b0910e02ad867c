"""The list of rooms in docs/architecture.md is complete: every module is in its room's entry."""

from __future__ import annotations

import re
from pathlib import Path

from source_tree import ROOT, folder_of, modules_of, room_of

PAGE = ROOT / "docs" / "architecture.md"
#: Packages whose entries name every module; ``tools`` and ``guests`` are described as a whole.
LISTED = ("kvmhost", "reclaim")
_ROOM = re.compile(r"^(?:(\w+)/ {1,8}| {10})(?:(\w+)/)? *(.*)$")


def words_by_room(text: str) -> dict[str, set[str]]:
    """Return the words of each entry in the list, by folder."""
    block = text[text.index("## Rooms") :].split("```")[1]
    rooms: dict[str, set[str]] = {}
    package = room = ""
    for line in block.splitlines():
        if line.startswith(" " * 14):
            rest = line
        else:
            match = _ROOM.match(line)
            if not match:
                continue
            package = match[1] or package
            room = f"{package}/{match[2]}" if match[2] else package
            rest = match[3]
        rooms.setdefault(room, set()).update(re.findall(r"\w+", rest))
    return rooms


def missing(rooms: dict[str, set[str]], modules: list[Path]) -> list[str]:
    """Return the modules that their room's entry does not name."""
    return [
        str(module)
        for module in modules
        if module.stem != "__init__" and module.stem not in rooms.get(str(module.parent), set())
    ]


def test_every_module_is_in_a_room() -> None:
    modules = [Path(room_of(path)) for path in modules_of(*LISTED)]
    assert missing(words_by_room(PAGE.read_text()), modules) == []


def test_rooms_exist() -> None:
    rooms = words_by_room(PAGE.read_text())
    assert [room for room in rooms if not folder_of(room).is_dir()] == []


def test_a_module_that_is_in_no_room_is_found() -> None:
    lines = ["## Rooms", "```", "kvmhost/  errors          text", "          memory/         guest"]
    text = "\n".join([*lines, "```"])
    rooms = words_by_room(text)
    there = [Path("kvmhost/errors.py"), Path("kvmhost/memory/guest.py")]
    assert missing(rooms, there) == []
    assert missing(rooms, [Path("kvmhost/guest.py")]) == ["kvmhost/guest.py"]
