"""Port instructions of 64-bit x86 code: finding and decoding them.

Unicorn ends a block early only before an instruction, not after one, so the
emulated engine has to know where port instructions are before they run.

Encodings: Intel SDM vol. 2, IN, INS, OUT, OUTS and 2.1.1 (prefixes).
"""

from __future__ import annotations

import dataclasses

__all__ = ["PortInsn", "candidates", "decode"]

_IN_IMM, _OUT_IMM, _IN_DX, _OUT_DX, _INS, _OUTS = 0xE4, 0xE6, 0xEC, 0xEE, 0x6C, 0x6E
_KINDS = (_IN_IMM, _OUT_IMM, _IN_DX, _OUT_DX, _INS, _OUTS)
_OPCODES = frozenset(start + i for start in _KINDS for i in (0, 1))
_REX = range(0x40, 0x50)
_PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3, *_REX})
_MAX_BYTES = 15


@dataclasses.dataclass(frozen=True)
class PortInsn:
    """One IN, OUT, INS or OUTS."""

    is_in: bool
    is_string: bool
    size: int  # bytes of one access
    port: int | None  # None: the port is in dx
    repeats: bool  # rcx times (ecx, if narrow)
    narrow: bool
    n_bytes: int


def candidates(code: bytes) -> tuple[set[int], set[int]]:
    """Return where port instructions may begin, and where string ones may end.

    Where instructions begin is not known: offsets inside other instructions
    are among them. None is missing.
    """
    starts, ends = set(), set()
    for i, opcode in enumerate(code):
        if opcode not in _OPCODES:
            continue
        starts.add(i)
        if opcode & 0xFC == _INS:
            ends.add(i + 1)
        start = i - 1
        while start >= 0 and i - start < _MAX_BYTES and code[start] in _PREFIXES:
            starts.add(start)
            start -= 1
    return starts, ends


def decode(code: bytes) -> PortInsn | None:
    """Decode the instruction at the start of ``code``; None if it is no port instruction."""
    at, prefixes = 0, set()
    while at < len(code) and code[at] in _PREFIXES:
        prefixes.add(code[at])
        at += 1
    if at >= min(len(code), _MAX_BYTES) or code[at] not in _OPCODES:
        return None
    opcode = code[at]
    kind = opcode & 0xFE
    has_port = kind in (_IN_IMM, _OUT_IMM)
    if has_port and at + 1 >= len(code):
        return None
    is_string = kind in (_INS, _OUTS)
    wide = 2 if 0x66 in prefixes else 4
    return PortInsn(
        is_in=kind in (_IN_IMM, _IN_DX, _INS),
        is_string=is_string,
        size=wide if opcode & 1 else 1,
        port=code[at + 1] if has_port else None,
        repeats=is_string and bool(prefixes & {0xF2, 0xF3}),
        narrow=0x67 in prefixes,
        n_bytes=at + 1 + has_port,
    )
