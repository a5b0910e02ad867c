"""MSRs of a snapshot: all that KVM takes is kept, and what a host does not keep is said."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import until

from kvmhost.boot.loaders import load_image
from kvmhost.engine.kvm import KvmEngine
from kvmhost.errors import ImageError
from kvmhost.kvm import msrs as module
from kvmhost.kvm.msrs import MSR_TSC, MsrReport, load_msrs, readable_msrs
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapfile import HEAD
from kvmhost.machine.snapshot import save_machine

Guest = Callable[[str], Path]

#: MTRRs, PAT, SYSENTER, machine-check banks (status and address), TSC_AUX.
VALUES = {
    0x200: 0xF800_0000,
    0x201: 0xF_FC00_0800,
    0x20E: 0xE000_0000,
    0x20F: 0xF_F000_0800,
    0x250: 0x0606_0606_0606_0606,
    0x268: 0x0505_0505_0505_0505,
    0x2FF: 0xC06,
    0x277: 0x0007_0406_0007_0406,
    0x174: 8,
    0x401: 0xBE00_0000_0000_0001,
    0x402: 0x1234_5678,
    0xC000_0103: 77,
}


@pytest.mark.requires_kvm
def test_what_kvm_keeps_is_kept(pc_guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "x.snap"
    image = load_image(pc_guest("echo.elf"))
    with PcMachine(image, PcOptions(cpu="host"), mem_bytes=16 << 20, n_vcpus=2) as machine:
        machine.start(paused=True)
        assert isinstance(machine.engine, KvmEngine)
        kept = []
        for index, core in enumerate(machine.engine.cores):
            values = {msr: value for msr, value in VALUES.items() if core.get_msrs([msr])}
            values[0x268] += index
            core.set_msrs(values)
            kept.append(values)
        assert all(0x200 in values and 0x401 in values for values in kept)
        save_machine(machine, path)
        was = machine.engine.cores[1].get_msrs([0x179])
    with restore_machine(path) as machine:
        assert isinstance(machine.engine, KvmEngine)
        for values, core in zip(kept, machine.engine.cores, strict=True):
            assert {msr: core.get_msrs([msr])[msr] for msr in values} == values
        assert machine.engine.cores[1].get_msrs([0x179]) == was


@pytest.mark.requires_kvm
def test_the_list_has_what_kvm_does_not_name(pc_guest: Guest) -> None:
    with PcMachine(load_image(pc_guest("echo.elf")), mem_bytes=16 << 20) as machine:
        assert isinstance(machine.engine, KvmEngine)
        found = readable_msrs(bytes(machine.engine.cores[0].get_cpuid()), True)
    listed = machine_list()
    assert found[: len(listed)] == listed
    assert len(set(found)) == len(found)
    assert {0x200, 0x2FF, 0x179, 0x400, 0x401} <= set(found)
    # These are in other structures; an end of interrupt would be an act.
    assert not {0x80B, 0x830, 0xC000_0080, 0x1B} & (set(found) - set(listed))


def machine_list() -> list[int]:
    from kvmhost.kvm import System

    with System() as system:
        return system.msr_index_list()


@pytest.mark.requires_kvm
def test_a_tsc_that_runs_on_is_said(
    pc_guest: Guest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On every host: either the TSC is what it was, or one warning tells, and never both."""
    path = tmp_path / "x.snap"
    with PcMachine(load_image(pc_guest("echo.elf")), mem_bytes=16 << 20) as machine:
        machine.start(paused=True)
        save_machine(machine, path)
    raw = path.read_bytes()
    saved = json.loads(raw[HEAD.size :][: HEAD.unpack_from(raw)[3]])["vcpus"][0]
    # A TSC that runs on is far ahead by then, whatever time the restore itself takes.
    since = time.monotonic()
    until(lambda: time.monotonic() > since + 0.5, "half a second has passed")
    start = time.monotonic()
    with restore_machine(path) as machine:
        assert isinstance(machine.engine, KvmEngine)
        now = machine.engine.cores[0].get_msrs([MSR_TSC])[MSR_TSC]
        khz = machine.engine.cores[0].get_tsc_khz()
    ahead = (now - saved["msrs"]["0x10"]) % (1 << 64)
    stood_still = ahead <= (time.monotonic() - start + 0.1) * khz * 1000
    told = [r for r in caplog.records if r.levelno == logging.WARNING and "TSC" in r.getMessage()]
    assert len(told) == (0 if stood_still else 1)


class FakeCore:
    """MSRs of a host: which it takes, which it keeps."""

    fd = 3

    def __init__(self) -> None:
        self.values = {1: 10, 2: 20, 3: 30, MSR_TSC: 5_000_000}
        self.ignores, self.refuses = {2, MSR_TSC}, {3}


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    fake = FakeCore()

    def kh_msrs_set(_fd: int, table, n: int) -> None:
        for msr in table[0:n]:
            refused = msr.index in fake.refuses or msr.index not in fake.values
            msr.status = -6 if refused else 0
            if not refused and msr.index not in fake.ignores:
                fake.values[msr.index] = msr.value

    def kh_msrs_get(_fd: int, table, n: int) -> None:
        for msr in table[0:n]:
            msr.status = 0 if msr.index in fake.values else -6
            msr.value = fake.values.get(msr.index, 0)

    lib = type("Lib", (), {"kh_msrs_set": kh_msrs_set, "kh_msrs_get": kh_msrs_get})
    monkeypatch.setattr(module, "lib", lib)
    return fake


def test_each_is_read_back(core: FakeCore) -> None:
    report = load_msrs(core, {1: 11, 2: 21, 3: 31, 4: 0, 5: 1, 3 + 0: 31}, 1000)
    assert report == MsrReport((3, 5), (4,), {2: (21, 20)}, 0)
    assert core.values[1] == 11


def test_what_is_right_already_is_left_alone(core: FakeCore) -> None:
    assert load_msrs(core, {2: 20, 3: 30}, 1000) == MsrReport()


def test_a_tsc_may_move_as_time_does(core: FakeCore) -> None:
    # 50 ms at 1,000 kHz are 50,000 cycles.
    assert load_msrs(core, {MSR_TSC: 4_999_000}, 1000) == MsrReport()
    assert load_msrs(core, {MSR_TSC: 1_000_000}, 1000).tsc_ahead == 4_000_000
    assert load_msrs(core, {MSR_TSC: 6_000_000}, 1000).tsc_ahead == 2**64 - 1_000_000


@pytest.mark.requires_kvm
def test_a_refused_one_ends_the_restore(
    pc_guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.snap"
    with PcMachine(load_image(pc_guest("echo.elf")), mem_bytes=16 << 20) as machine:
        machine.start(paused=True)
        save_machine(machine, path)
    report = MsrReport(refused=(0x200,))
    monkeypatch.setattr("kvmhost.machine.vcpustate.load_msrs", lambda *_: report)
    with pytest.raises(ImageError, match="refuses MSR 0x200"):
        restore_machine(path)
