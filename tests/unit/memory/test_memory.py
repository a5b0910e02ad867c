"""Guest memory: bounds, overlaps, two mappings of one memfd, numpy views."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost.errors import LayoutError
from kvmhost.memory.guest import GuestMemory, Region

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize(
    ("gpa", "n_bytes"), [(1, 4096), (0, 4095), (0, 0), (0, -4096), (-4096, 4096)]
)
def test_bad_regions_are_refused(gpa: int, n_bytes: int) -> None:
    with pytest.raises(LayoutError, match="4 KiB pages"):
        Region(gpa, n_bytes)


def test_overlap_is_refused() -> None:
    one, two = Region(0, 8192), Region(4096, 8192)
    with pytest.raises(LayoutError, match="overlap at 0x1000"):
        GuestMemory([two, one])
    one.close()
    two.close()


def test_neighbours_are_two_regions_and_no_view_spans_them() -> None:
    with GuestMemory([Region(8192, 4096), Region(0, 8192)]) as memory:
        assert [region.gpa for region in memory.regions] == [0, 8192]
        assert (memory.n_pages, memory.gfn_end) == (3, 3)
        with pytest.raises(LayoutError, match=r"\[0x1ffc, 0x2004\) is not in"):
            memory.view(0x1FFC, 8)
        assert memory.index_of_gfn(2) == 2


@given(gpa=st.integers(-(1 << 65), 1 << 65), n_bytes=st.integers(-(1 << 65), 1 << 65))
def test_no_range_outside_is_ever_given(gpa: int, n_bytes: int) -> None:
    with GuestMemory.of_size(1 << 16, gpa=1 << 32) as memory:
        start, end = 1 << 32, (1 << 32) + (1 << 16)
        if n_bytes >= 0 and start <= gpa and gpa + max(n_bytes, 1) <= end:
            assert len(memory.view(gpa, n_bytes)) == n_bytes
        else:
            with pytest.raises(LayoutError):
                memory.view(gpa, n_bytes)


def test_write_of_the_wrong_length_changes_nothing() -> None:
    with GuestMemory.of_size(4096) as memory:
        with pytest.raises(LayoutError, match="3 bytes for a range of 4"):
            memory[0:4] = b"abc"
        assert bytes(memory[0:4]) == bytes(4)


@pytest.mark.parametrize("where", [slice(0, 4, 2), slice(None, 4), slice(0, None), slice(4, 0)])
def test_slices_need_both_ends_and_no_step(where: slice) -> None:
    with GuestMemory.of_size(4096) as memory, pytest.raises(LayoutError):
        memory[where]


def test_both_mappings_show_the_same_bytes() -> None:
    with GuestMemory.of_size(8192) as memory:
        (region,) = memory.regions
        memory[4096:4100] = b"abcd"
        assert ctypes.string_at(region.guest_address + 4096, 4) == b"abcd"
        ctypes.memmove(region.guest_address, b"efgh", 4)
        assert bytes(memory[0:4]) == b"efgh"


def test_array_is_a_view_with_a_stated_byte_order() -> None:
    with GuestMemory.of_size(8192) as memory:
        words = memory.array(4096, (2, 4), "<u4")
        words[1, 0] = 0x01020304
        assert bytes(memory[4112:4116]) == b"\x04\x03\x02\x01"
        assert memory.array(4112, 1, ">u4")[0] == 0x04030201
        with pytest.raises(LayoutError):
            memory.array(4096, 1025, "<u4")
        del words


def test_resident_counts_what_was_touched() -> None:
    with GuestMemory([Region(0, 1 << 20), Region(1 << 30, 1 << 20)]) as memory:
        assert memory.resident_bytes() == 0
        memory[0x3000:0x3001] = b"x"
        memory[(1 << 30) + 0x5000 : (1 << 30) + 0x5001] = b"x"
        assert np.flatnonzero(memory.resident()).tolist() == [3, 256 + 5]
        assert memory.resident_bytes() == 8192


def test_close_refuses_while_a_view_is_held() -> None:
    memory = GuestMemory.of_size(4096)
    regions = memory.regions
    view = memory.view(0, 16)
    with pytest.raises(BufferError):
        memory.close()
    view.release()
    memory.close()
    memory.close()
    assert all(region.memfd < 0 for region in regions)
