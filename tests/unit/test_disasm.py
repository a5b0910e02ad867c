"""Disassembly and hints of the report about an instruction that KVM cannot emulate."""

from __future__ import annotations

import sys

import pytest

from kvmhost.machine.disasm import disassemble, hint


@pytest.mark.parametrize(
    ("code", "bits", "text"),
    [
        ("f30fb8c0", 32, "popcnt eax, eax"),
        ("cf", 32, "iretd"),
        ("48cf", 64, "iretq"),
        ("b83412", 16, "mov ax, 0x1234"),
        ("", 32, "(no instruction)"),
        ("0f", 64, "(no instruction)"),
    ],
)
def test_disassembly(code: str, bits: int, text: str) -> None:
    assert disassemble(bytes.fromhex(code), 0x1000, bits) == text


def test_without_capstone_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "capstone", None)
    assert "install capstone" in disassemble(b"\x90", 0, 32)


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("iretd", "popf and a far return"),
        ("iretq", "level 0 only"),
        ("popcnt eax, eax", "-march"),
        ("vzeroupper", "AVX"),
        ("fld1", "x87"),
        ("pxor xmm0, xmm0", "SSE"),
        ("rdtscp", "rdtsc"),
    ],
)
def test_hints(instruction: str, words: str) -> None:
    assert words in hint(instruction)


def test_what_is_not_known_gets_the_general_hint() -> None:
    assert "privilege level 0" in hint("hcf")
