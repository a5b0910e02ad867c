"""What a snapshot says of vCPUs: those that ended, and those with an access under way."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

from kvmhost.boot.image import Image, Segment
from kvmhost.devices.bus import EXIT_PORT
from kvmhost.machine import Machine
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapshot import save_machine
from kvmhost.memory.layout import IMAGE_GPA, MMIO_GPA

pytestmark = pytest.mark.requires_kvm

PORT = 0x700
#: vCPU 0 waits for a byte here.
FLAG_GPA = 0x18_0000
FLAG = struct.pack("<I", FLAG_GPA)


def load_edx(port: int) -> bytes:
    return b"\xba" + struct.pack("<I", port)


def load_eax(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value)


OUT, IN = b"\xef", b"\xed"  # out dx, eax; in eax, dx
END = load_edx(EXIT_PORT) + OUT


def machine_of(code: bytes, n_vcpus: int = 1) -> Machine:
    image = Image("by hand", IMAGE_GPA, (Segment(IMAGE_GPA, code, len(code), 0),), ())
    return Machine(image, mem_bytes=4 << 20, engine="kvm", n_vcpus=n_vcpus)


def test_a_vcpu_that_ended_stays_ended(tmp_path: Path) -> None:
    """vCPU 1 exits with 7, and would exit with 9 if it ran once more."""
    first = b"\xb9" + FLAG + b"\x80\x39\x00\x74\xfb" + load_eax(0) + END  # 1: cmp [rcx], 0; je 1b
    second = load_eax(7) + END + load_eax(9) + END
    select = b"\x85\xff\x75" + bytes([len(first)])  # test edi, edi; jnz second
    with machine_of(select + first + second, n_vcpus=2) as machine:
        machine.start()
        until(lambda: machine.ended_vcpus == {1}, "vCPU 1 to end")
        save_machine(machine, tmp_path / "x.snap")
    with restore_machine(tmp_path / "x.snap") as machine:
        assert machine.ended_vcpus == {1}
        assert machine.statuses == {1: 7}
        machine.start()
        machine.memory[FLAG_GPA : FLAG_GPA + 1] = b"\x01"
        assert machine.wait(DEADLINE_S) == 7
        assert machine.statuses == {0: 0, 1: 7}


class Stall:
    """A device at which an access takes until it may go on."""

    def __init__(self) -> None:
        self.n_accesses = 0
        self.reached, self.go_on = threading.Event(), threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.n_accesses += 1
        self.reached.set()
        assert self.go_on.wait(DEADLINE_S)
        return 5

    def write(self, offset: int, size: int, value: int) -> None:
        self.read(offset, size)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(load_edx(PORT) + IN + END, id="in"),
        pytest.param(load_eax(5) + load_edx(PORT) + OUT + END, id="out"),
        pytest.param(load_eax(MMIO_GPA) + b"\x8b\x00" + END, id="mmio-read"),  # mov eax, [rax]
        pytest.param(
            load_edx(MMIO_GPA) + load_eax(5) + b"\x89\x02" + END, id="mmio-write"
        ),  # mov [rdx], eax
    ],
)
def test_an_access_under_way_is_complete_in_the_file(code: bytes, tmp_path: Path) -> None:
    """The vCPU stops between its exit and the next entry, which would complete the access."""
    with machine_of(code) as machine:
        device = Stall()
        machine.bus.add_port(PORT, 4, device)
        machine.bus.add_mmio(MMIO_GPA, 4096, device)
        machine.start()
        assert device.reached.wait(DEADLINE_S)
        pausing = threading.Thread(target=machine.pause, args=(DEADLINE_S,))
        pausing.start()
        until(lambda: machine.paused, "the pause to begin")
        device.go_on.set()
        pausing.join()
        save_machine(machine, tmp_path / "x.snap")
        machine.resume()
        assert machine.wait(DEADLINE_S) == 5
        assert device.n_accesses == 1
    with restore_machine(tmp_path / "x.snap") as machine:
        device = Stall()
        device.go_on.set()
        machine.bus.add_port(PORT, 4, device)
        machine.bus.add_mmio(MMIO_GPA, 4096, device)
        machine.start()
        assert machine.wait(DEADLINE_S) == 5
        assert device.n_accesses == 0
