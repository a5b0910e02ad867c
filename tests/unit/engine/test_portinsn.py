"""Port instructions: decoded as the manual says, and never missed by the search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.engine.portinsn import candidates, decode

OPCODES = [0xE4, 0xE5, 0xE6, 0xE7, 0xEC, 0xED, 0xEE, 0xEF, 0x6C, 0x6D, 0x6E, 0x6F]
PREFIXES = [0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3, *range(0x40, 0x50)]


@pytest.mark.parametrize(
    ("code", "is_in", "is_string", "size", "port", "repeats", "n_bytes"),
    [
        ("ec", True, False, 1, None, False, 1),
        ("66ed", True, False, 2, None, False, 2),
        ("e560", True, False, 4, 0x60, False, 2),
        ("e6f4", False, False, 1, 0xF4, False, 2),
        ("ef", False, False, 4, None, False, 1),
        ("f36e", False, True, 1, None, True, 2),
        ("f366486f", False, True, 2, None, True, 4),
        ("6d", True, True, 4, None, False, 1),
    ],
)
def test_decode(
    code: str,
    is_in: bool,
    is_string: bool,
    size: int,
    port: int | None,
    repeats: bool,
    n_bytes: int,
) -> None:
    insn = decode(bytes.fromhex(code) + b"\x90" * 4)
    assert insn is not None
    assert (insn.is_in, insn.is_string, insn.size) == (is_in, is_string, size)
    assert (insn.port, insn.repeats, insn.n_bytes) == (port, repeats, n_bytes)


@pytest.mark.parametrize("code", ["", "66", "90", "e4", "0f0b", "66" * 15 + "ec"])
def test_decode_refuses(code: str) -> None:
    assert decode(bytes.fromhex(code)) is None


@given(
    before=st.binary(max_size=20),
    prefixes=st.lists(st.sampled_from(PREFIXES), max_size=6),
    opcode=st.sampled_from(OPCODES),
    after=st.binary(max_size=20),
)
def test_no_port_instruction_is_missed(
    before: bytes, prefixes: list[int], opcode: int, after: bytes
) -> None:
    starts, ends = candidates(before + bytes([*prefixes, opcode]) + after)
    assert len(before) in starts
    if opcode in range(0x6C, 0x70):
        assert len(before) + len(prefixes) + 1 in ends


@given(st.binary(max_size=64))
def test_what_is_found_can_be_decoded(code: bytes) -> None:
    starts, _ = candidates(code)
    for at in range(len(code)):
        if decode(code[at:]) is not None:
            assert at in starts
