"""Snapshots: a guest that goes on from a file never notices, and bad files are refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmhost.boot.loaders import load_image
from kvmhost.errors import CapabilityError, ImageError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.snapshot import restore_machine, save_machine
from kvmhost.pager.pager import PageState

Guest = Callable[[str], Path]
Until = Callable[..., None]

pytestmark = pytest.mark.requires_kvm

HEAD = struct.Struct("<8sIIQ")


@pytest.fixture
def saved(pc_guest: Guest, tmp_path: Path, until: Until) -> Path:
    """A snapshot of two processors in their fifth round of 20."""
    path = tmp_path / "vm.snap"
    with PcMachine(load_image(pc_guest("rounds.elf")), PcOptions("20"), n_vcpus=2) as machine:
        machine.start()
        until(lambda: machine.console_text().count("\n") >= 5, "five rounds")
        assert save_machine(machine, path) > 0
        # The one that was saved goes on as well.
        assert machine.wait(30) == 1
        assert machine.console_text().endswith("round 0x13\n")
    return path


def test_a_guest_goes_on_where_it_was_more_than_once(saved: Path) -> None:
    for _ in range(2):
        with restore_machine(saved) as machine:
            machine.start()
            assert machine.wait(30) == 1
            rounds = [int(line.split()[1], 16) for line in machine.console_text().splitlines()]
            assert rounds == list(range(rounds[0], 20))
            assert rounds[0] >= 4
            assert len(machine.vcpus) == 2


def test_a_snapshot_of_a_restored_machine(saved: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.snap"
    with restore_machine(saved) as machine:
        machine.start(paused=True)
        save_machine(machine, second)
    with restore_machine(second) as machine:
        machine.start()
        assert machine.wait(30) == 1


def test_memory_is_sparse(saved: Path) -> None:
    assert saved.stat().st_size < 4 << 20


def test_devices_and_waiting_input(pc_guest: Guest, tmp_path: Path, until: Until) -> None:
    path = tmp_path / "echo.snap"
    files = {"opt/x": b"file"}
    with PcMachine(load_image(pc_guest("echo.elf")), PcOptions(fw_cfg=files)) as machine:
        machine.start()
        until(lambda: machine.console_text() == "ready\n", "the guest is ready")
        machine.devices["test memory"].write(8, 4, 0x1234)
        save_machine(machine, path)
    with restore_machine(path) as machine:
        assert machine.devices["test memory"].read(8, 4) == 0x1234
        assert machine.options.fw_cfg == files
        machine.start()
        machine.serial.receive(b"over there\n\n")
        assert machine.wait(30) == 1
        assert machine.console_text() == "got over there\ngot \n"


def test_a_tiny_guest(tmp_path: Path, until: Until) -> None:
    path = tmp_path / "tiny.snap"
    params = {"pages": 64, "epochs": 200}
    with Machine(image_path("touch"), mem_bytes=8 << 20, engine="kvm", params=params) as machine:
        machine.start()
        until(lambda: machine.doorbells >= 20, "twenty epochs")
        save_machine(machine, path)
        assert machine.wait(30) == 0
    with restore_machine(path) as machine:
        assert 20 <= machine.doorbells < 200
        machine.start()
        assert machine.wait(30) == 0
        assert machine.doorbells == 200


def test_evicted_pages_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "evicted.snap"
    with Machine(image_path("hello"), mem_bytes=8 << 20, engine="kvm") as machine:
        machine.start(paused=True)
        machine.memory[0x40_0000:0x40_1000] = b"\x5a" * 4096
        machine.open_pager().evict([0x400])
        assert machine.open_pager().state(0x400) is PageState.EVICTED
        save_machine(machine, path)
    with restore_machine(path) as machine:
        assert bytes(machine.memory[0x40_0000:0x40_1000]) == b"\x5a" * 4096


def test_the_emulator_has_no_snapshots(tmp_path: Path) -> None:
    with Machine(image_path("hello"), mem_bytes=8 << 20, engine="emulated") as machine:
        machine.start(paused=True)
        with pytest.raises(CapabilityError, match="snapshot"):
            save_machine(machine, tmp_path / "no.snap")
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the header of a snapshot and put its checksum right."""
    raw = path.read_bytes()
    n_bytes = HEAD.unpack_from(raw)[3]
    header = json.loads(raw[HEAD.size : HEAD.size + n_bytes])
    change(header)
    text = json.dumps(header).encode()
    pages = raw[-(-(HEAD.size + n_bytes) // 4096) * 4096 :]
    head = HEAD.pack(b"KVMSNAP\0", 1, zlib.crc32(text), len(text))
    other = path.with_suffix(".other")
    other.write_bytes(head + text + bytes(-(len(head) + len(text)) % 4096) + pages)
    return other


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda h: h.update(mem_bytes=1 << 50), "mem_bytes"),
        (lambda h: h.update(mem_bytes=-4096), "header"),
        (lambda h: h.update(n_vcpus=3), "n_vcpus"),
        (lambda h: h.update(kind="mainframe"), "header"),
        (lambda h: h.update(surprise=1), "header"),
        (lambda h: h.update(fw_cfg={"a": "zz"}), "header"),
        (lambda h: h["runs"][0].__setitem__(0, 1 << 40), "runs"),
        (lambda h: h["runs"][0].__setitem__(1, 100), "runs"),
        (lambda h: h["vcpus"][0].update(regs="!"), "state"),
        (lambda h: h["vcpus"][0].update(sregs=h["vcpus"][0]["regs"]), "state"),
        (lambda h: h["vcpus"][0].pop("msrs"), "state"),
        (lambda h: h["board"].update(pit=3), "state"),
        (lambda h: h["devices"].pop("clock"), "state"),
        (lambda h: h["serial"].update(ier=-1), "state"),
        (lambda h: h.update(statuses={"x": 1}), "state"),
    ],
)
def test_contradictions_are_refused(
    change: Callable[[dict[str, Any]], None], field: str, saved: Path
) -> None:
    with pytest.raises(ImageError) as caught:
        restore_machine(rewritten(saved, change))
    assert caught.value.field.startswith(field)


def test_damage_is_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    for at in (0, 8, 13, 20, 40, 3000, len(raw) - 1):
        saved.write_bytes(raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1 :])
        with pytest.raises(ImageError):
            restore_machine(saved)
    for n_bytes in (0, 7, 23, 100, len(raw) - 4096):
        saved.write_bytes(raw[:n_bytes])
        with pytest.raises(ImageError):
            restore_machine(saved)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_changed_states_never_do_more_than_fail(data: st.DataObject, saved: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        vcpu = header["vcpus"][data.draw(st.integers(0, 1))]
        name = data.draw(st.sampled_from(sorted(vcpu)))
        vcpu[name] = data.draw(
            st.one_of(st.none(), st.integers(), st.text(max_size=8), st.just({}))
        )

    # Another number can be as good as the one that was there; all else is refused.
    with contextlib.suppress(ImageError):
        restore_machine(rewritten(saved, change)).close()


def test_the_commands(
    pc_guest: Guest, tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    kvmhost = [sys.executable, "-m", "kvmhost"]
    serial, path = tmp_path / "serial", tmp_path / "vm.snap"
    words = ["--name", "snap", "--serial", f"file:{serial}", "--append", "99"]
    image = str(pc_guest("rounds.elf"))
    with subprocess.Popen([*kvmhost, "run", image, *words]) as first:
        try:
            until(lambda: serial.exists() and serial.read_text().count("\n") >= 3, "rounds")
            command = [*kvmhost, "snapshot", "snap", str(path), "--stop"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, done.stderr
            first.wait(30)
        finally:
            if first.poll() is None:
                os.kill(first.pid, signal.SIGKILL)
    command = [*kvmhost, "run", "--restore", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("round 0x62\n")
    both = [*kvmhost, "run", image, "--restore", str(path)]
    assert subprocess.run(both, capture_output=True, timeout=30).returncode == 2
