"""Decoding exits: every reason gets a value, and none raises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost import exits
from kvmhost._ffi import ffi, lib
from kvmhost.kvm.exits import decode


def raw(**fields: Any) -> Any:
    return ffi.new("struct kh_exit *", fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"reason": lib.KVM_EXIT_IO, "is_write": 1, "port": 0x3F8, "size": 2, "count": 2}
            | {"data": b"abcdefgh"},
            exits.IoOut(0x3F8, 2, b"abcd", 2),
        ),
        (
            {"reason": lib.KVM_EXIT_IO, "port": 0x60, "size": 1, "count": 3},
            exits.IoIn(0x60, 1, 3),
        ),
        (
            {"reason": lib.KVM_EXIT_MMIO, "is_write": 1, "address": 1 << 40, "size": 4}
            | {"data": b"abcdefgh"},
            exits.MmioWrite(1 << 40, b"abcd"),
        ),
        ({"reason": lib.KVM_EXIT_MMIO, "address": 5, "size": 8}, exits.MmioRead(5, 8)),
        ({"reason": lib.KVM_EXIT_HLT}, exits.Hlt()),
        ({"reason": lib.KVM_EXIT_SHUTDOWN}, exits.Shutdown()),
        ({"reason": lib.KVM_EXIT_INTR}, exits.Kicked()),
        ({"reason": lib.KVM_EXIT_FAIL_ENTRY, "detail": 7}, exits.FailEntry(7)),
        (
            {"reason": lib.KVM_EXIT_INTERNAL_ERROR, "detail": 1, "n_internal": 2}
            | {"internal": [1, 0x900A02]},
            exits.InternalError(1, (1, 0x900A02)),
        ),
        (
            {"reason": lib.KVM_EXIT_MEMORY_FAULT, "detail": 8, "address": 4096, "n_internal": 1}
            | {"internal": [512]},
            exits.MemoryFault(gpa=4096, size=512, flags=8),
        ),
        # KVM_RUN failed with EFAULT, and KVM described nothing.
        ({"reason": lib.KVM_EXIT_MEMORY_FAULT}, exits.MemoryFault()),
        ({"reason": 4242, "detail": 9}, exits.UnknownExit(4242, 9)),
    ],
)
def test_every_reason(fields: dict[str, Any], expected: exits.Exit) -> None:
    assert decode(raw(**fields)) == expected


@given(
    reason=st.integers(0, (1 << 32) - 1) | st.integers(0, 64),
    size=st.integers(0, 255),
    count=st.integers(0, (1 << 32) - 1),
    is_write=st.integers(0, 1),
)
def test_nothing_raises(reason: int, size: int, count: int, is_write: int) -> None:
    found = decode(raw(reason=reason, size=size, count=count, is_write=is_write))
    assert isinstance(found, exits.Exit)


def test_instruction_of_an_internal_error() -> None:
    words = (1, 0x000000_9088_9090_03, 0, 0)
    assert exits.InternalError(1, words).instruction == bytes.fromhex("909088")
    assert exits.InternalError(2, words).instruction == b""
    assert exits.InternalError(1, (1,)).instruction == b""
