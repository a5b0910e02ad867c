"""``kvmhost young`` as a person types it, on a guest whose touches are known."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import numpy as np
import pytest
from json_page import checked
from waiting import DEADLINE_S, until

from kvmhost.bitmap import unpack
from kvmhost.control.client import Client
from kvmhost.errors import VmGoneError
from kvmhost.guests.workloads import hotcold_gfns

pytestmark = [pytest.mark.requires_kvm]

PARAMS = {"pages": 4096, "hot": 1024, "cold": 0, "scan_every": 0, "epochs": 0}
MEM_PAGES = (24 << 20) // 4096


def kvmhost(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "kvmhost", *words],
        text=True,
        timeout=DEADLINE_S,
        **({"capture_output": True} | options),
    )


def parsed(text):
    """Return the one object of ``young snapshot``, checked against docs/json.md."""
    (found,) = checked("young snapshot", text)
    return found


@pytest.fixture
def vm(tmp_path, monkeypatch):
    """A VM named ``v`` that touches its hot set only, epoch by epoch."""
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    pairs = [word for key, value in PARAMS.items() for word in ("--param", f"{key}={value}")]
    words = ["run", "hotcold", "--name", "v", "--mem", "24M", *pairs]
    process = subprocess.Popen([sys.executable, "-m", "kvmhost", *words])
    client = Client("v")

    def beyond_first_epoch():
        try:
            return client.state().doorbells > 3
        except VmGoneError:
            return process.poll() is not None

    until(beyond_first_epoch, "the first epochs")
    yield client
    client.close()
    process.send_signal(signal.SIGTERM)
    process.wait(DEADLINE_S)


@pytest.fixture
def hot(vm):
    return hotcold_gfns(vm.state().params, 1)


def test_snapshot_opens_a_window_where_nobody_harvests_yet(vm, hot, tmp_path):
    out = tmp_path / "young.npy"
    done = kvmhost("young", "snapshot", "v", "--json", "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    found = parsed(done.stdout)
    young = np.load(out)
    assert young.dtype == bool
    assert young.shape == (MEM_PAGES,)
    assert np.flatnonzero(young[1024 : 1024 + 4096]).tolist() == (hot - 1024).tolist()
    assert found["n_young"] == young.sum() == found["memslots"][0]["n_young"]
    assert [int(hot[0]), hot.size] in found["ranges"]
    assert found["tracker"] == "guestpt"
    # Looking changed nothing: the window is still open.
    assert vm.harvest(clear=False).young.count() >= found["n_young"]


def test_snapshot_for_people(vm, hot):
    vm.harvest()
    seen = vm.state().doorbells
    until(lambda: vm.state().doorbells > seen + 2, "a whole epoch")
    done = kvmhost("young", "snapshot", "v", "--view", "default", "--range", "1024:0x1400")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "v: 1024 of 4096 pages young (25.0 %), 4.0 MiB"
    assert "slot 0 [0x400, 0x1400): 1024 of 4096 young (25.0 %)" in lines
    assert lines[-1].split() == [f"[{hot[0]:#x},", f"{hot[-1] + 1:#x})", "1024", "pages"]


def test_snapshot_has_what_is_resident_and_evicted(vm, tmp_path):
    vm.pause()
    evicted = [gfn for gfn in range(0x400, 0x500) if vm.page(gfn).state == "resident"][:20]
    assert vm.evict(evicted).outcomes["done"] == 20
    out = tmp_path / "young.npz"
    done = kvmhost("young", "snapshot", "v", "--interval", "0.01", "--json", "-o", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    found = parsed(done.stdout)
    assert (found["n_evicted"], found["not_seen"]) == (20, "")
    with np.load(out) as masks:
        assert sorted(masks) == ["coarse", "evicted", "resident", "young"]
        assert np.flatnonzero(masks["evicted"]).tolist() == evicted
        assert int(masks["resident"].sum()) == found["n_resident"] > 0
        assert not (masks["resident"] & masks["evicted"]).any()
    done = kvmhost("young", "snapshot", "v", "--interval", "0.01", "--range", "0x400:0x440")
    assert "pages resident, " in done.stdout
    vm.resume()


def test_snapshot_with_clear_begins_a_new_window(vm, tmp_path):
    vm.harvest()
    seen = vm.state().doorbells
    until(lambda: vm.state().doorbells > seen + 2, "a whole epoch")
    vm.pause()
    out = tmp_path / "young.bin"
    assert kvmhost("young", "snapshot", "v", "--clear", "--out", str(out)).returncode == 0
    words = np.frombuffer(out.read_bytes(), "<u8")
    assert unpack(words, MEM_PAGES).sum() >= 1024
    assert vm.harvest().young.count() == 0
    vm.resume()


def test_snapshot_beside_other_readers_takes_nothing_from_them(vm, hot):
    vm.harvest(view="other", tracker="guestpt")
    vm.harvest(view="other")
    seen = vm.state().doorbells
    until(lambda: vm.state().doorbells > seen + 2, "a whole epoch")
    vm.pause()
    done = kvmhost("young", "snapshot", "v", "--interval", "0.01", "--view", "mine", "--json")
    assert parsed(done.stdout)["n_young"] == 0
    assert set(hot) <= set(vm.harvest(view="other").young)
    assert [view.name for view in vm.state().views] == ["default", "other"]
    vm.resume()
    refused(["snapshot", "v", "--tracker", "pagemap"], 1, "guestpt is in use by other (process")
    done = kvmhost(
        "young", "snapshot", "v", "--tracker", "pagemap", "--force", "--interval", "0.01"
    )
    assert (done.returncode, done.stderr) == (0, "")
    until(lambda: vm.state().tracker == "guestpt", "the tracker is put back")


def test_snapshot_clears_only_a_view_that_stays(vm):
    refused(["snapshot", "v", "--clear", "--view", "mine"], 2, "clear with --view default")
    refused(["snapshot", "v", "--view", "a b"], 2, "view 'a b'")


def test_snapshot_by_the_other_tracker(vm, hot):
    done = kvmhost(
        "young", "snapshot", "v", "--tracker", "pagemap", "--range", "1024:5120", "--json"
    )
    found = parsed(done.stdout)
    assert (found["tracker"], found["n_young"]) == ("pagemap", hot.size)


def refused(words, code, text):
    done = kvmhost("young", *words)
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["snapshot", "v", "--range", "5:5"], "memory has gfns [0, 0x1800)"),
        (["snapshot", "v", "--range", "0:0x1801"], "memory has gfns [0, 0x1800)"),
        (["snapshot", "v", "--tracker", "x"], "unknown tracker"),
        (["snapshot", "v", "--interval", "0.01", "--out", "/nowhere/x.npy"], "/nowhere/x.npy"),
    ],
)
def test_what_does_not_fit_the_vm(vm, words, text):
    refused(words, 2, text)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["snapshot"], 2, "VM"),
        (["snapshot", "v", "--range", "x"], 2, "invalid range"),
        (["snapshot", "v", "--out", "x.txt"], 2, "must end in .npy or .npz or .bin"),
        (["snapshot", "v", "--interval", "no"], 2, "--interval"),
        (["heatmap", "v"], 2, "-o"),
        (["heatmap", "v", "-o", "x.png", "--count", "0"], 2, "1 or more"),
        (["heatmap", "v", "-o", "x.txt", "--count", "1"], 2, ".png"),
        (["heatmap", "v", "-o", "/nowhere/x.png", "--count", "1"], 2, "/nowhere"),
        (["snapshot", "../v"], 1, "nothing answers"),
        (["snapshot", "nobody"], 1, "nothing answers"),
    ],
)
def test_errors_without_a_vm(tmp_path, monkeypatch, words, code, text):
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    refused(words, code, text)


def test_heatmap_in_a_pipe_is_silent_but_for_its_result(vm, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    words = ("--interval", "0.02", "--count", "10", "--bins", "64")
    done = kvmhost("young", "heatmap", "v", "-o", str(out), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 10 windows of v\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_heatmap_shows_progress_on_a_terminal(vm, tmp_path):
    pytest.importorskip("matplotlib")
    master, slave = pty.openpty()
    try:
        out = tmp_path / "x.png"
        words = ("--interval", "0.05", "--count", "8")
        done = kvmhost(
            "young", "heatmap", "v", "-o", str(out), *words,
            capture_output=False, stdout=subprocess.DEVNULL, stderr=slave,
        )  # fmt: skip
        assert done.returncode == 0
        assert b"harvesting" in os.read(master, 65536)
    finally:
        os.close(master)
        os.close(slave)


def test_snapshot_of_a_stopped_vm_says_what_it_waits_for(vm):
    """On a terminal; the client's timeout bounds the wait."""
    pid = vm.state().pid
    master, slave = pty.openpty()
    os.kill(pid, signal.SIGSTOP)
    try:
        words = [sys.executable, "-m", "kvmhost", "young", "snapshot", "v"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=slave)
        shown = b""
        while b"waiting for v to answer, at most 60 s" not in shown:
            shown += os.read(master, 4096)
        os.kill(pid, signal.SIGCONT)
        assert process.wait(120) == 0
    finally:
        os.kill(pid, signal.SIGCONT)
        os.close(master)
        os.close(slave)


def test_heatmap_of_a_vm_that_ends_has_what_there_was(vm, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.png"
    words = [sys.executable, "-m", "kvmhost", "young", "heatmap", "v", "-o", str(out)]
    process = subprocess.Popen(
        [*words, "--interval", "0.05", "--count", "10000"], stdout=subprocess.PIPE, text=True
    )
    until(lambda: vm.counters().harvest.harvests > 5, "some windows")
    vm.stop()
    stdout, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert "windows of v" in stdout
    assert out.exists()


@pytest.mark.parametrize("table_format", ["tdp", "ept", "stage2", "radix"])
def test_snapshot_through_a_model_table(vm, hot, table_format):
    """The walker of each format finds what the tracker found, and the provenance says so."""
    words = ("--interval", "0.3", "--range", "1024:5120", "--json", "--format", table_format)
    done = kvmhost("young", "snapshot", "v", *words)
    assert (done.returncode, done.stderr) == (0, "")
    found = parsed(done.stdout)
    name = "npt" if table_format == "tdp" else table_format
    assert (found["tracker"], found["table_format"]) == ("guestpt", f"{name}-model")
    assert found["n_young"] == hot.size
    assert found["ranges"] == [[int(hot[0]), hot.size]]


def test_snapshot_of_a_vm_by_its_pid(vm, hot):
    """A kvmhost VM is a process like any other: its guest mapping is a shared memfd."""
    pid = str(vm.state().pid)
    done = kvmhost("young", "snapshot", "--pid", pid, "--tracker", "present", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = parsed(done.stdout)
    assert (found["vm"], found["tracker"]) == (f"pid {pid}", "present")
    assert found["table_format"] == "host-process"
    assert found["n_pages"] == MEM_PAGES
    words = ("--tracker", "present", "--format", "stage2", "--json")
    fed = parsed(kvmhost("young", "snapshot", "--pid", pid, *words).stdout)
    assert fed["table_format"] == "stage2-model"
    assert fed["n_young"] >= found["n_young"]
