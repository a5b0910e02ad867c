"""Machine ``pc``: images of the multiboot protocol run here as they run on another VMM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

from kvmhost.boot.loaders import load_image
from kvmhost.boot.pcboot import Module
from kvmhost.errors import CapabilityError, GuestTimeout, UnexpectedExit
from kvmhost.kvm import System
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.timescale import scaled

Guest = Callable[[str], Path]

needs_kvm = pytest.mark.requires_kvm
QEMU = "qemu-system-x86_64"
SECONDS = scaled(30.0)


def boot(image: Path, n_vcpus: int = 1, **options: object) -> tuple[int, str, PcMachine]:
    """Run an image to its end; return status, output, and the closed machine."""
    given = PcOptions(**options)  # type: ignore[arg-type]
    with PcMachine(load_image(image), given, n_vcpus=n_vcpus) as machine:
        machine.start()
        return machine.wait(SECONDS), machine.console_text(), machine


def lines(text: str) -> dict[str, int]:
    """Return the lines ``name 0xvalue`` of an image's output."""
    pairs = (line.rpartition(" 0x") for line in text.splitlines())
    return {name.strip(): int(value, 16) for name, _, value in pairs if name}


@needs_kvm
@pytest.mark.parametrize("name", ["hello.elf", "hello.flat"])
def test_hello_with_and_without_an_elf_header(name: str, pc_guest: Guest) -> None:
    status, text, machine = boot(pc_guest(name))
    assert (status, text) == (1, "hello from a multiboot image\n")
    assert machine.ending == "debug exit"


@needs_kvm
def test_a_64_bit_image_in_a_32_bit_elf_file(pc_guest: Guest) -> None:
    status, text, _ = boot(pc_guest("long.elf"))
    assert (status, text) == (0x21 << 1 | 1, "in long mode\n")


@needs_kvm
def test_boot_information(pc_guest: Guest) -> None:
    modules = (Module("a/one", "x y", b"123"), Module("two", "", bytes(5000)))
    image = pc_guest("info.flat")
    status, text, _ = boot(image, append="last words", modules=modules)
    assert status == 1
    assert f"cmdline {image} last words\n" in text
    assert "  string a/one x y\n" in text
    assert "  string two\n" in text
    found = lines(text)
    assert found["magic"] == 0x2BADB002
    assert (found["mem_lower"], found["mem_upper"]) == (639, (127 << 10) - 128)
    assert found["modules"] == 2
    assert found["bytes"] == 5000
    assert text.count("map 0x") == text.count("  type 0x") >= 7
    assert "map 0x100000\n  length 0x7ee0000\n  type 0x1\n" in text


@needs_kvm
def test_fw_cfg(pc_guest: Guest) -> None:
    files = {"opt/b": b"second", "opt/a": b"first"}
    status, text, _ = boot(pc_guest("fwcfg.elf"), 2, fw_cfg=files)
    assert status == 1
    assert text.startswith("QEMU\n")
    found = lines(text)
    assert (found["cpus"], found["max cpus"], found["ram"]) == (2, 2, 128 << 20)
    assert found["unknown key"] == 0
    assert "opt/a bytes 0x5\nfirst\nopt/b bytes 0x6\nsecond\n" in text


@needs_kvm
def test_the_processor_that_an_image_sees(pc_guest: Guest) -> None:
    status, text, _ = boot(pc_guest("cpu.elf"))
    assert status == 1
    assert "leaf 0x1\n  eax 0x60fb1\n" in text
    assert "msr 0x2ff\n  value 0xc06\n" in text
    assert "msr 0x400\n  value 0xffffffffffffffff\n" in text
    status, text, _ = boot(pc_guest("cpu.elf"), cpu="host")
    assert status == 1
    with System() as system:
        host = next(e for e in system.supported_cpuid().entries if e.function == 1)
    assert f"leaf 0x1\n  eax {host.eax:#x}\n" in text


@needs_kvm
@pytest.mark.parametrize("n_vcpus", [1, 2, 4])
def test_processors_start_and_interrupt_each_other(n_vcpus: int, pc_guest: Guest) -> None:
    status, text, _ = boot(pc_guest("smp.elf"), n_vcpus)
    assert status == n_vcpus << 1 | 1
    found = lines(text)
    assert found["answers"] == found["broadcast"] == n_vcpus - 1
    assert found["self"] == 1
    assert text.count("  seen 0x1\n") == n_vcpus - 1


@needs_kvm
def test_x2apic_mode(pc_guest: Guest) -> None:
    status, text, _ = boot(pc_guest("x2apic.elf"), 3)
    assert status == 3 << 1 | 1
    assert lines(text)["mode"] == 0xC00
    assert text.endswith("answered 0x2\n")


@needs_kvm
def test_timers(pc_guest: Guest) -> None:
    status, text, _ = boot(pc_guest("timer.elf"))
    assert status == 1
    assert text.splitlines()[-1] == "periodic"


@needs_kvm
def test_acpi_tables_and_power_off(pc_guest: Guest) -> None:
    status, text, machine = boot(pc_guest("acpi.elf"), 3)
    assert (status, machine.ending) == (0, "power off")
    found = lines(text)
    assert (found["processors"], found["i/o apics"], found["has overrides"]) == (3, 1, 1)
    assert text.endswith("power off\n")


@needs_kvm
def test_serial_interrupt_and_test_device(pc_guest: Guest) -> None:
    status, text, _ = boot(pc_guest("irq.elf"), append="testdev")
    assert status == 1
    found = lines(text)
    assert found["transmit interrupt, reason"] == 0xC2
    assert (found["msr in loopback"], found["looped"]) == (0xB0, ord("x"))
    assert (found["line 10"], found["echo port"], found["echo memory"]) == (1, 0x12345678, 0xCAFE)


@needs_kvm
def test_small_ports_and_reset(pc_guest: Guest) -> None:
    status, text, machine = boot(pc_guest("ports.elf"))
    assert (status, machine.ending) == (0, "reset")
    found = lines(text)
    assert (found["extended kib"], found["above 16 mib"]) == (0xFFFF, 0x700)
    assert found["free port"] == 0xFFFFFFFF


@needs_kvm
def test_input_reaches_the_guest_by_interrupt(pc_guest: Guest[..., None]) -> None:
    with PcMachine(load_image(pc_guest("echo.elf"))) as machine:
        machine.start()
        until(lambda: machine.console_text() == "ready\n", "the guest is ready")
        assert machine.serial.receive(b"first line\n") == 11
        until(lambda: "got first line\n" in machine.console_text(), "the echo")
        machine.serial.receive(b"x" * 200 + b"\n\n")
        assert machine.wait(SECONDS) == 1
        assert f"got {'x' * 200}\n" in machine.console_text()


@needs_kvm
@pytest.mark.parametrize(
    ("letter", "wanted"),
    [
        ("t", "triple fault"),
        ("h", "all vCPUs halted with interrupts off"),
    ],
)
def test_bad_ends_are_told(letter: str, wanted: str, pc_guest: Guest) -> None:
    with pytest.raises(UnexpectedExit, match=wanted) as caught:
        boot(pc_guest("bad.elf"), 2, append=letter)
    shown = "rip=0x10" in str(caught.value)
    assert shown or (letter == "t" and "KVM on AMD resets" in str(caught.value))


@needs_kvm
def test_an_instruction_that_kvm_cannot_emulate(pc_guest: Guest) -> None:
    """Where KVM runs level 0 natively, the instruction is simply run."""
    try:
        status, text, _ = boot(pc_guest("bad.elf"), append="p")
    except UnexpectedExit as error:
        told = str(error)
        assert "f3 0f b8 c0" in told
        assert "popcnt eax, eax" in told
        assert "hint: " in told
        assert "suberror 1" in told
    else:
        assert status == 1
        assert lines(text)["ones"] == (0x2BADB002).bit_count()


@needs_kvm
def test_a_guest_that_never_ends_times_out(pc_guest: Guest) -> None:
    with PcMachine(load_image(pc_guest("echo.elf"))) as machine:
        machine.start()
        with pytest.raises(GuestTimeout):
            machine.wait(0.6)


@needs_kvm
def test_pause_shows_what_each_processor_does(pc_guest: Guest[..., None]) -> None:
    with PcMachine(load_image(pc_guest("echo.elf")), n_vcpus=2) as machine:
        machine.start()
        until(lambda: machine.console_text() == "ready\n", "the guest is ready")
        until(lambda: _paused_state(machine, 0).startswith("vCPU 0 halted"), "it waits")
        assert _paused_state(machine, 1).startswith("vCPU 1 waits for INIT")
        machine.serial.receive(b"\n")
        assert machine.wait(SECONDS) == 1


def _paused_state(machine: PcMachine, index: int) -> str:
    machine.pause()
    try:
        return machine.describe_vcpu(index)
    finally:
        machine.resume()


def test_other_engines_are_refused(pc_guest: Guest) -> None:
    with pytest.raises(CapabilityError, match="machine pc"):
        PcMachine(load_image(pc_guest("hello.elf")), engine="emulated")


def ours(image: Path, n_vcpus: int, words: list[str]) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "kvmhost.tools.main",
        "run",
        str(image),
        "--vcpus",
        str(n_vcpus),
    ]
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout


def theirs(image: Path, n_vcpus: int, words: list[str]) -> tuple[int, str]:
    command = [QEMU, "-accel", "kvm", "-nodefaults", "-no-reboot", "-vnc", "none"]
    command += ["-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]
    command += ["-serial", "stdio", "-kernel", str(image), "-smp", str(n_vcpus)]
    words = ["-fw_cfg" if word == "--fw-cfg" else word.replace("--", "-") for word in words]
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout


@needs_kvm
@pytest.mark.requires_qemu
@pytest.mark.parametrize(
    ("name", "n_vcpus", "words"),
    [
        ("hello.flat", 1, []),
        pytest.param(
            "info.elf",
            1,
            ["--append", "a b", "--initrd", "{0} x y,{0}"],
            marks=pytest.mark.slow,
        ),
        pytest.param("state.elf", 1, [], marks=pytest.mark.slow),
        pytest.param("state.flat", 2, [], marks=pytest.mark.slow),
        pytest.param("info.flat", 1, ["--append", "-x"], marks=pytest.mark.slow),
        pytest.param("long.elf", 1, [], marks=pytest.mark.slow),
        pytest.param(
            "fwcfg.elf", 2, ["--fw-cfg", "name=opt/t,string=text"], marks=pytest.mark.slow
        ),
        pytest.param("smp.elf", 4, [], marks=pytest.mark.slow),
        pytest.param("smp.flat", 2, [], marks=pytest.mark.slow),
        pytest.param("x2apic.flat", 2, [], marks=pytest.mark.slow),
        pytest.param("timer.flat", 1, [], marks=pytest.mark.slow),
        pytest.param("acpi.elf", 2, [], marks=pytest.mark.slow),
        pytest.param("irq.elf", 1, ["--append", "testdev"], marks=pytest.mark.slow),
        pytest.param("ports.elf", 1, [], marks=pytest.mark.slow),
        pytest.param("cpu.elf", 1, [], marks=pytest.mark.slow),
        pytest.param("cpu.flat", 3, [], marks=pytest.mark.slow),
    ],
)
def test_same_output_and_status_as_another_vmm(
    name: str, n_vcpus: int, words: list[str], pc_guest: Guest
) -> None:
    image = pc_guest(name)
    words = [word.format(__file__) for word in words]
    assert ours(image, n_vcpus, words) == theirs(image, n_vcpus, words)


@needs_kvm
def test_the_control_socket_shows_each_processor(
    pc_guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch[..., None]
) -> None:
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path))
    from kvmhost.control.client import Client
    from kvmhost.control.server import ControlServer

    with PcMachine(load_image(pc_guest("echo.elf")), n_vcpus=2, name="shown") as machine:
        machine.start()
        server = ControlServer(machine, name="shown")
        server.start()
        try:
            until(lambda: machine.console_text() == "ready\n", "the guest is ready")
            with Client("shown") as client:
                assert [vcpu.doing for vcpu in client.state().vcpus] == [None, None]
                client.pause()
                shown = [vcpu.doing or "" for vcpu in client.state().vcpus]
                client.resume()
        finally:
            server.close()
    assert "rip=0x10" in shown[0]
    assert shown[1].startswith("vCPU 1 waits for INIT")
