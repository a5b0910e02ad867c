"""Images without a multiboot header: PVH, plain ELF, bare code; and single steps."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import DEADLINE_S

from kvmhost.boot.image import Image
from kvmhost.boot.loaders import load_image
from kvmhost.errors import ImageError
from kvmhost.exits import Debug
from kvmhost.machine import Machine
from kvmhost.machine.pc import PcMachine

Guest = Callable[[str], Path]

pytestmark = pytest.mark.requires_kvm

# mov $0xf4, %dx ; mov $N, %al ; out %al, %dx ; hlt
EXIT_32 = b"\x66\xba\xf4\x00\xb0\x05\xee\xf4"
EXIT_16 = b"\xba\xf4\x00\xb0\x06\xee\xf4"
BASE = 0x10_0000


def run(path: Path, loader: str = "auto") -> int:
    image = load_image(path, loader)
    assert not isinstance(image, Image)
    with PcMachine(image) as machine:
        machine.start()
        return machine.wait(DEADLINE_S)


def elf32(code: bytes, *notes: bytes) -> bytes:
    """Make a 32-bit executable of one segment, and a note segment behind it."""
    note = b"".join(notes)
    n_headers = 2 if note else 1
    at = 52 + 32 * n_headers
    head = b"\x7fELF\1\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, BASE, 52, 0, 0, 52, 32, n_headers, 0, 0, 0)
    head += struct.pack("<8I", 1, at, BASE, BASE, len(code), len(code) + 64, 7, 4096)
    if note:
        head += struct.pack("<8I", 4, at + len(code), 0, 0, len(note), len(note), 4, 4)
    return head + code + note


def elf64(code: bytes) -> bytes:
    head = b"\x7fELF\2\1\1".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, BASE, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    head += struct.pack("<IIQQQQQQ", 1, 7, 120, BASE, BASE, len(code), len(code), 4096)
    return head + code


def test_plain_elf_of_32_bits(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(elf32(EXIT_32))
    assert run(tmp_path / "a") == 11


def test_plain_elf_of_64_bits_at_level_0(tmp_path: Path) -> None:
    # mov %cs, %eax ; test $3, %al ; jnz +7 ; and then out: only level 0 gets there
    code = b"\x8c\xc8\xa8\x03\x75\x07" + EXIT_32 + b"\xf4"
    (tmp_path / "a").write_bytes(elf64(code))
    assert run(tmp_path / "a", "elf") == 11


def test_pvh_note_names_the_entry(tmp_path: Path) -> None:
    # At the ELF entry there is only hlt; the note's entry checks the magic at (ebx).
    code = b"\xfa\xf4".ljust(16, b"\x90")
    code += b"\x81\x3b" + struct.pack("<I", 0x336EC578) + b"\x75\x07" + EXIT_32
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", BASE + 16)
    (tmp_path / "a").write_bytes(elf32(code, note))
    image = load_image(tmp_path / "a")
    assert not isinstance(image, Image)
    assert image.loader == "pvh"
    assert run(tmp_path / "a") == 11


@pytest.mark.parametrize(
    ("loader", "code", "status"), [("flat16", EXIT_16, 13), ("flat32", EXIT_32, 11)]
)
def test_bare_code_on_a_pc(loader: str, code: bytes, status: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(code)
    assert run(tmp_path / "a", loader) == status


def test_bare_code_in_a_tiny_machine_runs_at_level_3(tmp_path: Path) -> None:
    # mov %cs, %eax ; and $3, %eax ; mov $0xf4, %dx ; out %al, %dx
    (tmp_path / "a").write_bytes(b"\x8c\xc8\x83\xe0\x03\x66\xba\xf4\x00\xee\xf4")
    image = load_image(tmp_path / "a", "flat64")
    assert isinstance(image, Image)
    with Machine(image, mem_bytes=4 << 20, engine="kvm") as machine:
        machine.start()
        assert machine.wait(DEADLINE_S) == 3 << 1 | 1


def test_single_steps_follow_the_code(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x40\x40\x40" + EXIT_32)  # inc %eax, three times
    image = load_image(tmp_path / "a", "flat32")
    assert not isinstance(image, Image)
    with PcMachine(image) as machine:
        machine.start(paused=True)
        seen = []
        for _ in range(4):
            vm_exit = machine.single_step()
            assert isinstance(vm_exit, Debug)
            seen.append((vm_exit.pc - BASE, machine.vcpus[0].registers()["rax"]))
        assert seen == [(1, 1), (2, 2), (3, 3), (7, 3)]
        machine.resume()
        assert machine.wait(DEADLINE_S) == 11


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmhost", "run", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )


def test_bad_images_exit_2_with_file_and_offset(pc_guest: Guest, tmp_path: Path) -> None:
    data = bytearray(pc_guest("hello.flat").read_bytes())
    struct.pack_into("<I", data, 20, 1)  # load_end_addr
    path = tmp_path / "bad.flat"
    path.write_bytes(data)
    done = command(str(path))
    assert done.returncode == 2
    assert f"{path}: load_end_addr at offset 0x14" in done.stderr
    path.write_bytes(b"no image at all")
    assert command(str(path)).returncode == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--initrd", "/nonexistent"], "/nonexistent"),
        (["--fw-cfg", "opt/x"], "--fw-cfg"),
        (["--fw-cfg", "name=opt/x,file=/nonexistent"], "/nonexistent"),
        (["--mem", "1M"], "too small"),
        (["--param", "pages=1"], "takes no parameters"),
        (["--vcpus", "0"], "--vcpus"),
        (["--serial", "carrier-pigeon"], "--serial"),
    ],
)
def test_bad_words_exit_2(words: list[str], complaint: str, pc_guest: Guest) -> None:
    done = command(str(pc_guest("hello.elf")), *words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_ends_of_the_guest_and_exit_codes(pc_guest: Guest) -> None:
    bad = str(pc_guest("bad.elf"))
    for letter, told in (("t", "triple fault"), ("h", "halted with interrupts off")):
        done = command(bad, "--append", letter)
        assert done.returncode == 125
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    done = command(str(pc_guest("echo.elf")), "--timeout", "0.7")
    assert done.returncode == 124


def test_a_bzimage_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "bzImage"
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(1024))
    with pytest.raises(ImageError, match=r"setup header at offset 0x202: a Linux bzImage"):
        load_image(path)
