"""kvmhost stress: its phases, what they check, and other parts of a VM beside them."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.errors import CapabilityError, GuestTimeout, HostError, LayoutError
from kvmhost.memory.layout import HIGH_GPA
from kvmhost.tools.main import main
from kvmhost.tools.stress import phases as stress_phases
from kvmhost.tools.stress.against import SelftestError, command_line, parse_times, run_selftest
from kvmhost.tools.stress.machine import Sizes, StressMachine
from kvmhost.tools.stress.phases import PHASES, Check, StressPhase, run_phases
from kvmhost.tools.stress.reference import REFERENCES

pytestmark = pytest.mark.usefixtures("nothing_left")

MIB = 1 << 20
KVM = pytest.param("kvm", marks=pytest.mark.requires_kvm)
ENGINES = [KVM, "emulated"]
SMALL = "-m 8M -s 2M"


def failed(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.ok]


def stress_json(capsys: pytest.CaptureFixture[str], words: str, code: int = 0) -> dict[str, Any]:
    assert main(["stress", "--json", *words.split()]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("on_fault", ["skip", "stop"])
@pytest.mark.parametrize("n_vcpus", [1, 2, 3])
def test_every_rule_holds(
    capsys: pytest.CaptureFixture[str], engine: str, on_fault: str, n_vcpus: int
) -> None:
    words = f"{SMALL} -c {n_vcpus} --engine {engine} --on-fault {on_fault}"
    found = stress_json(capsys, words)
    assert found["ok"], [check for check in found["checks"] if not check["ok"]]
    names = [phase["name"] for phase in found["phases"]]
    assert names == [name for name in PHASES if name != "ro-check" or on_fault == "skip"]
    faults = {phase["name"]: phase["n_faults"] for phase in found["phases"]}
    n_pages = 8 * MIB // 4096 // n_vcpus * n_vcpus
    if on_fault == "skip":
        assert faults["ro-check"] == n_pages
    else:
        assert faults["ro"] == n_vcpus
    # Half of the piece, in two of the four memslots.
    assert faults["unmap-check"] == pytest.approx(8 * MIB // 4096 // 4, abs=n_vcpus)
    assert faults["run1"] == faults["run2"] == faults["slots"] == faults["remap"] == 0
    assert found["references"][0]["taken_s"]["ro"] == (14.6 if on_fault == "skip" else 6.1)
    assert found["phases"][0]["of_run1_ratio"] == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("words", ["-m 2M -s 2M -c 1", "-m 6M -s 2M -c 2", "-m 8M -s 4M -c 2"])
def test_other_sizes(capsys: pytest.CaptureFixture[str], engine: str, words: str) -> None:
    assert stress_json(capsys, f"{words} --engine {engine}")["ok"]


@pytest.mark.requires_kvm
def test_huge_pages_take_fewer_faults(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with StressMachine(Sizes(16 * MIB, 4 * MIB, 1, True), engine="kvm", stop=False) as machine:
            smaps = Path("/proc/self/smaps").read_text()
            address = f"{machine.piece.guest_address:x}-"
            fields = smaps[smaps.index(address) :].split("VmFlags")[0]
            assert "ShmemPmdMapped:     4096 kB" in fields
    except CapabilityError as error:
        pytest.skip(str(error))
    assert stress_json(capsys, "-m 16M -s 4M -c 1 --engine kvm --huge")["huge"]


def test_the_table_has_the_line_of_the_kernels_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stress", *SMALL.split(), "--engine", "emulated", "-c", "1"]) == 0
    printed = capsys.readouterr().out
    assert list(parse_times(printed)) == ["run1", "reset", "run2", "ro", "rw"]
    assert "8.0 MiB of guest in 4 memslots over 2.0 MiB of memory, 1 vCPU," in printed
    assert "x86, 2024: mmu_stress_test, 128 GiB and 48 vCPUs" in printed
    assert printed.rstrip().endswith("checks hold")
    for name in PHASES:
        assert f"\n{name} " in printed


@pytest.mark.parametrize("engine", ENGINES)
def test_a_write_that_arrives_is_found(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that stays writable, under a host that believes it protected it."""
    monkeypatch.setattr(stress_phases, "_protect", lambda machine, access: None)
    with StressMachine(Sizes(4 * MIB, 2 * MIB, 1), engine=engine, stop=False) as machine:  # type: ignore[arg-type]
        _, checks = run_phases(machine, DEADLINE_S)
    assert [check.name for check in failed(checks)] == [
        "ro: every write faults",
        "ro: no write arrived",
    ]


def test_a_slot_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with StressMachine(Sizes(4 * MIB, 2 * MIB, 1), engine="emulated", stop=False) as machine:
        monkeypatch.setattr(machine.memslots, "delete", lambda number: None)
        _, checks = run_phases(machine, DEADLINE_S)
    assert [check.name for check in failed(checks)] == ["slots: a deleted one is gone"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("-m 5M -s 2M", 2, "--mem 5.0 MiB: need a multiple of 2M"),
        ("-m 6M -s 4M", 2, "--mem 6.0 MiB: need a multiple of --slot-size 4.0 MiB"),
        ("-m 8M -s 0", 2, "--slot-size 0 B: need a multiple of 2M"),
        ("-m 8M -c 33", 2, "--vcpus 33: a tiny guest takes 1 to 32"),
        ("-m 8M -c 0", 2, "need 1 or more"),
        ("--on-fault explode", 2, "invalid choice"),
        ("-m 8M -s 2M --against /nonexistent/test", 2, "whole GiB"),
        ("-m 4000T -s 2000T", 126, "bits of physical address"),
    ],
)
def test_bad_input(words: str, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["stress", *words.split(), *(() if "4000T" in words else ("--engine", "emulated"))])
        == code
    )
    assert message in capsys.readouterr().err


def test_a_time_that_is_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    words = "-m 512M -s 4M -c 2 --engine emulated --timeout 1ms"
    assert main(["stress", *words.split()]) == 124
    assert "0.001" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(number: int) -> None:
    words = ["stress", "-m", "4G", "-s", "4M", "-c", "2", "--engine", "emulated", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvmhost", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    maps = Path(f"/proc/{process.pid}/maps")
    until(lambda: "memfd:stress" in maps.read_text(), "it has its memory")
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + number
    assert (out, err) == (b"", b"")


# -- the kernel's own test -----------------------------------------------------------

LINE = "run1 = 1.000000001s, reset = 0.000200000s, run2 = 0.5s, ro = 2.25s, rw = 3.5s"


def selftest(folder: Path, body: str) -> Path:
    path = folder / "mmu_stress_test"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_selftest_gets_the_same_sizes(tmp_path: Path) -> None:
    path = selftest(tmp_path, f'echo "$@" >{tmp_path}/words; echo "{LINE}"')
    command = command_line(path, 4 << 30, 2 << 30, 3, huge=True)
    times = run_selftest(command, DEADLINE_S)
    assert times == {"run1": 1.000000001, "reset": 0.0002, "run2": 0.5, "ro": 2.25, "rw": 3.5}
    assert (tmp_path / "words").read_text() == "-c 3 -m 4 -s 2 -H\n"


def test_a_selftest_that_fails_is_named(tmp_path: Path) -> None:
    for body, message in [
        ("echo out of luck >/dev/stderr; exit 3", "mmu_stress_test ended with 3: out of luck"),
        ("echo no KVM; exit 4", "mmu_stress_test was skipped: no KVM"),
        ("echo hello", "mmu_stress_test printed no times of phases"),
    ]:
        with pytest.raises(SelftestError) as caught:
            run_selftest([str(selftest(tmp_path, body))], DEADLINE_S)
        assert str(caught.value) == message
    with pytest.raises(HostError, match="No such file"):
        run_selftest([str(tmp_path / "none")], DEADLINE_S)
    with pytest.raises(GuestTimeout):
        run_selftest([str(selftest(tmp_path, "exec sleep 1000"))], 0.05)
    with pytest.raises(LayoutError, match=r"--slot-size: .* whole GiB"):
        command_line(tmp_path, 1 << 30, 1 << 29, 1, huge=False)


# -- arithmetic ---------------------------------------------------------------------


@pytest.mark.parametrize("n_vcpus", [1, 2, 3, 7])
def test_pages_of_a_vcpu_by_counting(n_vcpus: int) -> None:
    sizes = Sizes(10 * MIB, 2 * MIB, n_vcpus)
    for vcpu in range(n_vcpus):
        start, end = sizes.part(vcpu)
        pages = np.arange(start, end, 4096)
        even = pages // sizes.slot_bytes % 2 == 0
        half = pages % sizes.slot_bytes < sizes.unmapped_bytes
        assert sizes.n_pages(vcpu) == pages.size
        assert sizes.n_pages(vcpu, every_other=True) == even.sum()
        assert sizes.n_pages(vcpu, every_other=True, unmapped=True) == (even & half).sum()
        for stride in (1, 3, 64, 1000):
            taken = np.arange(pages.size) % stride == 0
            wanted = (even & half & taken).sum()
            assert sizes.n_pages(vcpu, True, True, stride) == wanted


def test_the_references_are_those_of_the_patches() -> None:
    x86, arm64 = REFERENCES["skip"]
    assert x86.taken_s["ro"] / x86.taken_s["run1"] == pytest.approx(2.116, abs=0.001)
    assert arm64.taken_s["ro"] / arm64.taken_s["run1"] == pytest.approx(5.793, abs=0.001)
    assert dataclasses.replace(x86, name="").source == arm64.source


# -- beside others ------------------------------------------------------------------


def beside(machine: StressMachine, work: Any) -> tuple[list[StressPhase], list[Check], int]:
    """Run the phases while another thread works again and again; return its rounds too."""
    ended, rounds, errors = threading.Event(), [0], []

    def loop() -> None:
        try:
            while not ended.is_set():
                work()
                rounds[0] += 1
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=loop)
    original = stress_phases._release

    def release(run: Any) -> None:
        until(lambda: rounds[0] > 2 or bool(errors), "the other thread has worked")
        ended.set()
        thread.join(DEADLINE_S)
        original(run)

    patched = pytest.MonkeyPatch()
    patched.setattr(stress_phases, "_release", release)
    release.__name__ = "_release"
    try:
        thread.start()
        phases, checks = run_phases(machine, DEADLINE_S)
    finally:
        ended.set()
        thread.join(DEADLINE_S)
        patched.undo()
    if errors:
        raise errors[0]
    return phases, checks, rounds[0]


@pytest.fixture(params=["skip", "stop"])
def machine(request: pytest.FixtureRequest) -> Any:
    with StressMachine(
        Sizes(16 * MIB, 4 * MIB, 2), engine="kvm", stop=request.param == "stop"
    ) as made:
        yield made


@pytest.mark.requires_kvm
def test_beside_harvests(machine: StressMachine) -> None:
    first = HIGH_GPA >> 12
    seen = np.zeros(machine.piece.n_pages, dtype=bool)

    def harvest() -> None:
        found = machine.harvest(first, machine.piece.n_pages, tracker="pagemap", rearm="young")
        seen[:] |= found.young.as_bool()

    phases, checks, _ = beside(machine, harvest)
    assert not failed(checks)
    assert seen.all(), "run1 alone touches every page of the piece"
    assert phases[-1].name == "release"


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_beside_evictions_by_the_pager(machine: StressMachine) -> None:
    first, n_pages = HIGH_GPA >> 12, machine.piece.n_pages
    machine.evict([first])  # the pager serves faults from here on
    evicted = [0]

    def evict() -> None:
        evicted[0] += machine.evict(range(first, first + n_pages, 7)).done

    _, checks, _ = beside(machine, evict)
    assert not failed(checks)
    assert evicted[0] > 0


@pytest.mark.requires_kvm
def test_beside_pauses_and_refused_snapshots(machine: StressMachine, tmp_path: Path) -> None:
    def pause() -> None:
        machine.pause(DEADLINE_S)
        with pytest.raises(CapabilityError, match="aliased memory"):
            machine.snapshot(tmp_path / "file")
        machine.resume()
        time.sleep(0.01)  # A guest that is paused all the time gets nowhere.

    _, checks, _ = beside(machine, pause)
    assert not failed(checks)
    assert not (tmp_path / "file").exists()
