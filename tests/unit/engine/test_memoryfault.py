"""Which accesses an instruction makes: the decoder behind the place of a memory fault."""

from __future__ import annotations

import pytest

from kvmhost.engine.memoryfault import _decoded, _operands

VALUES = {f"r{i}": 0x1000 * i for i in range(8, 16)} | {
    "rax": 0x10, "rbx": 0x20_0000, "rcx": 3, "rdx": 0, "rsi": 0x5000, "rdi": 0x6000,
    "rsp": 0x8000, "rbp": 0x9000,
}  # fmt: skip
RIP = 0x40_0000


@pytest.mark.parametrize(
    ("code", "bits", "expected"),
    [
        ("48 89 03", 64, [(0x20_0000, 8, "w")]),  # mov [rbx], rax
        ("8b 44 8b 04", 64, [(0x20_0010, 4, "r")]),  # mov eax, [rbx + 4 * rcx + 4]
        ("48 01 03", 64, [(0x20_0000, 8, "rw")]),  # add [rbx], rax
        ("48 8b 05 10 00 00 00", 64, [(RIP + 7 + 0x10, 8, "r")]),  # mov rax, [rip + 16]
        ("41 88 02", 64, [(0xA000, 1, "w")]),  # mov [r10], al
        ("67 41 88 02", 64, [(0xA000, 1, "w")]),  # mov [r10d], al
        ("64 8b 03", 64, [(0x20_0000 + 0x7000_0000, 4, "r")]),  # mov eax, fs:[rbx]
        ("50", 64, [(0x7FF8, 8, "w")]),  # push rax
        ("c3", 64, [(0x8000, 8, "r")]),  # ret
        ("48 8d 03", 64, []),  # lea rax, [rbx]
        ("90", 64, []),  # nop
        ("89 07", 16, [(0x10_0000, 2, "w")]),  # mov [bx], ax: bx is 0 here
        ("89 03", 32, [(0x30_0000, 4, "w")]),  # mov [ebx], eax
    ],
)
def test_operands(code: str, bits: int, expected: list[tuple[int, int, str]]) -> None:
    insn = _decoded(bytes.fromhex(code), RIP, bits)
    bases = {"fs": 0x7000_0000} if bits == 64 else {"ds": 0x10_0000}
    assert list(_operands(insn, VALUES, bases)) == expected


def test_both_places_of_a_move_between_strings() -> None:
    insn = _decoded(bytes.fromhex("48 a5"), RIP, 64)  # movsq
    assert sorted(_operands(insn, VALUES, {})) == [(0x5000, 8, "r"), (0x6000, 8, "w")]


def test_no_instruction() -> None:
    assert _decoded(b"", RIP, 64) is None
