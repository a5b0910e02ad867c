"""Snapshots: a guest that goes on from a file never notices, and bad files are refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import DEADLINE_S, until

from kvmhost.boot.loaders import load_image
from kvmhost.errors import CapabilityError, ImageError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapfile import HEAD, memory_offset, pack_head
from kvmhost.machine.snapshot import save_machine
from kvmhost.pager.pager import PageState

Guest = Callable[[str], Path]

pytestmark = pytest.mark.requires_kvm


@pytest.fixture
def saved(pc_guest: Guest, tmp_path: Path) -> Path:
    """A snapshot of two processors in their fifth round of 20.

    Beside it, what they had written by then: .before, and what they wrote in all: .whole.
    """
    path = tmp_path / "vm.snap"
    with PcMachine(load_image(pc_guest("rounds.elf")), PcOptions("20"), n_vcpus=2) as machine:
        # In short stretches: a guest that runs natively would be done before this loop looks.
        machine.start(paused=True)
        while machine.console_text().count("\n") < 5:
            machine.resume()
            machine.pause()
        assert save_machine(machine, path) > 0
        path.with_suffix(".before").write_text(machine.console_text())
        machine.resume()
        # The one that was saved goes on as well.
        assert machine.wait(DEADLINE_S) == 1
        assert machine.console_text().endswith("round 0x13\n")
        path.with_suffix(".whole").write_text(machine.console_text())
    return path


def test_a_guest_goes_on_where_it_was_more_than_once(saved: Path) -> None:
    # Perhaps in the middle of a line.
    before = saved.with_suffix(".before").read_text()
    whole = saved.with_suffix(".whole").read_text()
    assert [int(line.split()[1], 16) for line in whole.splitlines()] == list(range(20))
    for _ in range(2):
        with restore_machine(saved) as machine:
            machine.start()
            assert machine.wait(DEADLINE_S) == 1
            assert before + machine.console_text() == whole
            assert len(machine.vcpus) == 2


def test_a_snapshot_of_a_restored_machine(saved: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.snap"
    with restore_machine(saved) as machine:
        machine.start(paused=True)
        save_machine(machine, second)
    with restore_machine(second) as machine:
        machine.start()
        assert machine.wait(DEADLINE_S) == 1


def test_memory_is_sparse(saved: Path) -> None:
    assert saved.stat().st_size < 4 << 20


def test_devices_and_waiting_input(pc_guest: Guest, tmp_path: Path) -> None:
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
        assert machine.wait(DEADLINE_S) == 1
        assert machine.console_text() == "got over there\ngot \n"


def test_a_tiny_guest(tmp_path: Path) -> None:
    path = tmp_path / "tiny.snap"
    params = {"pages": 64, "epochs": 200}
    with Machine(image_path("touch"), mem_bytes=8 << 20, engine="kvm", params=params) as machine:
        machine.step_by_doorbell()
        for _ in range(20):
            assert machine.run_epoch()
        save_machine(machine, path)
        machine.step_by_doorbell(False)
        assert machine.wait(DEADLINE_S) == 0
    with restore_machine(path) as machine:
        assert machine.doorbells == 20
        machine.start()
        assert machine.wait(DEADLINE_S) == 0
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
    """Change the state of a snapshot and put its checksums right."""
    raw = path.read_bytes()
    _, _, _, n_bytes, n_pages, *_ = HEAD.unpack_from(raw)
    state = json.loads(raw[HEAD.size : HEAD.size + n_bytes])
    change(state)
    first = memory_offset(n_bytes)
    table = raw[first + n_pages * 4096 :]
    return write_file(path, json.dumps(state).encode(), raw[first:][: n_pages * 4096], table)


def write_file(path: Path, text: bytes, memory: bytes, table: bytes) -> Path:
    """Write a file with right checksums beside ``path``."""
    head = pack_head(text, len(memory) // 4096, table) + text
    other = path.with_suffix(".other")
    other.write_bytes(head.ljust(memory_offset(len(text)), b"\0") + memory + table)
    return other


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda h: h.update(mem_bytes=1 << 50), "mem_bytes"),
        (lambda h: h.update(mem_bytes=-4096), "state"),
        (lambda h: h.update(mem_bytes=4097), "mem_bytes"),
        (lambda h: h.update(mem_bytes=h["mem_bytes"] * 2), "file"),
        (lambda h: h.update(n_vcpus=3), "n_vcpus"),
        (lambda h: h["doorbells"].append(0), "n_vcpus"),
        (lambda h: h.update(kind="mainframe"), "state"),
        (lambda h: h.update(kind="tiny"), "board"),
        (lambda h: h.update(board=None), "board"),
        (lambda h: h.update(surprise=1), "state"),
        (lambda h: h.update(fw_cfg={"a": "zz"}), "state"),
        (lambda h: h["vcpus"][0].update(regs="!"), "state"),
        (lambda h: h["vcpus"][0].update(regs=h["vcpus"][0]["regs"][4:]), "state"),
        (lambda h: h["vcpus"][0].update(sregs=h["vcpus"][0]["regs"]), "state"),
        (lambda h: h["vcpus"][0].update(lapic=None), "state"),
        (lambda h: h["vcpus"][0].pop("msrs"), "state"),
        (lambda h: h["vcpus"][0]["msrs"].update({"0x200": 0x55}), "vcpus[0].msrs"),
        (lambda h: h["vcpus"][0]["msrs"].update(x=1), "state"),
        (lambda h: h["vcpus"][0]["msrs"].update({"0x179": 1 << 40 | 99}), "state"),
        (lambda h: h["board"].update(pit=3), "state"),
        (lambda h: h["board"]["chips"].pop(), "state"),
        (lambda h: h["devices"].pop("clock"), "state"),
        (lambda h: h["devices"].update(clock=[]), "state"),
        (lambda h: h["serial"].update(ier=-1), "state"),
        (lambda h: h.update(statuses={"x": 1}), "state"),
        (lambda h: h.update(statuses={"0": 10**30}), "state"),
        (lambda h: h.update(statuses={"0": 256}), "state"),
        (lambda h: h.update(statuses={"2": 1}), "statuses"),
        (lambda h: h.update(ended=[2]), "ended"),
        (lambda h: h.update(ended=[0, 0]), "ended"),
        (lambda h: h.update(ended=[-1]), "state"),
        (lambda h: h.update(doorbells=[-1, 0]), "state"),
        (lambda h: h.update(doorbells=[2**64, 0]), "state"),
    ],
)
def test_contradictions_are_refused(
    change: Callable[[dict[str, Any]], None], field: str, saved: Path
) -> None:
    with pytest.raises(ImageError) as caught:
        restore_machine(rewritten(saved, change))
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"kind":"tiny","image":"\xff"}',
        b'{"devices":{"a":' + b"[" * 100_000,
    ],
)
def test_a_state_that_is_no_state_is_refused(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        restore_machine(write_file(tmp_path / "x.snap", text, b"", b""))
    assert caught.value.field == "state"


def test_version_1_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "old.snap"
    path.write_bytes(struct.pack("<8sIIQ", b"KVMSNAP\0", 1, 0, 2) + b"{}" + bytes(4096))
    with pytest.raises(ImageError, match="1, this program reads 2"):
        restore_machine(path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "missing"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(ImageError) as caught:
        restore_machine(path)
    assert caught.value.field == "file"


def test_damage_is_refused(saved: Path) -> None:
    raw = saved.read_bytes()
    last_of_memory = len(raw) - 36 * (saved.stat().st_size // (36 << 20) + 128) - 1
    for at in (0, 8, 13, 20, 30, 42, 50, 3000, last_of_memory, len(raw) - 1):
        saved.write_bytes(raw[:at] + bytes([raw[at] ^ 0x40]) + raw[at + 1 :])
        with pytest.raises(ImageError):
            restore_machine(saved)
    for n_bytes in (0, 7, 43, 100, len(raw) - 4096, len(raw) - 1):
        saved.write_bytes(raw[:n_bytes])
        with pytest.raises(ImageError):
            restore_machine(saved)
    saved.write_bytes(raw + b"\0")
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


def test_the_commands(pc_guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    kvmhost = [sys.executable, "-m", "kvmhost"]
    path = tmp_path / "vm.snap"
    image = str(pc_guest("echo.elf"))
    pipe = subprocess.PIPE
    # This guest waits for input: it is there however long the other command takes to start.
    with subprocess.Popen(
        [*kvmhost, "run", image, "--name", "snap"], stdin=pipe, stdout=pipe
    ) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"ready\n"
            command = [*kvmhost, "snapshot", "snap", str(path), "--stop"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
            assert done.returncode == 0, done.stderr
            first.wait(DEADLINE_S)
        finally:
            if first.poll() is None:
                os.kill(first.pid, signal.SIGKILL)
    command = [*kvmhost, "run", "--restore", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, input="hello\n\n"
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == "got hello\ngot \n"
    both = [*kvmhost, "run", image, "--restore", str(path)]
    assert subprocess.run(both, capture_output=True, timeout=DEADLINE_S).returncode == 2
