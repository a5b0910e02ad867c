"""Flattened device trees, built without the code under test."""

from __future__ import annotations

import struct

__all__ = ["REG", "node", "prop", "tree", "word"]


def word(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def node(name: str, *inside: bytes) -> bytes:
    text = name.encode() + b"\0"
    return word(1) + text.ljust(len(text) + 3 & ~3, b"\0") + b"".join(inside) + word(2)


def prop(at_name: int, value: bytes) -> bytes:
    return word(3, len(value), at_name) + value.ljust(len(value) + 3 & ~3, b"\0")


#: Names of properties: reg at 0, sizes at 4.
STRINGS = b"reg\0sizes\0"
REG = prop(0, b"\0\0\0\1\0")  # five bytes: padded to eight


def tree(*nodes: bytes, gap: int = 0) -> bytes:
    body = node("", *nodes) + word(4, 9)
    reserved = struct.pack(">4Q", 0x2000, 0x1000, 0, 0)
    at_struct = 40 + len(reserved) + gap
    at_strings = at_struct + len(body) + gap
    head = (0xD00DFEED, at_strings + len(STRINGS), at_struct, at_strings, 40, 17, 16, 7)
    gap_bytes = bytes(gap)
    return word(*head, len(STRINGS), len(body)) + reserved + gap_bytes + body + gap_bytes + STRINGS
