"""The emulated engine on raw code: no KVM, no threads but the test's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.boot.longmode import entry_state, lay_out_tables
from kvmhost.devices.bus import Bus
from kvmhost.engine.base import RearmKind
from kvmhost.engine.emulated import EmulatedEngine
from kvmhost.exits import Exit, InternalError, IoIn, IoOut, Kicked, Shutdown
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.layout import IMAGE_GPA, TinyLayout

ACCESSED = 1 << 5
SPIN = b"\xeb\xfe"


class Raw:
    """One vCPU at the start of some machine code."""

    def __init__(self, code: bytes) -> None:
        self.layout = TinyLayout(4 << 20)
        self.memory = GuestMemory.of_size(self.layout.mem_bytes)
        self.memory[IMAGE_GPA : IMAGE_GPA + len(code)] = code
        lay_out_tables(self.memory, self.layout)
        self.engine = EmulatedEngine()
        self.engine.attach(self.memory, Bus())
        self.vcpu = self.engine.create_vcpu(0, entry_state(self.layout, IMAGE_GPA, 0))

    def is_accessed(self, clear: bool = False) -> bool:
        """Test (and clear) the accessed bit of the leaf that maps gpa 0x180000."""
        entries = self.memory.array(self.layout.tables_gpa, 512 * 6, "<u8")
        (where,) = np.flatnonzero(entries & ~np.uint64(0xFFF) == 0x18_0000)
        found = bool(entries[where] & ACCESSED)
        if clear:
            entries[where] &= ~np.uint64(ACCESSED)
        return found

    def close(self) -> None:
        self.vcpu.close()
        self.engine.close()
        self.memory.close()


@pytest.fixture
def raw(request: pytest.FixtureRequest) -> Iterator[Raw]:
    made = Raw(request.param)
    yield made
    made.close()


def code(*values: bytes) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("raw", [b"".join(values)], indirect=True, ids=["code"])


@code(b"\xe6\x80", b"\xff\xc3", b"\xe4\x81", b"\x0f\x0b")
def test_stops_exactly_at_port_instructions(raw: Raw) -> None:
    assert raw.vcpu.run() == IoOut(0x80, 1, b"\0")
    assert raw.vcpu.registers()["rip"] == IMAGE_GPA + 2
    assert raw.vcpu.registers()["rbx"] == 0
    assert raw.vcpu.run() == IoIn(0x81, 1)
    raw.vcpu.complete_read(b"\x5a")
    vm_exit = raw.vcpu.run()
    assert isinstance(vm_exit, Shutdown)
    registers = raw.vcpu.registers()
    assert (registers["rax"], registers["rbx"]) == (0x5A, 1)
    assert registers["rip"] == IMAGE_GPA + 6
    assert registers["cs"] & 3 == 3
    assert raw.vcpu.exits == 3


@code(b"\xe4\x81", b"\x0f\x0b")
def test_unanswered_read_is_all_ones(raw: Raw) -> None:
    assert raw.vcpu.run() == IoIn(0x81, 1)
    assert isinstance(raw.vcpu.run(), Shutdown)
    assert raw.vcpu.registers()["rax"] == 0xFF


# mov byte [rip + 5], 0xee; jmp +0; nop: the nop becomes "out dx, al" after its first run.
@code(
    b"\xeb\x07",
    b"\xc6\x05\x02\x00\x00\x00\xee",
    b"\xeb\x00",
    b"\x90",
    b"\xeb\xf4",
)
def test_new_port_instruction_over_old_code_is_told(raw: Raw) -> None:
    vm_exit: Exit = raw.vcpu.run()
    assert isinstance(vm_exit, InternalError)
    assert vm_exit.suberror == 1


@code(SPIN)
def test_kick_ends_a_spin_and_is_not_lost(raw: Raw) -> None:
    raw.vcpu.kick()
    assert raw.vcpu.run() == Kicked()
    results: list[Exit] = []
    thread = threading.Thread(target=lambda: results.append(raw.vcpu.run()))
    thread.start()
    raw.vcpu.kick()
    thread.join(DEADLINE_S)
    assert results == [Kicked()]


# 1: mov rax, [0x180000]; jmp 1b
@code(b"\x48\x8b\x04\x25\x00\x00\x18\x00", b"\xeb\xf6")
def test_flush_rearms_under_a_running_vcpu(raw: Raw) -> None:
    assert raw.engine.fixed_rearm is RearmKind.TLB_FLUSH
    thread = threading.Thread(target=raw.vcpu.run)
    assert not raw.is_accessed()
    thread.start()
    try:
        until(raw.is_accessed)
        raw.is_accessed(clear=True)
        raw.engine.flush_tlbs()  # of a vCPU that is running
        until(raw.is_accessed)
    finally:
        raw.vcpu.kick()
        thread.join(DEADLINE_S)
    raw.is_accessed(clear=True)
    raw.engine.flush_tlbs()  # of one that stands still
    assert not raw.is_accessed()


# mov rax, [0x180000]; out 0x80, al; twice
@code((b"\x48\x8b\x04\x25\x00\x00\x18\x00" + b"\xe6\x80") * 3)
def test_cached_translation_sets_nothing(raw: Raw) -> None:
    assert isinstance(raw.vcpu.run(), IoOut)
    assert raw.is_accessed(clear=True)
    assert isinstance(raw.vcpu.run(), IoOut)
    assert not raw.is_accessed()
    raw.engine.flush_tlbs()
    assert isinstance(raw.vcpu.run(), IoOut)
    assert raw.is_accessed()


COUNTER, ROUNDS = 0x18_0000, 200_000
COUNT_UP = [
    b"\xb9" + ROUNDS.to_bytes(4, "little"),  # mov ecx, ROUNDS
    b"\xbf" + COUNTER.to_bytes(4, "little"),  # mov edi, COUNTER
    b"\xf0\xff\x07",  # lock inc dword [rdi]
    b"\xe2\xfb",  # loop to it
    b"\xba\xa4\x05\x00\x00\xef",  # mov edx, 0x5a4; out dx, eax
]


@code(*COUNT_UP)
def test_locked_instructions_of_two_vcpus_add_up(raw: Raw) -> None:
    vcpus = [raw.vcpu, raw.engine.create_vcpu(1, entry_state(raw.layout, IMAGE_GPA, 1))]
    ends: list[Exit] = []
    threads = [threading.Thread(target=lambda v=v: ends.append(v.run())) for v in vcpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=DEADLINE_S)
    assert [end.port for end in ends if isinstance(end, IoOut)] == [0x5A4] * 2
    assert int(raw.memory.array(COUNTER, 1, "<u4")[0]) == 2 * ROUNDS
