"""Multiboot images: headers as the specification has them, and damaged ones."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvmhost.boot.elf import parse_elf
from kvmhost.boot.image import Image
from kvmhost.boot.loaders import detect, load_image
from kvmhost.boot.multiboot import find_header, parse_multiboot
from kvmhost.boot.pcboot import BootRequest, Mode, Module, PcImage
from kvmhost.errors import ImageError, LayoutError
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.pclayout import PcLayout
from kvmhost.vm.names import LOADERS

Guest = Callable[[str], Path]

MAGIC, ADDRESSES = 0x1BADB002, 1 << 16
LAYOUT = PcLayout(16 << 20)
SAME = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)


def header(flags: int = ADDRESSES, *addresses: int) -> bytes:
    words = [MAGIC, flags, -(MAGIC + flags) & 0xFFFFFFFF, *addresses]
    return struct.pack(f"<{len(words)}I", *words)


def flat(at: int = 0, code: bytes = b"\xf4" * 64, **changes: int) -> bytes:
    base = 0x10_0000
    fields = {
        "header_addr": base + at,
        "load_addr": base,
        "load_end_addr": 0,
        "bss_end_addr": 0,
        "entry_addr": base + at + 32,
    } | changes
    return bytes(at) + header(ADDRESSES, *fields.values()) + code


def loaded(image: PcImage, *modules: Module, command_line: str = "x") -> GuestMemory:
    memory = GuestMemory.of_size(LAYOUT.mem_bytes)
    image.plan(BootRequest(LAYOUT, command_line, modules)).load(memory, LAYOUT)
    return memory


def attempt(path: Path, data: bytes, loader: str = "auto") -> object:
    """Load as far as memory; return the image or the error."""
    path.write_bytes(data)
    try:
        image = load_image(path, loader)
        if not isinstance(image, Image):
            loaded(image).close()
        return image
    except ImageError as error:
        return error


@pytest.mark.parametrize("at", [0, 4, 4096, 8192 - 52])
def test_the_header_is_found_at_multiples_of_4(at: int) -> None:
    data = flat(at)
    assert find_header(data) == at
    image = parse_multiboot("x", data)
    assert image.chunks[0].gpa == 0x10_0000
    assert image.chunks[0].data == data
    assert image.entry == 0x10_0000 + at + 32


@pytest.mark.parametrize("at", [1, 2, 8192 - 48, 8192])
def test_no_header_elsewhere(at: int) -> None:
    assert find_header(flat(at)) is None


def test_a_wrong_checksum_is_no_header_and_the_search_goes_on() -> None:
    wrong = struct.pack("<III", MAGIC, 0, 5)
    assert find_header(wrong) is None
    assert find_header(wrong + flat()) == len(wrong)


def test_address_fields_choose_the_bytes_and_the_zeros() -> None:
    code = bytes(range(1, 101))
    data = flat(16, code, load_addr=0x10_0010, load_end_addr=0x10_0010 + 40, bss_end_addr=0x10_1000)
    (chunk,) = parse_multiboot("x", data).chunks
    assert (chunk.gpa, chunk.data) == (0x10_0010, data[16:56])
    assert chunk.end == 0x10_1000


@pytest.mark.parametrize(
    ("changes", "field", "offset"),
    [
        ({"load_addr": 0x10_0004}, "load_addr", 16),
        ({"header_addr": 0x10_0004}, "header_addr", 12),
        ({"load_end_addr": 0xF_FFFF}, "load_end_addr", 20),
        ({"load_end_addr": 0x10_1000}, "load_end_addr", 20),
        ({"bss_end_addr": 0x10_0010}, "bss_end_addr", 24),
        ({"bss_end_addr": 0x200_0000}, "load_addr", 16),
        ({"load_addr": 0xFFFF_FFF0, "header_addr": 0xFFFF_FFF0}, "load_addr", 16),
    ],
)
def test_contradictions_name_field_and_offset(
    changes: dict[str, int], field: str, offset: int, tmp_path: Path
) -> None:
    error = attempt(tmp_path / "bad.flat", flat(0, **changes))
    assert isinstance(error, ImageError)
    assert (error.field, error.offset) == (field, offset)


def test_an_elf_segment_far_away_is_refused(pc_guest: Guest, tmp_path: Path) -> None:
    data = bytearray(pc_guest("hello.elf").read_bytes())
    (phoff,) = struct.unpack_from("<I", data, 28)
    struct.pack_into("<II", data, phoff + 8, 0xF000_0000, 0xF000_0000)  # p_vaddr, p_paddr
    struct.pack_into("<I", data, 24, 0xF000_0010)  # e_entry
    error = attempt(tmp_path / "bad.elf", bytes(data))
    assert isinstance(error, ImageError)
    assert (error.field, error.offset) == ("p_paddr", phoff)


def test_modules_that_do_not_fit_are_named() -> None:
    image = parse_multiboot("img", flat())
    with pytest.raises(ImageError, match="module big"):
        image.plan(BootRequest(LAYOUT, "x", (Module("big", "", bytes(16 << 20)),)))


def test_without_addresses_the_file_has_to_be_elf(tmp_path: Path) -> None:
    error = attempt(tmp_path / "bad.flat", header(3) + bytes(100))
    assert isinstance(error, ImageError)
    assert (error.field, error.offset) == ("multiboot flags", 4)


def test_a_cut_header_is_refused(tmp_path: Path) -> None:
    error = attempt(tmp_path / "bad.flat", flat(0, b"")[:-4])
    assert isinstance(error, ImageError)
    assert error.field == "multiboot header"


def test_modules_and_strings_lie_behind_the_image() -> None:
    modules = (Module("one", "a b", b"M" * 5000), Module("two", "", b""))
    with loaded(parse_multiboot("img", flat()), *modules, command_line="img --x") as memory:
        info = struct.unpack("<7I", memory[0x9500:0x951C])
        assert info[0] == 0x24F
        assert text(memory, info[4]) == b"img --x"
        assert info[5:7] == (2, 0x10_1000)
        one = struct.unpack("<4I", memory[info[6] : info[6] + 16])
        assert (one[0] % 4096, one[1] - one[0]) == (0, 5000)
        assert bytes(memory[one[0] : one[1]]) == b"M" * 5000
        assert text(memory, one[2]) == b"one a b"
        two = struct.unpack("<4I", memory[info[6] + 16 : info[6] + 32])
        assert two[0] == two[1] >= one[1]
        (n_map, map_at) = struct.unpack("<II", memory[0x952C:0x9534])
        assert (n_map % 24, map_at) == (0, 0x9000)
        assert text(memory, struct.unpack("<I", memory[0x9540:0x9544])[0]) == b"qemu"


def text(memory: GuestMemory, gpa: int) -> bytes:
    return bytes(memory[gpa : gpa + 64]).split(b"\0")[0]


def test_an_image_over_an_older_chunk_leaves_zeros_in_its_bss() -> None:
    data = flat(0, b"\xff" * 100, load_end_addr=0x10_0000 + 32, bss_end_addr=0x10_0000 + 132)
    with loaded(parse_multiboot("x", data)) as memory:
        assert bytes(memory[0x10_0020:0x10_0084]) == bytes(100)


@pytest.mark.parametrize("name", ["hello.elf", "hello.flat", "long.elf"])
def test_detection(name: str, pc_guest: Guest) -> None:
    image = pc_guest(name)
    assert detect(str(image), image.read_bytes()) == "multiboot"
    parsed = load_image(image)
    assert not isinstance(parsed, Image)
    assert parsed.plan(BootRequest(LAYOUT, "x")).entry.mode is Mode.PROTECTED


def test_an_unknown_loader_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(LayoutError, match="unknown loader"):
        load_image(tmp_path / "x", "magic")


@SAME
@given(
    data=st.binary(max_size=200),
    loader=st.sampled_from(LOADERS),
    front=st.sampled_from([b"", b"\x7fELF\1\1", b"\x7fELF\2\1", header(0), header(ADDRESSES)]),
)
@example(data=b"", loader="flat32", front=b"")
def test_any_file_loads_or_is_refused(
    data: bytes, loader: str, front: bytes, tmp_path: Path
) -> None:
    attempt(tmp_path / "any", front + data, loader)


@SAME
@given(
    name=st.sampled_from(["hello.elf", "hello.flat"]),
    edits=st.lists(
        st.tuples(st.one_of(st.integers(0, 200), st.integers(0, 4800)), st.integers(0, 255)),
        min_size=1,
        max_size=5,
    ),
    loader=st.sampled_from(["auto", "multiboot", "elf", "pvh"]),
)
def test_changed_images_load_or_are_refused(
    name: str, edits: list[tuple[int, int]], loader: str, pc_guest: Guest, tmp_path: Path
) -> None:
    data = bytearray(pc_guest(name).read_bytes())
    for at, value in edits:
        data[at % len(data)] = value
    attempt(tmp_path / "any", bytes(data), loader)


@SAME
@given(fields=st.tuples(*[st.integers(0, (1 << 32) - 1)] * 5), at=st.integers(0, 2100))
def test_any_addresses_load_or_are_refused(
    fields: tuple[int, ...], at: int, tmp_path: Path
) -> None:
    data = bytes(4 * at) + header(ADDRESSES, *fields) + b"\xf4" * 50
    attempt(tmp_path / "any", data)


def elf32_of(code: bytes, gpa: int, note: bytes = b"", align: int = 4) -> bytes:
    """Make a 32-bit executable with one segment, and a note segment behind it."""
    n_headers = 2 if note else 1
    at = 52 + 32 * n_headers
    head = b"\x7fELF\1\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, gpa, 52, 0, 0, 52, 32, n_headers, 0, 0, 0)
    head += struct.pack("<8I", 1, at, gpa, gpa, len(code), len(code), 7, 4)
    if note:
        head += struct.pack("<8I", 4, at + len(code), 0, 0, len(note), len(note), 4, align)
    return head + code + note


@pytest.mark.parametrize("gpa", [0x8000, 0x9000, 0x9400, 0x1000])
@pytest.mark.parametrize("protocol", ["multiboot", "pvh"])
def test_boot_information_stays_clear_of_the_image(protocol: str, gpa: int, tmp_path: Path) -> None:
    code = header(0) + bytes(range(1, 256)) * 40
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", gpa) if protocol == "pvh" else b""
    (tmp_path / "low").write_bytes(elf32_of(code, gpa, note))
    image = load_image(tmp_path / "low", protocol)
    assert not isinstance(image, Image)
    plan = image.plan(BootRequest(LAYOUT, "x"))
    chunks = sorted(plan.chunks, key=lambda chunk: chunk.gpa)
    assert all(a.end <= b.gpa for a, b in itertools.pairwise(chunks) if b.mem_bytes)
    with loaded(image) as memory:
        assert bytes(memory[gpa : gpa + len(code)]) == code
        info = bytes(memory[plan.entry.rbx : plan.entry.rbx + 64])
        if protocol == "multiboot":
            length, address = struct.unpack_from("<II", info, 44)
        else:
            address, count = struct.unpack_from("<QI", info, 40)
            length = 24 * count
        table = bytes(memory[address : address + length])
    mapped = LAYOUT.memory_map()[3]
    assert struct.pack("<QQI", mapped.gpa, mapped.n_bytes, mapped.kind) in table


def test_an_image_that_fills_low_memory_leaves_no_room(tmp_path: Path) -> None:
    data = elf32_of(header(0) + bytes(0x9_FC00 - 0x1000), 0x1000)
    error = attempt(tmp_path / "full", data)
    assert isinstance(error, ImageError)
    assert "memory map" in str(error)
    assert "leaves no room" in str(error)


MULTIBOOT2 = struct.pack("<IIII", 0xE85250D6, 0, 16, -(0xE85250D6 + 16) & 0xFFFFFFFF)


@pytest.mark.parametrize(
    ("code", "field", "offset"),
    [
        (bytes(4) + MULTIBOOT2, "multiboot2 header", 88),
        (bytes(8192) + header(0), "multiboot header", 84 + 8192),
    ],
)
def test_headers_that_no_loader_takes_are_refused(
    code: bytes, field: str, offset: int, tmp_path: Path
) -> None:
    error = attempt(tmp_path / "a", elf32_of(code, 0x10_0000))
    assert isinstance(error, ImageError)
    assert (error.field, error.offset) == (field, offset)
    assert "--loader elf" in str(error)
    assert not isinstance(attempt(tmp_path / "a", elf32_of(code, 0x10_0000), "elf"), ImageError)


def test_a_header_with_a_wrong_checksum_is_no_header(tmp_path: Path) -> None:
    wrong = MULTIBOOT2[:12] + struct.pack("<I", 1)
    assert not isinstance(attempt(tmp_path / "a", elf32_of(wrong, 0x10_0000)), ImageError)


def test_requirements_are_met_said_or_refused(tmp_path: Path) -> None:
    plain, video = header(3) + b"\xf4" * 64, header(7) + b"\xf4" * 64
    path = tmp_path / "a"
    assert getattr(attempt(path, elf32_of(plain, 0x10_0000)), "remarks", None) == ()
    (remark,) = getattr(attempt(path, elf32_of(video, 0x10_0000)), "remarks", ())
    assert "require a video mode" in remark
    assert "0x58" in remark
    error = attempt(path, elf32_of(header(8) + b"\xf4" * 64, 0x10_0000))
    assert isinstance(error, ImageError)
    assert "requires bits 0x8" in str(error)


def note(owner: bytes, kind: int, data: bytes, align: int) -> bytes:
    head = struct.pack("<III", len(owner) + 1, len(data), kind) + owner + b"\0"
    head += bytes(-len(head) % align)
    return head + data + bytes(-len(data) % align)


@pytest.mark.parametrize("align", [0, 4, 8])
def test_notes_are_read_with_the_alignment_of_their_segment(align: int, tmp_path: Path) -> None:
    real = 8 if align == 8 else 4
    notes = note(b"GNU", 3, bytes(20), real) + note(b"GNU", 5, bytes(17), real)
    notes += note(b"Xen", 18, struct.pack("<I", 0x10_0000), real)
    (tmp_path / "a").write_bytes(elf32_of(b"\xf4" * 64, 0x10_0000, notes, align))
    image = load_image(tmp_path / "a")
    assert not isinstance(image, Image)
    assert (image.loader, image.plan(BootRequest(LAYOUT, "")).entry.rip) == ("pvh", 0x10_0000)


def test_notes_that_cannot_be_read_mean_no_pvh(tmp_path: Path) -> None:
    cut = struct.pack("<III", 4, 4000, 18) + b"Xen\0"
    data = elf32_of(b"\xf4" * 64, 0x10_0000, cut)
    (tmp_path / "a").write_bytes(data)
    image = load_image(tmp_path / "a")
    assert not isinstance(image, Image)
    assert image.loader == "elf"
    error = attempt(tmp_path / "a", data, "pvh")
    assert isinstance(error, ImageError)
    assert error.field == "n_descsz"


def test_note_segments_over_the_same_bytes_are_bounded(tmp_path: Path) -> None:
    """The work follows the size of the file, not the number of headers times a segment."""
    notes = note(b"GNU", 3, bytes(4), 4) * 2000
    n_headers = 1000
    head = b"\x7fELF\1\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x10_0000, 52, 0, 0, 52, 32, n_headers, 0, 0, 0)
    at = 52 + 32 * n_headers
    head += struct.pack("<8I", 4, at, 0, 0, len(notes), len(notes), 4, 4) * n_headers
    with pytest.raises(ImageError, match="note segments of"):
        list(parse_elf("a", head + notes).notes())
