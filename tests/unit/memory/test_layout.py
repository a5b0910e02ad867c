"""The layout of a tiny guest: nothing overlaps, and the tables always have room."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhost._ffi import ffi, lib
from kvmhost.errors import LayoutError
from kvmhost.memory.layout import (
    HIGH_GPA,
    IMAGE_GPA,
    LOW_END_GPA,
    MIN_BYTES,
    MMIO_BYTES,
    MMIO_GPA,
    PARAMS_GPA,
    STACKS_GPA,
    TSS_BYTES,
    TSS_GPA,
    TinyLayout,
)
from kvmhost.units import PAGE_BYTES

SIZES = st.one_of(
    st.integers(MIN_BYTES, 64 << 20),
    st.integers(LOW_END_GPA - (64 << 20), LOW_END_GPA + (64 << 20)),
    st.integers(MIN_BYTES, 6 << 30),
).map(lambda n_bytes: n_bytes // PAGE_BYTES * PAGE_BYTES)


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_tables_have_room_for_every_range(mem_bytes: int) -> None:
    layout = TinyLayout(mem_bytes)
    # Only the tables themselves are backed: memory of this size is never touched.
    with mmap.mmap(-1, layout.tables_bytes) as room, ffi.from_buffer(room) as view:
        tables = ffi.new(
            "struct kh_tables *",
            {
                "alias": int(ffi.cast("uintptr_t", view)),
                "pa": layout.tables_gpa,
                "n_pages": layout.tables_bytes // PAGE_BYTES,
            },
        )
        ranges = [
            (PARAMS_GPA, PARAMS_GPA + PAGE_BYTES),
            (TSS_GPA, -(-(TSS_GPA + TSS_BYTES) // PAGE_BYTES) * PAGE_BYTES),
            (STACKS_GPA, layout.tables_gpa),
            *((gpa, gpa + n_bytes) for gpa, n_bytes in layout.regions[1:]),
            (MMIO_GPA, MMIO_GPA + MMIO_BYTES),
        ]
        for start, end in ranges:
            assert lib.kh_tables_identity(tables, start, (end - start) // PAGE_BYTES) == 0
        assert tables.used_pages <= tables.n_pages


@given(SIZES)
def test_nothing_overlaps(mem_bytes: int) -> None:
    layout = TinyLayout(mem_bytes)
    assert sum(n_bytes for _, n_bytes in layout.regions) == mem_bytes
    assert layout.tables_gpa + layout.tables_bytes == layout.regions[0][1] <= LOW_END_GPA
    assert layout.tables_gpa > IMAGE_GPA
    assert all(gpa == HIGH_GPA for gpa, _ in layout.regions[1:])
    start, end = layout.free_range
    assert start < end
    for gpa, n_bytes in layout.pinned_ranges:
        assert end <= gpa or gpa + n_bytes <= start


@pytest.mark.parametrize("mem_bytes", [0, MIN_BYTES - PAGE_BYTES, MIN_BYTES + 1, -MIN_BYTES])
def test_bad_sizes_are_refused(mem_bytes: int) -> None:
    with pytest.raises(LayoutError, match="memory size"):
        TinyLayout(mem_bytes)
