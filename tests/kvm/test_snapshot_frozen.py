"""A snapshot is one frozen state: of a VM that evicts, is pushed, loses pages or is interrupted."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from actors import waits
from waiting import DEADLINE_S, until

from kvmhost.control.client import Client
from kvmhost.control.server import ControlServer
from kvmhost.errors import (
    HostError,
    KvmHostError,
    LayoutError,
    PagerError,
    VmGoneError,
)
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.chunks import CHUNK_PAGES, ChunkReader, chunk_ranges
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapshot import save_machine
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import PageState

#: gfns that hold data in these tests; the guest has its pages below them.
FIRST, END = 0x1000, 0x2800
WORDS = np.arange(512, dtype=np.uint64)


def contents(gfns: np.ndarray) -> np.ndarray:
    """What a page holds: 512 words by its gfn."""
    return (gfns.astype(np.uint64)[:, None] + 1) * np.uint64(0x9E3779B97F4A7C15) + WORDS


@pytest.fixture
def machine() -> Iterator[Machine]:
    """64 MiB, paused, with 24 MiB of data of which no two pages are the same."""
    params = {"gfn_start": 0x800, "pages": 4, "epochs": 1 << 30}
    with Machine(image_path("touch"), mem_bytes=64 << 20, engine="kvm", params=params) as machine:
        write_pages(machine, FIRST, END)
        machine.start(paused=True)
        yield machine


def write_pages(machine: Machine, first: int, end: int) -> None:
    machine.memory.array(first << 12, (end - first, 512), "<u8")[:] = contents(
        np.arange(first, end)
    )


def wrong_pages(machine: Machine, first: int = FIRST, end: int = END) -> int:
    """Compare a few pages at a time: under a limit they come and go."""
    wrong = 0
    for gfn in range(first, end, 64):
        stop = min(gfn + 64, end)
        found = machine.memory.array(gfn << 12, (stop - gfn, 512), "<u8")
        wrong += int((found != contents(np.arange(gfn, stop))).any(axis=1).sum())
    return wrong


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_saving_brings_no_page_back(machine: Machine, tmp_path: Path) -> None:
    pager = machine.open_pager()
    pager.set_limit(3000 * 4096)
    pager.shrink()
    before = pager.counters()
    states = pager.states()
    held = machine.memory.resident_bytes()
    assert save_machine(machine, tmp_path / "x.snap") >= (END - FIRST) << 12
    after = pager.counters()
    assert after["fault_ins"] + after["restored_pages"] == 0
    assert after["evictions"] == before["evictions"]
    assert (pager.states() == states).all()
    assert machine.memory.resident_bytes() == held
    with restore_machine(tmp_path / "x.snap", resident_max_bytes=0) as other:
        assert wrong_pages(other) == 0


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_restored_vm_never_exceeds_its_limit(machine: Machine, tmp_path: Path) -> None:
    machine.open_pager().set_limit(3000 * 4096)
    machine.open_pager().shrink()
    save_machine(machine, tmp_path / "x.snap")
    # The limit of the snapshot, and a lower one.
    for limit, held in ((None, 3000), (1000 * 4096, 1000)):
        with restore_machine(tmp_path / "x.snap", resident_max_bytes=limit) as other:
            pager = other.open_pager()
            assert pager.resident_max_bytes == held * 4096
            assert pager.counters()["resident_pages"] <= held
            assert other.memory.resident_bytes() <= held << 12
            assert pager.counters()["evicted_pages"] >= END - FIRST - held
            other.start()
            assert wrong_pages(other) == 0
            counters = pager.counters()
            assert counters["resident_pages"] <= held
            assert counters["over_limit"] == counters["errors"] == counters["lost_pages"] == 0


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_store_that_is_too_small_refuses_the_restore(machine: Machine, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    noise = machine.memory.array(FIRST << 12, (2000, 512), "<u8")
    noise[:] = rng.integers(1, 1 << 63, size=noise.shape, dtype=np.uint64)
    del noise
    save_machine(machine, tmp_path / "x.snap")
    store = StoreOptions(limit_bytes=1 << 20)
    with pytest.raises(KvmHostError, match="store of evicted pages is full"):
        restore_machine(tmp_path / "x.snap", resident_max_bytes=1000 * 4096, store=store)


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_everybody_at_once(machine: Machine, tmp_path: Path) -> None:
    """Evictions, restores, drops, limits and touches do not show in the file."""
    pager = machine.open_pager()
    pager.set_limit(3000 * 4096)
    pager.shrink()
    stop = threading.Event()
    rounds = [0] * 4

    def repeat(number: int, act: Callable[[int], object]) -> threading.Thread:
        def run() -> None:
            while not stop.is_set():
                act(rounds[number])
                rounds[number] += 1

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def touch(i: int) -> None:
        # Fresh memory and data, in the guest's stead: it holds the interpreter lock.
        bytes(machine.memory[(0x2900 + i % 0x1000) << 12 : ((0x2900 + i % 0x1000) << 12) + 1])
        bytes(machine.memory[(FIRST + i * 7 % 0x1800) << 12 : ((FIRST + i * 7 % 0x1800) << 12) + 1])

    def churn(i: int) -> None:
        pager.evict(range(FIRST + i * 64 % 0x1800, FIRST + i * 64 % 0x1800 + 64))
        pager.restore(FIRST + i * 96 % 0x1700, 32)

    def limit(i: int) -> None:
        pager.set_limit((2500 + i % 2 * 500) * 4096)
        pager.shrink()

    def drop(i: int) -> None:
        # What is dropped and written again is outside of what is compared.
        machine.memory[0x3000_000:0x3000_008] = b"x" * 8
        pager.drop(0x3000, 1)

    threads = [repeat(n, act) for n, act in enumerate((touch, churn, limit, drop))]
    try:
        for number in range(4):
            # Each save starts after everybody did something since the last one.
            seen = list(rounds)
            until(lambda seen=seen: all(a > b for a, b in zip(rounds, seen, strict=True)), "all")
            save_machine(machine, tmp_path / f"{number}.snap")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert machine.error is None
    assert pager.counters()["lost_pages"] == 0
    for number in range(4):
        with restore_machine(tmp_path / f"{number}.snap", resident_max_bytes=0) as other:
            assert wrong_pages(other) == 0


@pytest.mark.parametrize(
    "engine", [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
)
@pytest.mark.requires_uffd
def test_a_frozen_read_of_a_running_guest(engine: str) -> None:
    """Each engine: pages read under a freeze are those that the paused guest has."""
    params = {"gfn_start": 0x800, "pages": 1000, "epochs": 1 << 30}
    with Machine(image_path("touch"), mem_bytes=16 << 20, engine=engine, params=params) as machine:
        pager = machine.open_pager()
        pager.set_limit(500 * 4096)
        machine.start()
        for _ in range(3):
            done, evicted = machine.doorbells, pager.counters()["evictions"]
            until(lambda done=done: machine.doorbells > done, "an epoch")
            until(lambda seen=evicted: pager.counters()["evictions"] > seen, "an eviction")
            machine.pause()
            with pager.frozen() as core:
                before = pager.counters()
                pages = read_all(machine, core)
                after = pager.counters()
            # The store may still compact itself; no page moves between memory and store.
            for name in ("resident_pages", "evicted_pages", "evictions", "fault_ins"):
                assert before[name] == after[name], name
            for gfn in range(machine.memory.gfn_end):
                held = bytes(machine.memory[gfn << 12 : (gfn + 1) << 12])
                assert held == pages.get(gfn, bytes(4096)), hex(gfn)
            machine.resume()
            assert pager.counters()["resident_pages"] <= 500


def read_all(machine: Machine, core: object) -> dict[int, bytes]:
    reader, room = ChunkReader(machine.memory, core), memoryview(bytearray(CHUNK_PAGES << 12))
    pages: dict[int, bytes] = {}
    for where in chunk_ranges([(r.gpa, r.n_bytes) for r in machine.memory.regions]):
        held, _, _ = reader.read(where, room)
        bits, at = int.from_bytes(held, "little"), 0
        for i in range(where.n_pages):
            if bits >> i & 1:
                pages[where.gfn + i] = bytes(room[at : at + 4096])
                at += 4096
    return pages


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_guest_that_checks_its_bytes(tmp_path: Path) -> None:
    """Saved live and again and again, restored under the limit: every byte is right."""
    params = {"gfn_start": 1024, "pages": 6000, "hot": 500, "scan_every": 2, "epochs": 0}
    with Machine(
        image_path("hotcold"), mem_bytes=48 << 20, n_vcpus=2, engine="kvm", params=params
    ) as machine:
        pager = machine.open_pager()
        pager.set_limit(2000 * 4096)
        machine.start()
        for number in range(3):
            seen = pager.counters()
            until(
                lambda seen=seen: pager.counters()["fault_ins"] > seen["fault_ins"] + 500,
                "refaults",
            )
            save_machine(machine, tmp_path / f"{number}.snap")
        assert machine.running
        assert machine.error is None
    for number in range(3):
        with restore_machine(tmp_path / f"{number}.snap") as other:
            pager = other.open_pager()
            assert pager.resident_max_bytes == 2000 * 4096
            start = other.doorbells
            other.start()
            until(lambda m=other, n=start: m.doorbells > n + 10 or not m.running, "ten epochs")
            assert other.running, (other.error, other.console_text())
            assert pager.counters()["resident_pages"] <= 2000


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_freeze_holds_back_whoever_changes_pages(machine: Machine) -> None:
    pager = machine.open_pager()
    pager.evict([FIRST])
    done: list[str] = []
    acts: dict[str, Callable[[], object]] = {
        "evict": lambda: pager.evict([FIRST + 1]),
        "restore": lambda: pager.restore(FIRST),
        "drop": lambda: pager.drop(END - 1),
        "limit": lambda: pager.set_limit(5000 * 4096),
    }
    threads = [
        threading.Thread(target=lambda n=name, a=act: (a(), done.append(n)))
        for name, act in acts.items()
    ]
    with pager.frozen():
        for thread in threads:
            thread.start()
        # All of them are in the kernel, waiting; none gets past.
        until(lambda: all(waits(thread) for thread in threads), "four that wait")
        assert done == []
        assert pager.state(FIRST) is PageState.EVICTED
        assert pager.resident_max_bytes == 0
        # Who touches the page gets it: nobody waits for the freezer.
        assert bytes(machine.memory[FIRST << 12 : (FIRST << 12) + 8]) == bytes(
            contents(np.array([FIRST]))[0, :1]
        )
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(acts)


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_lost_page_fails_the_snapshot_and_is_named(machine: Machine, tmp_path: Path) -> None:
    pager = machine.open_pager()
    pager.evict([0x1234])
    pager.inject_failures(loads=1)
    with pytest.raises(PagerError, match="gfn 0x1234"):
        save_machine(machine, tmp_path / "x.snap")
    assert list(tmp_path.iterdir()) == []
    # That was this one read: the page is there, and the VM runs on.
    save_machine(machine, tmp_path / "x.snap")
    machine.resume()
    assert machine.running


@pytest.mark.requires_kvm
def test_holes_stay_holes(tmp_path: Path) -> None:
    with Machine(image_path("hello"), mem_bytes=256 << 20, engine="kvm") as machine:
        machine.start(paused=True)
        held = machine.memory.resident_bytes()
        save_machine(machine, tmp_path / "x.snap")
        assert machine.memory.resident_bytes() == held
        with restore_machine(tmp_path / "x.snap") as other:
            assert other.memory.resident_bytes() <= held
    assert (tmp_path / "x.snap").stat().st_size < 8 << 20


@pytest.mark.requires_kvm
def test_every_second_page(tmp_path: Path) -> None:
    """What save writes restore reads, however fragmented: the table has a fixed size."""
    with Machine(image_path("hello"), mem_bytes=64 << 20, engine="kvm") as machine:
        machine.start(paused=True)
        machine.memory.array(0x1000 << 12, (0x2000, 512), "<u8")[::2, 511] = np.arange(1, 0x1001)
        save_machine(machine, tmp_path / "x.snap")
    with restore_machine(tmp_path / "x.snap") as machine:
        pages = machine.memory.array(0x1000 << 12, (0x2000, 512), "<u8")
        assert (pages[::2, 511] == np.arange(1, 0x1001)).all()
        assert not pages[1::2].any()
        del pages


@pytest.mark.requires_kvm
@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_nothing_but_a_file_is_replaced(kind: str, machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(LayoutError, match="not a regular file"):
        save_machine(machine, path)
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]
    assert machine.paused


@pytest.mark.requires_kvm
def test_a_file_is_ours_alone_and_replaces_an_old_one(machine: Machine, tmp_path: Path) -> None:
    path = tmp_path / "x.snap"
    path.write_text("old")
    path.chmod(0o666)
    save_machine(machine, path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["x.snap"]


@pytest.mark.requires_kvm
def test_a_full_disk_leaves_no_file_and_a_running_vm(machine: Machine, tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, old[1]))
    try:
        with pytest.raises(HostError, match=os.strerror(errno.EFBIG)):
            save_machine(machine, tmp_path / "x.snap")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []
    machine.resume()
    assert not machine.paused
    assert machine.running


@pytest.mark.requires_kvm
@pytest.mark.parametrize("how", [KeyboardInterrupt, None])
def test_interrupted_it_leaves_no_file(
    how: type[BaseException] | None, machine: Machine, tmp_path: Path
) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        if how is not None and asked == 3:
            raise how
        return asked == 3

    with pytest.raises(how or KvmHostError):
        save_machine(machine, tmp_path / "x.snap", cancelled=cancelled)
    assert asked == 3
    assert list(tmp_path.iterdir()) == []
    machine.resume()
    assert not machine.paused
    # Nothing is frozen any more.
    machine.open_pager().evict([FIRST])


# -- over the control socket, and in processes of their own ---------------------------


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


@pytest.mark.requires_kvm
@pytest.mark.parametrize("how", ["client", "server"])
def test_a_client_that_goes_away_ends_the_saving(
    how: str, machine: Machine, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = threading.Event(), threading.Event()

    def save(machine: Machine, path: Path, *, cancelled: Callable[[], bool], stop: bool) -> int:
        began.set()
        until(cancelled, "somebody says that nobody waits")
        ended.set()
        raise KvmHostError("cancelled")

    monkeypatch.setattr("kvmhost.machine.snapshot.save_machine", save)
    server = ControlServer(machine, name="gone").start()
    try:
        command = [sys.executable, "-m", "kvmhost", "snapshot", "gone", str(runtime / "x.snap")]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as client:
            assert began.wait(DEADLINE_S)
            if how == "client":
                client.send_signal(signal.SIGINT)
            else:
                server.close()
            assert ended.wait(DEADLINE_S)
            client.communicate(timeout=DEADLINE_S)
            assert client.returncode != 0
        if how == "client":
            with Client("gone") as other:
                assert other.state().running
    finally:
        server.close()


@pytest.mark.requires_kvm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_vm_that_ends_leaves_no_half_file(number: signal.Signals, runtime: Path) -> None:
    folder = runtime / "files"
    folder.mkdir()
    words = "--name end --mem 600M --param gfn_start=4096 --param pages=140000 --param epochs=0"
    kvmhost = [sys.executable, "-m", "kvmhost"]
    with subprocess.Popen([*kvmhost, "run", "touch", *words.split()]) as vm:
        try:
            with connected("end") as client:
                until(lambda: client.state().doorbells > 0, "an epoch", 300)
            command = [*kvmhost, "snapshot", "end", str(folder / "x.snap")]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as saving:
                until(lambda: being_written(vm.pid, folder) or saving.poll() is not None, "writing")
                vm.send_signal(number)
                vm.wait(DEADLINE_S)
                saving.communicate(timeout=DEADLINE_S)
        finally:
            if vm.poll() is None:
                vm.kill()
    # Whole, if it was quicker than the signal; else not there, under no name.
    assert [path.name for path in folder.iterdir()] in ([], ["x.snap"])
    if (folder / "x.snap").exists():
        restore_machine(folder / "x.snap").close()


@contextlib.contextmanager
def connected(name: str) -> Iterator[Client]:
    def answers() -> bool:
        with contextlib.suppress(VmGoneError), Client(name) as client:
            client.state()
            return True
        return False

    until(answers, "the VM answers", 120)
    with Client(name) as client:
        yield client


def being_written(pid: int, folder: Path) -> bool:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(folder) in str(entry.readlink()) and entry.stat().st_size > 1 << 20:
                return True
    return False


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_a_lost_page_over_the_api(machine: Machine, runtime: Path) -> None:
    machine.open_pager().evict([0x1234])
    machine.open_pager().inject_failures(loads=1)
    with ControlServer(machine, name="lost"), Client("lost") as client:
        with pytest.raises(PagerError, match="gfn 0x1234"):
            client.snapshot(str(runtime / "x.snap"))
        assert client.snapshot(str(runtime / "x.snap"), stop=True) > 0
        assert not client.state().running


_BEYOND = """
import os, sys
from pathlib import Path
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.machine.chunks import CHUNK_PAGES, ChunkReader, chunk_ranges
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapshot import save_machine
import numpy as np
group, path = Path(sys.argv[1]), Path(sys.argv[2])
def data(machine, check):
    for gfn in range(0x8000, 0x8000 + 60000, 500):
        pages = machine.memory.array(gfn << 12, (500, 512), "<u8")
        want = np.arange(gfn, gfn + 500, dtype=np.uint64)[:, None]
        if check:
            assert (pages[:, :64] == want).all() and not pages[:, 64:].any(), hex(gfn)
        else:
            pages[:, :64] = want
params = {"gfn_start": 0x800, "pages": 4, "epochs": 0}
with Machine(image_path("touch"), mem_bytes=512 << 20, engine="kvm", params=params) as machine:
    machine.start(paused=True)
    machine.open_pager().set_limit(8000 * 4096)
    for task in os.listdir("/proc/self/task"):
        (group / "tasks").write_text(task) if (group / "tasks").exists() else None
    if not (group / "tasks").exists():
        (group / "cgroup.procs").write_text(str(os.getpid()))
    data(machine, False)
    save_machine(machine, path)
with restore_machine(path) as machine:
    data(machine, True)
    assert machine.open_pager().counters()["resident_pages"] <= 8000
print("saved and restored")
"""


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
@pytest.mark.requires_cgroup
def test_a_vm_beyond_its_cgroup_is_saved_and_restored(tmp_path: Path) -> None:
    """234 MiB of guest data in a memory cgroup of 160 MiB; nobody is killed."""
    if Path("/run/kvmhost-lab").exists():
        pytest.skip("in hosts of kvmhost lab files are memory, and the cgroup is charged for them")
    v1 = Path("/sys/fs/cgroup/memory")
    root = v1 if v1.exists() else Path("/sys/fs/cgroup")
    group = root / f"kvmhost-snapshot-{os.getpid()}"
    group.mkdir()
    try:
        limit = group / ("memory.limit_in_bytes" if root == v1 else "memory.max")
        limit.write_text(str(160 << 20))
        command = [sys.executable, "-c", _BEYOND, str(group), str(tmp_path / "x.snap")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5 * DEADLINE_S)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "saved and restored\n"
    finally:
        until(lambda: removed(group), "the cgroup is free")


def removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()
