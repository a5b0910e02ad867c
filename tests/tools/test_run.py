"""``kvmhost run`` as a person types it: output, exit codes, errors, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from json_page import checked
from waiting import DEADLINE_S, until

from kvmhost.guests import image_path
from kvmhost.guests.build import compile_guest

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]

TRIPLE_FAULT = (
    "u64 guest_main(u64 v, struct params *p) { (void)p; *(volatile u64 *)(v + 8) = 1; return 0; }"
)
OUTSIDE = (
    "u64 guest_main(u64 v, struct params *p)"
    "{ (void)v; *(volatile u32 *)(p->mmio_start + 0x40) = 7; return 0; }"
)
DEBUG_EXIT = (
    "u64 guest_main(u64 v, struct params *p) { (void)v; (void)p; out32(0xf4, 5); for (;;); }"
)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of its own, empty again at the end."""
    path = tmp_path / "run"
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(path))
    yield path
    left = [p.name for p in path.iterdir() if p.suffix == ".sock"] if path.exists() else []
    assert left == []


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvmhost", "run", *words]


def kvmhost(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=timeout)


def guest(tmp_path: Path, code: str) -> str:
    source = tmp_path / "guest.c"
    source.write_text(f'#include "guest.h"\n{code}\n')
    return str(compile_guest(source, tmp_path / "guest.elf"))


@pytest.mark.parametrize("engine", ENGINES)
def test_hello(engine: str) -> None:
    done = kvmhost("hello", "--engine", engine, "--vcpus", "2")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = sorted(done.stdout.splitlines())
    assert lines == ["hello from vCPU 0x0 of 0x2", "hello from vCPU 0x1 of 0x2"]


@pytest.mark.parametrize("engine", ENGINES)
def test_status_is_passed_through(engine: str) -> None:
    assert kvmhost("hello", "--engine", engine, "--param", "status=37").returncode == 37


@pytest.mark.parametrize("engine", ENGINES)
def test_debug_exit_port_as_qemu_does_it(engine: str, tmp_path: Path) -> None:
    assert kvmhost(guest(tmp_path, DEBUG_EXIT), "--engine", engine).returncode == 5 << 1 | 1


@pytest.mark.parametrize("engine", ENGINES)
def test_triple_fault_is_125_with_registers(engine: str, tmp_path: Path) -> None:
    done = kvmhost(guest(tmp_path, TRIPLE_FAULT), "--engine", engine)
    assert done.returncode == 125
    assert "triple fault" in done.stderr
    assert "rip=0x100" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_write_outside_the_slots_is_125_with_the_gpa(engine: str, tmp_path: Path) -> None:
    done = kvmhost(guest(tmp_path, OUTSIDE), "--engine", engine)
    assert done.returncode == 125
    assert "write outside all memory slots, gpa 0xd0000040" in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_timeout_is_124(engine: str) -> None:
    done = kvmhost("touch", "--engine", engine, "--param", "epochs=0", "--timeout", "0.5")
    assert done.returncode == 124
    assert "0.5 s" in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["no-such-guest"], "no such file; unknown guest 'no-such-guest'"),
        (["./absent.elf"], "No such file"),
        (["hello", "--param", "colour=1"], "no parameter 'colour'; it has: status"),
        (["hello", "--param", "status=red"], "need a number"),
        (["hello", "--mem", "5000"], "not a multiple of 4096"),
        (["hello", "--mem", "64K"], "too small"),
        (["hello", "--mem", "lots"], "invalid size 'lots'"),
        (["hello", "--vcpus", "0"], "--vcpus"),
        (["hello", "--vcpus", "99"], "99 vCPUs"),
        (["hello", "--tracker", "tea-leaves"], "unknown tracker"),
        (["hello", "--name", "../evil"], "name"),
    ],
)
def test_bad_input_is_2_and_says_what(words: list[str], complaint: str, runtime: Path) -> None:
    done = kvmhost(*words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_truncated_images_are_2(tmp_path: Path) -> None:
    whole = image_path("hello").read_bytes()
    for n_bytes in (0, 3, 20, 63, 64, 100, 4096, len(whole) - 1):
        path = tmp_path / "cut.elf"
        path.write_bytes(whole[:n_bytes])
        done = kvmhost(str(path))
        assert done.returncode == 2, (n_bytes, done.stderr)
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr


def test_image_too_large_for_memory_is_2(tmp_path: Path) -> None:
    image = guest(
        tmp_path,
        "static char big[8 << 20]; u64 guest_main(u64 v, struct params *p)"
        "{ (void)p; big[v] = 1; return big[v + 1]; }",
    )
    done = kvmhost(image, "--mem", "4M")
    assert done.returncode == 2
    assert "give the guest more memory" in done.stderr
    assert kvmhost(image, "--mem", "32M").returncode == 0


def test_hidden_kvm_is_126_when_asked_for_and_else_emulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVMHOST_HIDE_KVM", "1")
    refused = kvmhost("hello", "--engine", "kvm")
    assert refused.returncode == 126
    assert "KVMHOST_HIDE_KVM" in refused.stderr
    report = kvmhost("hello", "--json")
    assert checked("run", report.stdout)[0]["engine"] == "emulated"


def test_json_report_keeps_the_guest_out_of_stdout() -> None:
    done = kvmhost("hello", "--json")
    (report,) = checked("run", done.stdout)
    assert report["status"] == 0
    assert report["pager"] is None
    assert "hello from" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_ends_it_and_leaves_nothing(
    engine: str, number: signal.Signals, runtime: Path
) -> None:
    words = ("touch", "--engine", engine, "--param", "epochs=0", "--name", "stopme")
    with subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True) as process:
        until((runtime / "stopme.sock").exists, "its socket", process=process)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in errors


def test_second_vm_of_a_name_is_refused(runtime: Path) -> None:
    words = ("touch", "--param", "epochs=0", "--name", "twin")
    with subprocess.Popen(command(*words)) as first:
        try:
            until((runtime / "twin.sock").exists, "its socket", process=first)
            second = kvmhost("hello", "--name", "twin")
            assert second.returncode == 2
            assert "twin" in second.stderr
            assert first.poll() is None
        finally:
            first.send_signal(signal.SIGINT)
            first.wait(DEADLINE_S)
    # A socket that a killed VM left is no obstacle.
    with subprocess.Popen(command(*words)) as killed:
        until((runtime / "twin.sock").exists, "its socket", process=killed)
        killed.kill()
    assert (runtime / "twin.sock").exists()
    assert kvmhost("hello", "--name", "twin").returncode == 0


@pytest.mark.requires_kvm
def test_closed_output_does_not_hang_or_trace() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command("hello"), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


@pytest.mark.requires_kvm
def test_import_cost_of_a_plain_run() -> None:
    """Booting a guest imports neither numpy nor anything heavier."""
    code = (
        "import sys; from kvmhost.tools.main import main; main(['run', 'hello']);"
        "heavy = {'numpy', 'unicorn', 'aiohttp', 'httpx', 'rich', 'matplotlib', 'asyncio'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("DIRTY_LOG_RING")
def test_dirty_ring() -> None:
    """The guest writes more pages than its ring holds; the tracker runs beside it."""
    words = ("--mem", "32M", "--param", "pages=3000", "--param", "write=1", "--param", "epochs=5")
    done = kvmhost("touch", *words, "--dirty-ring", "1024", "--tracker", "dirty", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert checked("run", done.stdout)[0]["doorbells"] == 5


@pytest.mark.parametrize(
    ("engine", "entries", "code", "text"),
    [
        pytest.param("kvm", "1000", 2, "a power of two", marks=pytest.mark.requires_kvm),
        pytest.param("kvm", "131072", 2, "a power of two", marks=pytest.mark.requires_kvm),
        ("emulated", "1024", 126, "--engine kvm"),
        ("emulated", "0", 2, "1 or more"),
        ("emulated", "x", 2, "--dirty-ring"),
    ],
)
def test_dirty_rings_that_do_not_work(engine: str, entries: str, code: int, text: str) -> None:
    done = kvmhost("hello", "--engine", engine, "--dirty-ring", entries)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
