"""The same guests on both engines: same output, same status, same memory, same errors."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.devices.bus import BusDevice
from kvmhost.errors import GuestTimeout, UnexpectedExit
from kvmhost.guests import image_path
from kvmhost.guests.build import CFLAGS, SOURCES
from kvmhost.machine import Machine
from kvmhost.memory.layout import MMIO_GPA
from kvmhost.units import PAGE_BYTES

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
pytestmark = [pytest.mark.parametrize("engine", ENGINES), pytest.mark.usefixtures("nothing_left")]

ACCESSED, DIRTY = 1 << 5, 1 << 6
MIB = 1 << 20
Make = Callable[..., Machine]
Compile = Callable[[str], Path]


@pytest.fixture(scope="module")
def compile_guest(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Return a compiler of guests: the body of ``guest_main(vcpu, params)``."""
    folder = tmp_path_factory.mktemp("guests")

    def compile_(body: str) -> Path:
        source = folder / f"guest{len(list(folder.iterdir()))}.c"
        source.write_text(
            '#include "guest.h"\n'
            "u64 guest_main(u64 vcpu, struct params *params)\n"
            f"{{ (void)vcpu; (void)params;\n{body}\nreturn 0; }}\n"
        )
        image = source.with_suffix(".elf")
        files = [str(SOURCES / "start.S"), str(source)]
        script = f"-Wl,-T,{SOURCES / 'guest.ld'}"
        subprocess.run(
            ["cc", *CFLAGS, f"-I{SOURCES}", script, "-o", str(image), *files], check=True
        )
        return image

    return compile_


class Recorder:
    """A device that answers reads from a list and keeps what was written."""

    def __init__(self, *answers: int) -> None:
        self.answers, self.seen = list(answers), list[tuple[str, int, int, int]]()

    def read(self, offset: int, size: int) -> int:
        value = self.answers.pop(0)
        self.seen.append(("read", offset, size, value))
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("write", offset, size, value))


def run(machine: Machine) -> int:
    machine.start()
    return machine.wait(DEADLINE_S)


def on_port(machine: Machine, device: BusDevice) -> Machine:
    machine.bus.add_port(0x200, 8, device)
    return machine


def on_mmio(machine: Machine, device: BusDevice) -> Machine:
    machine.bus.add_mmio(MMIO_GPA, 2 * PAGE_BYTES, device)
    return machine


# -- the built-in guests ------------------------------------------------------------


def test_hello_prints_and_exits(engine: str, make_vm: Make) -> None:
    machine = make_vm(image_path("hello"), mem_bytes=4 * MIB, engine=engine)
    assert run(machine) == 0
    assert machine.console_text() == "hello from vCPU 0x0 of 0x1\n"


def test_status_is_the_guests(engine: str, make_vm: Make) -> None:
    machine = make_vm(image_path("hello"), mem_bytes=4 * MIB, engine=engine, params={"status": 7})
    assert run(machine) == 7


def test_two_vcpus_each_print(engine: str, make_vm: Make) -> None:
    machine = make_vm(image_path("hello"), mem_bytes=4 * MIB, engine=engine, n_vcpus=2)
    assert run(machine) == 0
    # A KVM may exit once a byte, so that the two lines mix.
    wanted = "hello from vCPU 0x0 of 0x2\nhello from vCPU 0x1 of 0x2\n"
    assert sorted(machine.console_text()) == sorted(wanted)


@pytest.mark.parametrize("n_vcpus", [1, 2])
def test_hotcold_checks_every_byte(engine: str, n_vcpus: int, make_vm: Make) -> None:
    machine = make_vm(
        image_path("hotcold"), engine=engine, n_vcpus=n_vcpus, params={"epochs": 12, "pages": 2000}
    )
    assert run(machine) == 0, machine.result()
    assert machine.doorbells == 12 * n_vcpus


def test_hotcold_finds_one_wrong_byte(engine: str, make_vm: Make) -> None:
    machine = make_vm(image_path("hotcold"), engine=engine, params={"epochs": 0, "scan_every": 1})
    machine.step_by_doorbell()
    assert machine.run_epoch()
    gpa = (1024 + 77) * PAGE_BYTES + 123
    machine.memory[gpa : gpa + 1] = bytes([machine.memory[gpa : gpa + 1][0] ^ 1])
    machine.step_by_doorbell(False)
    assert machine.wait(DEADLINE_S) == 1
    assert machine.result().gfn == 1024 + 77


def test_touch_reads_and_writes_set_the_bits_in_the_guests_tables(
    engine: str, make_vm: Make
) -> None:
    for write in (0, 1):
        machine = make_vm(
            image_path("touch"),
            mem_bytes=16 * MIB,
            engine=engine,
            params={"pages": 1000, "stride": 2, "write": write},
        )
        assert run(machine) == 0
        entries = leaf_entries(machine)[1024:2024]
        touched = np.arange(1000) % 2 == 0
        assert ((entries & ACCESSED != 0) == touched).all()
        assert ((entries & DIRTY != 0) == (touched & bool(write))).all()


def leaf_entries(machine: Machine) -> np.ndarray:
    """Return the leaf entries of gfns from 0 on, walked here."""
    memory, root = machine.memory, machine.layout.tables_gpa

    def table(gpa: int) -> np.ndarray:
        return memory.array(gpa, 512, "<u8").copy()

    def child(entry: int) -> int:
        return int(entry) & 0x000F_FFFF_FFFF_F000

    directory = table(child(table(child(table(root)[0]))[0]))
    return np.concatenate([table(child(entry)) for entry in directory if entry & 1])


# -- control -------------------------------------------------------------------------


def test_pause_stands_still_and_resume_goes_on(engine: str, make_vm: Make[..., None]) -> None:
    machine = make_vm(image_path("touch"), engine=engine, n_vcpus=2, params={"epochs": 0})
    machine.start()
    until(lambda: machine.doorbells > 10, "doorbells")
    for _ in range(50):
        machine.pause()
        seen = machine.doorbells
        before = [vcpu.registers() for vcpu in machine.vcpus]
        assert [vcpu.registers() for vcpu in machine.vcpus] == before
        assert machine.doorbells == seen
        machine.resume()
    until(lambda: machine.doorbells > seen, "doorbells after resume")
    machine.stop()
    assert not machine.running


def test_kick_before_run_is_not_lost(
    engine: str, make_vm: Make, compile_guest: Compile[..., None]
) -> None:
    # One block that jumps to itself: nothing but a kick ends it.
    machine = make_vm(compile_guest('__asm__ volatile("1: jmp 1b");'), engine=engine)
    vcpu, returned = machine.vcpus[0], []

    def runs() -> None:
        for _ in range(200):
            returned.append(type(vcpu.run()).__name__)

    thread = threading.Thread(target=runs)
    vcpu.kick()
    thread.start()
    for wanted in range(1, 201):
        until(lambda wanted=wanted: len(returned) >= wanted, f"return {wanted}")
        if wanted < 200:
            vcpu.kick()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert set(returned) == {"Kicked"}


def test_storm_of_pauses_changes_nothing(engine: str, make_vm: Make) -> None:
    machine = make_vm(
        image_path("hotcold"),
        engine=engine,
        n_vcpus=2,
        params={"epochs": 6, "pages": 1000, "hot": 100},
    )
    machine.start()
    deadline = time.monotonic() + DEADLINE_S
    while machine.running and time.monotonic() < deadline:
        machine.pause()
        machine.engine.flush_tlbs()
        machine.resume()
        machine.engine.flush_tlbs()
        machine.vcpus[0].kick()
        time.sleep(0.001)  # else the guest gets nothing done
    assert machine.wait(DEADLINE_S) == 0


def test_timeout_is_told(engine: str, make_vm: Make) -> None:
    machine = make_vm(image_path("touch"), engine=engine, params={"epochs": 0})
    machine.start()
    with pytest.raises(GuestTimeout):
        machine.wait(timeout_s=0.05)
    machine.stop()


# -- ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        '__asm__ volatile("ud2");',
        '__asm__ volatile("hlt");',
        '__asm__ volatile("mov %0, %%cr3" : : "r"(0ul));',
        "*(volatile int *)0 = 1;",
        "*(volatile int *)0x7000000000 = 1;",
        '__asm__ volatile("divl %0" : : "r"(0), "a"(1), "d"(0));',
    ],
    ids=["ud2", "hlt", "cr3", "null", "unmapped", "divide"],
)
def test_exception_is_a_triple_fault(
    engine: str, body: str, make_vm: Make, compile_guest: Compile
) -> None:
    machine = make_vm(compile_guest(body), mem_bytes=4 * MIB, engine=engine)
    with pytest.raises(UnexpectedExit, match=r"triple fault") as caught:
        run(machine)
    shown = "rip=0x1000" in str(caught.value)
    assert shown or (engine == "kvm" and "KVM on AMD resets" in str(caught.value))


@pytest.mark.parametrize(("kind", "text"), [("read", "(void)*p;"), ("write", "*p = 1;")])
def test_access_outside_the_slots_is_named(
    engine: str, kind: str, text: str, make_vm: Make, compile_guest: Compile
) -> None:
    body = f"volatile u32 *p = (void *){MMIO_GPA + 0x40:#x}ul; {text}"
    machine = make_vm(compile_guest(body), mem_bytes=4 * MIB, engine=engine)
    with pytest.raises(UnexpectedExit, match=f"{kind} outside all memory slots, gpa 0xd0000040"):
        run(machine)


# -- devices ---------------------------------------------------------------------------


def test_ports_of_every_width(engine: str, make_vm: Make, compile_guest: Compile) -> None:
    body = """
    u64 a = 0x1111111111111111ul, b = a, c = a;
    __asm__ volatile("inb %%dx, %%al" : "+a"(a) : "d"(0x200));
    __asm__ volatile("inw %%dx, %%ax" : "+a"(b) : "d"(0x202));
    __asm__ volatile("inl %%dx, %%eax" : "+a"(c) : "d"(0x204));
    __asm__ volatile("outb %%al, %%dx" : : "a"(0xa1b2c3d4), "d"(0x200));
    __asm__ volatile("outw %%ax, %%dx" : : "a"(0xa1b2c3d4), "d"(0x202));
    __asm__ volatile("outl %%eax, %%dx" : : "a"(0xa1b2c3d4), "d"(0x204));
    params->results[0] = (struct result){ 0, a, b, c, 0, 0, 0, 0 };
    """
    device = Recorder(0xAA, 0xBBBB, 0xCCCCCCCC)
    machine = on_port(make_vm(compile_guest(body), mem_bytes=4 * MIB, engine=engine), device)
    assert run(machine) == 0
    result = machine.result()
    # 8 and 16 bits keep the rest of rax, 32 bits clear the upper half.
    assert (result.gfn, result.epoch) == (0x11111111111111AA, 0x111111111111BBBB)
    assert result.expected == 0xCCCCCCCC
    assert device.seen == [
        ("read", 0, 1, 0xAA),
        ("read", 2, 2, 0xBBBB),
        ("read", 4, 4, 0xCCCCCCCC),
        ("write", 0, 1, 0xD4),
        ("write", 2, 2, 0xC3D4),
        ("write", 4, 4, 0xA1B2C3D4),
    ]


def test_string_ports(engine: str, make_vm: Make, compile_guest: Compile) -> None:
    # 5000 bytes are more than one exit carries.
    body = """
    static u8 text[5000];
    u8 *p = text; u64 n = sizeof(text); u32 in[3] = { 0 }; void *q = in; u64 m = 3, zero = 0;
    for (u64 i = 0; i < n; i++) text[i] = (u8)(i * 7);
    __asm__ volatile("rep outsb" : "+S"(p), "+c"(n) : "d"(0x200) : "memory");
    __asm__ volatile("rep insl" : "+D"(q), "+c"(m) : "d"(0x204) : "memory");
    __asm__ volatile("rep outsb" : "+S"(p), "+c"(zero) : "d"(0x200) : "memory");
    params->results[0] = (struct result){ n, in[0], in[1], in[2], m, 0, 0, 0 };
    return p != text + 5000 || q != (void *)(in + 3);
    """
    device = Recorder(0x12345678, 0x9ABCDEF0, 0x11223344)
    machine = on_port(make_vm(compile_guest(body), mem_bytes=4 * MIB, engine=engine), device)
    # Each element is a read of its own, as a data port needs it.
    assert run(machine) == 0
    written = bytes(value for kind, _, _, value in device.seen if kind == "write")
    assert written == bytes(i * 7 & 0xFF for i in range(5000))
    result = machine.result()
    assert (result.status, result.found) == (0, 0)
    assert (result.gfn, result.epoch) == (0x12345678, 0x9ABCDEF0)
    assert result.expected == 0x11223344


def test_mmio_of_every_width(engine: str, make_vm: Make, compile_guest: Compile) -> None:
    body = """
    volatile u8 *p = (void *)params->mmio_start;
    u64 a = p[1], b = *(volatile unsigned short *)(p + 2), c = *(volatile u32 *)(p + 4);
    u64 d = *(volatile u64 *)(p + 8);
    p[0x11] = 0xd4; *(volatile u32 *)(p + 0x14) = 0xa1b2c3d4; *(volatile u64 *)(p + 0x18) = d;
    __asm__ volatile("incl %0" : "+m"(*(volatile u32 *)(p + 0x1008)));
    params->results[0] = (struct result){ 0, a, b, c, d, 0, 0, 0 };
    """
    device = Recorder(0xAA, 0xBBBB, 0xCCCCCCCC, 0xDDDDDDDDEEEEEEEE, 41)
    machine = on_mmio(make_vm(compile_guest(body), mem_bytes=4 * MIB, engine=engine), device)
    assert run(machine) == 0
    result = machine.result()
    assert (result.gfn, result.epoch) == (0xAA, 0xBBBB)
    assert (result.expected, result.found) == (0xCCCCCCCC, 0xDDDDDDDDEEEEEEEE)
    assert device.seen == [
        ("read", 1, 1, 0xAA),
        ("read", 2, 2, 0xBBBB),
        ("read", 4, 4, 0xCCCCCCCC),
        ("read", 8, 8, 0xDDDDDDDDEEEEEEEE),
        ("write", 0x11, 1, 0xD4),
        ("write", 0x14, 4, 0xA1B2C3D4),
        ("write", 0x18, 8, 0xDDDDDDDDEEEEEEEE),
        ("read", 0x1008, 4, 41),
        ("write", 0x1008, 4, 42),
    ]


# -- eviction ----------------------------------------------------------------------------


@pytest.mark.requires_uffd
def test_evicted_pages_come_back_to_the_guest(engine: str, make_vm: Make) -> None:
    machine = make_vm(
        image_path("hotcold"),
        engine=engine,
        params={"epochs": 0, "pages": 600, "hot": 60, "scan_every": 1, "scan_epochs": 1},
    )
    machine.step_by_doorbell()
    for _ in range(4):
        assert machine.run_epoch()
        machine.open_pager().evict(range(1024, 1624))
        assert machine.open_pager().counters()["evicted_pages"] > 500
    assert machine.open_pager().counters()["fault_ins"] > 1000
    machine.stop()


@pytest.mark.requires_uffd
def test_host_access_to_an_evicted_page_finds_its_data(
    engine: str, make_vm: Make[..., None]
) -> None:
    machine = make_vm(image_path("touch"), engine=engine, params={"write": 1, "epochs": 0})
    machine.step_by_doorbell()
    assert machine.run_epoch()
    gfns = range(1024, 1044)
    assert machine.open_pager().evict(gfns).count(0) == len(gfns)
    for gfn in gfns:
        page = machine.memory[gfn * PAGE_BYTES : (gfn + 1) * PAGE_BYTES]
        # A write to the middle of the page keeps the rest of it.
        page[100:104] = b"host"
        assert int.from_bytes(page[:8], "little") == gfn
        assert bytes(page[100:104]) == b"host"
    # The handler counts after it has woken who waited.
    until(lambda: machine.open_pager().counters()["evicted_pages"] == 0, "all pages back")
    machine.stop()


@pytest.mark.requires_uffd
def test_string_output_of_an_evicted_page(
    engine: str, make_vm: Make, compile_guest: Compile
) -> None:
    body = """
    static char text[4096] __attribute__((aligned(4096)));
    for (int i = 0; i < 4096; i++) text[i] = 'a' + i % 26;
    params->results[0].gfn = (u64)text >> 12;
    doorbell(0);
    out_string(text, 52);
    """
    machine = make_vm(compile_guest(body), mem_bytes=4 * MIB, engine=engine)
    machine.step_by_doorbell()
    assert machine.run_epoch()
    assert machine.open_pager().evict([machine.result().gfn]).count(0) == 1
    machine.step_by_doorbell(False)
    assert machine.wait(DEADLINE_S) == 0
    assert machine.console_text() == "abcdefghijklmnopqrstuvwxyz" * 2


@pytest.mark.requires_uffd
def test_pinned_pages_stay(engine: str, make_vm: Make) -> None:
    machine = make_vm(image_path("touch"), mem_bytes=16 * MIB, engine=engine)
    pinned = [
        gfn
        for gpa, n_bytes in machine.layout.pinned_ranges
        for gfn in range(gpa // PAGE_BYTES, -(-(gpa + n_bytes) // PAGE_BYTES))
    ]
    outcome = machine.open_pager().evict(pinned)
    assert outcome.by_name()["pinned"] == len(pinned)
    assert run(machine) == 0
