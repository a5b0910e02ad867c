"""Properties that QEMU leaves out of the device tree of a machine, added before the machine starts.

QEMU 7.2 does not name the page sizes of POWER9's radix tables in the tree of its powernv
machines. Linux then assumes 4 KiB and 64 KiB, and has neither transparent huge pages nor hugetlbfs.

Source: Devicetree Specification v0.4, chapter 5 (flattened format).
"""

from __future__ import annotations

import dataclasses
import os
import struct
from pathlib import Path

from kvmhost.errors import ImageError
from kvmhost.files import os_errors

__all__ = ["AddedProperty", "add_property", "patch_device_tree"]

_MAGIC = 0xD00D_FEED
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
#: magic, totalsize, off_dt_struct, off_dt_strings, off_mem_rsvmap, version,
#: last_comp_version, boot_cpuid_phys, size_dt_strings, size_dt_struct.
_HEADER = struct.Struct(">10I")


@dataclasses.dataclass(frozen=True)
class AddedProperty:
    """A property to add to a machine's device tree.

    :ivar pa: physical address where QEMU puts the tree
    :ivar node: how the names of the nodes begin that get it
    :ivar name: of the property
    :ivar cells: its value, 32 bits each
    """

    pa: int
    node: str
    name: str
    cells: tuple[int, ...]


def add_property(tree: bytes, added: AddedProperty) -> bytes:
    """Return a flattened device tree with a property in each node of that name.

    A node that has the property keeps its own.

    :raises ImageError: if it is no device tree, or has no such node
    """
    head = _HEADER.unpack_from(tree) if len(tree) >= _HEADER.size else (0,) * 10
    _, total, at_struct, at_strings, at_reserved, *rest, n_strings, n_struct = head
    ends = (at_struct + n_struct, at_strings + n_strings, total)
    if head[0] != _MAGIC or max(ends) > len(tree) or not 40 <= at_reserved <= at_struct:
        raise ImageError("device tree", "flattened device tree", "its header makes no sense")
    body = tree[at_struct : at_struct + n_struct]
    strings = tree[at_strings : at_strings + n_strings] + added.name.encode() + b"\0"
    value = struct.pack(f">{len(added.cells)}I", *added.cells)
    prop = struct.pack(">3I", _PROP, len(value), n_strings) + value
    places = _places(body, added, strings)
    if not places:
        raise ImageError("device tree", "flattened device tree", f"no node {added.node}")
    for place in reversed(places):
        body = body[:place] + prop + body[place:]
    reserved = tree[at_reserved:at_struct]
    at_struct = _HEADER.size + len(reserved)
    at_strings = at_struct + len(body)
    total, sizes = at_strings + len(strings), (len(strings), len(body))
    fields = (_MAGIC, total, at_struct, at_strings, _HEADER.size, *rest, *sizes)
    return _HEADER.pack(*fields) + reserved + body + strings


def _places(body: bytes, added: AddedProperty, strings: bytes) -> list[int]:
    """Return where in the structure block the properties of the nodes begin."""
    places: list[int] = []
    at, is_inside = 0, False
    try:
        while (token := struct.unpack_from(">I", body, at)[0]) != _END:
            at += 4
            if token == _BEGIN_NODE:
                end = body.index(b"\0", at)
                is_inside = body[at:end].startswith(added.node.encode())
                at = (end + 4) & ~3
                if is_inside:
                    places.append(at)
            elif token == _PROP:
                n_bytes, at_name = struct.unpack_from(">2I", body, at)
                name = strings[at_name : strings.index(b"\0", at_name)].decode()
                if is_inside and name == added.name:
                    places.pop()
                    is_inside = False
                at += (8 + n_bytes + 3) & ~3
            elif token not in (_END_NODE, _NOP):
                raise ValueError
    except (struct.error, ValueError) as error:
        problem = f"no structure block at byte {at}"
        raise ImageError("device tree", "flattened device tree", problem) from error
    return places


def patch_device_tree(ram: Path, offset: int, added: AddedProperty) -> None:
    """Add a property to the tree in the memory of a machine that has not started.

    :param offset: of the tree in the file
    :raises HostError: if the file cannot be read or written
    :raises ImageError: if there is no device tree
    """
    with os_errors(ram):
        fd = os.open(ram, os.O_RDWR | os.O_CLOEXEC)
        try:
            header = os.pread(fd, _HEADER.size, offset)
            total = _HEADER.unpack(header)[1] if len(header) == _HEADER.size else 0
            os.pwrite(fd, add_property(os.pread(fd, total, offset), added), offset)
        finally:
            os.close(fd)
