"""Images: whatever is in the file, it loads or ends in an ImageError."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmhost.boot.image import (
    MAX_IMAGE_BYTES,
    PARTS_OF_ONE,
    Image,
    Param,
    Unit,
    read_image,
)
from kvmhost.boot.params import resolve_params
from kvmhost.errors import ImageError, LayoutError
from kvmhost.guests import image_names, image_path
from kvmhost.memory.guest import GuestMemory

HELLO = image_path("hello").read_bytes()
HEADERS = 64 + 56 * 2
SAME_FILE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300
)


def attempt(path: Path, data: bytes) -> Image | ImageError:
    path.write_bytes(data)
    try:
        image = read_image(path)
        with GuestMemory.of_size(4 << 20) as memory:
            image.load(memory, 3 << 20)
        return image
    except ImageError as error:
        return error


@pytest.mark.parametrize("name", image_names())
def test_built_in_guests_parse(name: str) -> None:
    image = read_image(image_path(name))
    assert image.entry == 0x10_0000
    assert len({param.name for param in image.params}) == len(image.params) > 0


@SAME_FILE
@given(
    edits=st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, HEADERS),
                st.integers(0, len(HELLO) - 1),
                st.integers(len(HELLO) - 64 * 10, len(HELLO) - 1),
            ),
            st.integers(0, 255),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_mutated_images_raise_nothing_else(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(HELLO)
    for at, value in edits:
        data[at] = value
    assert isinstance(attempt(tmp_path / "g.elf", bytes(data)), Image | ImageError)


@SAME_FILE
@given(
    field=st.sampled_from([24, 32, 40, *range(64 + 8, 64 + 56, 8)]),
    value=st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([1 << 63, (1 << 64) - 1])),
)
def test_huge_fields_raise_nothing_else(tmp_path: Path, field: int, value: int) -> None:
    data = bytearray(HELLO)
    struct.pack_into("<Q", data, field, value)
    assert isinstance(attempt(tmp_path / "g.elf", bytes(data)), Image | ImageError)


@SAME_FILE
@given(st.integers(0, len(HELLO) - 1))
def test_truncated_images_are_refused(tmp_path: Path, n_bytes: int) -> None:
    assert isinstance(attempt(tmp_path / "g.elf", HELLO[:n_bytes]), ImageError)


@SAME_FILE
@given(st.binary(max_size=300))
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    assert isinstance(attempt(tmp_path / "g.elf", data), ImageError)
    assert isinstance(attempt(tmp_path / "g.elf", b"\x7fELF" + data), ImageError)


def test_a_large_memory_size_takes_no_memory(tmp_path: Path) -> None:
    data = bytearray(HELLO)
    struct.pack_into("<Q", data, 64 + 40, 1 << 60)  # p_memsz
    path = tmp_path / "g.elf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        image = read_image(path)
        with GuestMemory.of_size(4 << 20) as memory, pytest.raises(ImageError, match="p_paddr"):
            image.load(memory, 3 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.elf"
    with path.open("wb") as file:
        file.write(HELLO)
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(ImageError, match="larger than"):
        read_image(path)


@pytest.mark.parametrize(
    ("at", "value", "field"),
    [
        (0, b"MZ", "e_ident"),
        (4, b"\x01", "e_ident"),
        (16, b"\x03", "e_type"),
        (18, b"\xb7", "e_machine"),
        (24, b"\0\0\0", "e_entry"),
        (54, b"\x20", "e_phentsize"),
    ],
)
def test_errors_name_the_field(tmp_path: Path, at: int, value: bytes, field: str) -> None:
    data = bytearray(HELLO)
    data[at : at + len(value)] = value
    error = attempt(tmp_path / "g.elf", bytes(data))
    assert isinstance(error, ImageError)
    assert error.field == field


PARAM = b"gfn_start=1024;first gfn of the range"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"gfn_start=x;", "need name=number;help"),
        (b"gfn-start=1;", "need name=number;help"),
        (b"gfn_start", "need name=number;help"),
        (b"gfn_start=" + b"9" * 21 + b";", "over 64 bits"),
        (b"pages=1;", "twice"),
        (b"x=1 miles;", "x: unknown unit 'miles'"),
    ],
)
def test_bad_parameters_are_refused(tmp_path: Path, line: bytes, problem: str) -> None:
    good = image_path("touch").read_bytes()
    assert good.count(PARAM) == 1
    error = attempt(tmp_path / "g.elf", good.replace(PARAM, line.ljust(len(PARAM), b"\0")))
    assert isinstance(error, ImageError)
    assert problem in str(error)
    assert error.file == str(tmp_path / "g.elf")


@pytest.mark.parametrize("path", ["absent.elf", ".", "fifo"])
def test_unreadable_files_are_named(tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ImageError, match="file"):
        read_image(tmp_path / path)


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [
        ("", "12", 12),
        ("", "0x10", 16),
        ("pages", "4096", 4096),
        ("pages", "64M", 16384),
        ("pages", "12pages", 12),
        ("permille", "250", 250),
        ("permille", "25%", 250),
        ("permille", "1/8", 125),
        ("permille", "0.9", 900),
        ("percent", "1/4", 25),
        ("percent", "30%", 30),
    ],
)
def test_a_value_of_a_parameter_as_text(unit: Unit, text: str, value: int) -> None:
    assert Param("x", 0, "", unit).parse(text) == value


@pytest.mark.parametrize(
    ("unit", "text", "problem"),
    [
        ("", "64M", "parameter x: '64M': need a number"),
        ("", "25%", "need a number"),
        ("pages", "25%", "parameter x: invalid size"),
        ("pages", "6000B", "no whole number of pages"),
        ("pages", "12Q", "invalid size"),
        ("permille", "64M", "parameter x: invalid share"),
        ("permille", "1/3", "no whole number of permille"),
        ("percent", "1/8", "no whole number of percent"),
    ],
)
def test_a_value_that_a_parameter_does_not_take(unit: Unit, text: str, problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        Param("x", 0, "", unit).parse(text)


def test_parameters_of_the_guests_have_units() -> None:
    """Numbers of pages and parts of a whole: their names say so."""
    for name in image_names():
        for param in read_image(image_path(name)).params:
            unit = param.name.rpartition("_")[2] if param.unit in ("permille", "percent") else ""
            assert unit in ("", param.unit), param
            assert (param.name in ("pages", "hot", "phase_step")) == (param.unit == "pages"), param
            assert param.name.endswith(("permille", "percent")) == (param.unit in PARTS_OF_ONE)


def test_values_are_resolved_by_the_image() -> None:
    image = read_image(image_path("hotcold"))
    values = resolve_params(image, {"pages": "64M", "hot": "0x100", "write_permille": "1/4"})
    assert (values["pages"], values["hot"], values["write_permille"]) == (16384, 256, 250)
    with pytest.raises(LayoutError, match=r"outside \[0, 2\*\*64\)"):
        resolve_params(image, {"seed": "-1"})
    with pytest.raises(LayoutError, match="no parameter 'start_gfn'"):
        resolve_params(image, {"start_gfn": 1024})
