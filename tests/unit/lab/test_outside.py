"""Parts of "tables from outside" that need no emulated host."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import threading
from pathlib import Path

import pytest

from kvmhost._core import build
from kvmhost.errors import LabError, TableError
from kvmhost.lab import probes, project, tables
from kvmhost.lab.hosts import HOSTS, RootKind, find_host
from kvmhost.lab.messages import Channel
from kvmhost.lab.probes import RootProbe, SeenRoot
from kvmhost.lab.qemu import Devices, command_line
from kvmhost.lab.tables import GuestTables


@pytest.fixture
def tracefs(tmp_path, monkeypatch):
    """A folder that looks like tracefs; returns what writes a line of trace."""
    (tmp_path / "instances").mkdir()
    (tmp_path / "kprobe_events").touch()
    monkeypatch.setattr(probes, "_TRACING", tmp_path)
    folder = tmp_path / "instances" / "kvmhost_lab"
    make = Path.mkdir

    def mkdir(path, *args, **kwargs):
        make(path, *args, **kwargs)
        if path == folder:
            for event in ("root", "gone"):
                (path / "events" / "kvmhost_lab" / event).mkdir(parents=True)
            (path / "trace_pipe").touch()

    monkeypatch.setattr(Path, "mkdir", mkdir)

    def trace(line):
        with (folder / "trace_pipe").open("a") as file:
            file.write(f" vcpu0-71 [000] ..... 12.5: {line}\n")

    return trace


def test_roots_on_x86(tracefs):
    probe = RootProbe("x86_64")
    tracefs("root: (svm_load_mmu_pgd+0x0/0x60) vm=0xffff88 pa=0x800000000573d000 levels=5")
    tracefs("root: (svm_load_mmu_pgd+0x0/0x60) vm=0xffff99 pa=0x1000 levels=4")
    tracefs("root: (svm_load_mmu_pgd+0x0/0x60) vm=0xffff88 pa=0x2000 levels=5")
    assert probe.roots() == [
        SeenRoot(0xFFFF88, "npt", 0x2000, levels=5),
        SeenRoot(0xFFFF99, "npt", 0x1000, levels=4),
    ]
    tracefs("gone: (kvm_arch_destroy_vm+0x0/0x10) vm=0xffff88")
    assert [root.pa for root in probe.roots()] == [0x1000]


def test_roots_on_arm64(tracefs):
    probe = RootProbe("aarch64")
    tracefs("root: (kvm_arch_vcpu_load+0x0/0x10) vm=0xff00 pa=0x48432000 ipa_bits=40")
    assert probe.roots() == [SeenRoot(0xFF00, "stage2", 0x4843_2000, ipa_bits=40)]


def test_roots_on_powerpc(tracefs):
    """The address is what lies between the tree's size above and the root's size below."""
    probe = RootProbe("ppc64le")
    tracefs("root: (kvmhv_set_ptbl_entry+0x0/0x10) vm=0x1 entry=0xc0000000123400ad")
    shift = 16 if os.sysconf("SC_PAGESIZE") == 65536 else 12
    assert probe.roots() == [SeenRoot(1, "radix", 0x1234_0000, page_shift=shift)]
    tracefs("root: (kvmhv_set_ptbl_entry+0x0/0x10) vm=0x1 entry=0x0")
    assert probe.roots() == []


def test_half_a_line_waits_for_the_rest(tracefs):
    probe = RootProbe("x86_64")
    pipe = probe._instance / "trace_pipe"
    pipe.write_text("x: root: (f) vm=0x1 pa=0x1000 le")
    assert probe.roots() == []
    pipe.write_text("x: root: (f) vm=0x1 pa=0x1000 levels=4\n")
    assert probe.roots() == [SeenRoot(1, "npt", 0x1000, levels=4)]


class FakeHost:
    """A running host whose agent is a function."""

    host = find_host("amd64-6.12")
    mem_bytes = 1 << 20
    is_on = False

    def __init__(self, path, answers):
        path.write_bytes(b"\0" * self.mem_bytes)
        self.ram = path
        self.agent, self._inside = socket.socketpair()
        self._answers = answers
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self):
        channel = Channel(self._inside.fileno(), "fake")
        channel.send({"pid": 1})
        for answer in self._answers:
            channel.receive()
            channel.send(answer)
        self._inside.close()

    def events(self, timeout_s):
        self.thread.join(timeout_s)
        raise LabError(self.host.name, "qemu-system-x86_64: ended by SIGKILL", "Kernel panic")
        yield


def root(pa, **fields):
    kept = {"vm": 1, "table_format": "npt", "pa": pa, "levels": 4, "ipa_bits": 0, "page_shift": 12}
    return {"roots": [kept | fields], "running": True}


def harvests(tmp_path, answers, n=1):
    running = FakeHost(tmp_path / "ram", answers)
    guest = GuestTables(running, 60.0, lambda _: None)
    try:
        for _ in range(n):
            guest.harvest(0, 512)
    finally:
        guest.close()
        running.thread.join()
        running.agent.close()


def test_a_root_that_stays(tmp_path):
    harvests(tmp_path, [root(0x1000)] * 4, n=2)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([root(0x1000), root(0x2000)], "changed: it is npt at 0x2000, .*was npt at 0x1000"),
        ([root(0x1000), root(0x1000), root(0x1000, levels=5)], "it is .*5 levels.*was .*4 levels"),
        ([root(0x1000), {"roots": [], "running": True}], "no guest has a root; it was npt at 0x1"),
        ([{"roots": [], "running": True}], "no guest has a root$"),
        ([root(0x10_0000)], "outside the host's memory"),
    ],
)
def test_a_root_that_does_not(tmp_path, answers, message):
    with pytest.raises(TableError, match=message):
        harvests(tmp_path, answers, n=2)


def test_a_host_that_dies_is_named_by_what_killed_it(tmp_path):
    with pytest.raises(LabError, match=r"ended by SIGKILL: Kernel panic"):
        harvests(tmp_path, [root(0x1000)])


@pytest.mark.parametrize("line", [b"hello\n", b"[1]\n", b"\xff\n"])
def test_an_agent_that_speaks_something_else(line):
    ours, other = socket.socketpair()
    with ours, other:
        other.sendall(line)
        with pytest.raises(LabError, match="does not speak JSON"):
            Channel(ours.fileno(), "h").receive()


def test_each_host_has_its_memory_file_and_its_layout():
    for host in HOSTS.values():
        devices = Devices(
            Path("k"), Path("i"), Path("m"), 3 << 30, Path("/root"), (3, 4, 5, 6), Path("c")
        )
        words = command_line(host, devices)
        assert any(word.endswith("mem-path=m,share=on") for word in words)
        assert tables.ram_layout(host.machine, 3 << 30)
        assert "name=lab.agent" in " ".join(words)


@pytest.mark.parametrize("architecture", sorted(project.COMPILERS))
def test_the_core_builds_for_another_architecture(tmp_path, monkeypatch, architecture):
    compiler, _, _ = project.COMPILERS[architecture]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = project.build_core(architecture, lambda _: None)
    files = project.project_files(folder)
    assert (
        files["kvmhost/_core/_native.abi3.so"][18] == {"arm64": 0xB7, "ppc64el": 0x15}[architecture]
    ), "e_machine of the ELF header"
    # Six instructions of the loop at least, and no ELF header.
    assert 24 <= len(files["loop.bin"]) <= 128
    assert "kvmhost/lab/agent.py" in files
    assert "kvmhost/guests/__init__.py" in files, "folders that are links are followed"
    assert not [name for name in files if "x86_64-linux-gnu" in name]
    assert project.core_folder(architecture) == folder


def test_what_only_x86_has_is_left_out_elsewhere():
    here = {path.name for path in build.c_sources("x86_64")}
    there = {path.name for path in build.c_sources("aarch64")}
    assert here - there == {"bench_exits.c", "msrs.c", "vcpu.c"}
    assert there < here
    assert {host.architecture for host in HOSTS.values() if host.root is RootKind.PACKAGES} == set(
        project.COMPILERS
    )
    assert platform.machine() in build.ARCHITECTURES
