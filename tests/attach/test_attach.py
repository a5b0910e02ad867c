"""Attached from outside: a program that shares no code with kvmhost, and QEMU."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S, until

from kvmhost.bitmap import YoungBitmap, n_words, pack, unpack
from kvmhost.errors import CapabilityError, InUseError, LayoutError, VmGoneError
from kvmhost.process import attach, foreign
from kvmhost.process.attach import Attached
from kvmhost.process.foreign import SoftDirty
from kvmhost.process.methods import probe_methods
from kvmhost.process.procmaps import Mapping, choose_mapping, shared_mappings
from kvmhost.trackers.idle import IDLE_BITMAP

PAGES = 4096


def pageout_or_skip(attached: Attached) -> None:
    try:
        attached.harvest(tracker="pageout")
    except CapabilityError as error:
        pytest.skip(str(error))


def near(gfns: np.ndarray, reach: int = 15) -> set[int]:
    """Pages that the kernel may map along with these."""
    return {int(gfn) + i for gfn in gfns for i in range(-reach, reach + 1)}


def test_writes_are_seen_page_by_page(toucher: Callable) -> None:
    victim = toucher(PAGES)
    with Attached(victim.pid) as attached:
        assert attached.mapping.start == victim.address
        assert attached.mapping.n_pages == PAGES
        pageout_or_skip(attached)
        for first, step, number in [(0, 1, PAGES), (5, 17, 200), (100, 3, 900), (4095, 1, 1)]:
            victim.tell(f"w {first} {step} {number}")
            young = attached.harvest().young
            touched = np.arange(first, first + step * number, step)
            assert young.gfns().tolist() == touched.tolist()
            assert young.provenance.tracker == "pageout"
            assert young.provenance.table_format == "host-process"
            assert attached.harvest().young.count() == 0
            # Neighbours that were touched too cannot be told from ones that were mapped along.
            alone = step >= 16
            assert young.coarse_as_bool().any() == (not alone and number > 1)


def test_reads_bring_their_block_and_say_so(toucher: Callable) -> None:
    victim = toucher(PAGES)
    victim.tell(f"w 0 1 {PAGES}")
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        for first, step, number in [(3, 37, 100), (0, 64, 64), (1, 1, 40)]:
            victim.tell(f"r {first} {step} {number}")
            young = attached.harvest().young
            touched = np.arange(first, first + step * number, step)
            assert set(touched.tolist()) <= set(young.gfns().tolist())
            assert set(young.gfns().tolist()) <= near(touched)
            if young.count() > number:
                extra = np.setdiff1d(young.gfns(), touched)
                assert young.coarse_as_bool()[extra].all(), "what came along is no observation"


def test_ranges_masks_and_looking(toucher: Callable) -> None:
    victim = toucher(PAGES)
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        victim.tell("w 0 2 2048")
        all_even = list(range(0, PAGES, 2))
        assert attached.harvest(clear=False).young.gfns().tolist() == all_even
        assert attached.harvest(1001, 500).young.gfns().tolist() == list(range(1002, 1501, 2))
        left = [g for g in all_even if not 1001 <= g < 1501]
        assert attached.harvest(clear=False).young.gfns().tolist() == left
        asked = np.zeros(PAGES, dtype=bool)
        asked[[0, 4, 3000]] = True
        assert attached.harvest(mask=pack(asked)).young.gfns().tolist() == left
        left = [g for g in left if g not in (0, 4, 3000)]
        assert attached.harvest().young.gfns().tolist() == left
        assert attached.harvest().young.count() == 0


def test_a_sample_clears_each_page_in_its_turn(toucher: Callable) -> None:
    victim = toucher(PAGES)
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        victim.tell("w 0 2 2048")
        first = attached.harvest(rearm="sample", fraction=0.5).young
        assert first.count() == PAGES // 2
        second = attached.harvest(rearm="sample", fraction=0.5).young
        assert 0 < second.count() < first.count()
        assert attached.harvest(clear=False).young.count() == 0


def test_pages_that_cannot_be_taken_out_are_coarse(toucher: Callable) -> None:
    victim = toucher(PAGES)
    victim.tell("w 0 1 64")
    if victim.tell("l 0") != "done":
        pytest.skip("mlock is not allowed to the program here")
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        victim.tell("w 1000 100 10")
        young = attached.harvest().young
        locked = list(range(8))
        assert young.gfns().tolist() == [*locked, *range(1000, 2000, 100)]
        assert np.flatnonzero(young.coarse_as_bool()).tolist() == locked


def test_chunks_are_no_borders(toucher: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at 64 pages at a time: the same bits, and neighbours across the borders."""
    monkeypatch.setattr(foreign, "_CHUNK_PAGES", 64)
    victim = toucher(PAGES)
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        victim.tell("w 63 1 2")
        victim.tell("w 1000 64 20")
        young = attached.harvest(7, PAGES - 9).young
        assert young.gfns().tolist() == [63, 64, *range(1000, 2280, 64)]
        assert (np.flatnonzero(young.coarse_as_bool()) + 7).tolist() == [63, 64]
        assert attached.harvest().young.count() == 0


def test_swap_that_comes_up_is_noticed(toucher: Callable, tmp_path: Path) -> None:
    victim = toucher(64)
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        victim.tell("w 0 1 5")
        (tmp_path / str(victim.pid)).symlink_to(f"/proc/{victim.pid}")
        (tmp_path / "swaps").write_text("Filename Type Size\n/dev/zram0 partition 1024\n")
        attached.proc = tmp_path
        with pytest.raises(CapabilityError, match="a host without swap"):
            attached.harvest()
        attached.proc = Path("/proc")
        assert attached.harvest().young.count() == 5


def test_present_changes_nothing_and_clears_nothing(toucher: Callable) -> None:
    victim = toucher(PAGES)
    victim.tell("w 7 50 60")
    touched = np.arange(7, 7 + 50 * 60, 50).tolist()
    with Attached(victim.pid) as attached:
        for _ in range(2):
            young = attached.harvest(tracker="present").young
            assert young.gfns().tolist() == touched
            assert young.provenance.window_start_ns == 0
            assert young.coarse is None


def test_writes_by_the_owners_own_tracking(toucher: Callable) -> None:
    victim = toucher(PAGES)
    refusal = "only the process itself can register"
    with Attached(victim.pid) as attached, pytest.raises(CapabilityError, match=refusal):
        attached.harvest(tracker="written")
    if victim.tell("p 0") != "done":
        pytest.skip("no asynchronous write-protection (Linux 6.7, userfaultfd allowed)")
    with Attached(victim.pid) as attached:
        assert attached.mapping.quiet
        attached.harvest(tracker="written")
        victim.tell("w 3 5 700")
        victim.tell(f"r 0 1 {PAGES}")
        written = list(range(3, 3 + 5 * 700, 5))
        assert attached.harvest(clear=False).young.gfns().tolist() == written
        young = attached.harvest().young
        assert young.gfns().tolist() == written
        assert young.provenance.tracker == "written"
        assert attached.harvest().young.count() == 0
        victim.tell("w 8 5 10")
        assert attached.harvest().young.gfns().tolist() == list(range(8, 58, 5))
        with pytest.raises(LayoutError, match="no mask"):
            attached.harvest(mask=np.zeros(n_words(PAGES), dtype=np.uint64))


def test_userfaultfd_of_the_owner_makes_reads_exact(toucher: Callable) -> None:
    victim = toucher(PAGES)
    victim.tell(f"w 0 1 {PAGES}")
    if victim.tell("p 0") != "done":
        pytest.skip("no asynchronous write-protection (Linux 6.7, userfaultfd allowed)")
    with Attached(victim.pid) as attached:
        pageout_or_skip(attached)
        victim.tell("r 3 5 700")
        young = attached.harvest().young
        assert young.gfns().tolist() == list(range(3, 3 + 5 * 700, 5))
        assert young.coarse is None


def test_idle_from_outside_or_why_not(toucher: Callable) -> None:
    victim = toucher(64)
    with Attached(victim.pid) as attached:
        if IDLE_BITMAP.exists():
            attached.harvest(tracker="idle")
            victim.tell("w 3 5 10")
            assert set(range(3, 53, 5)) <= set(attached.harvest().young.gfns().tolist())
        else:
            with pytest.raises(CapabilityError, match="CONFIG_IDLE_PAGE_TRACKING"):
                attached.harvest(tracker="idle")


class FakeProcess:
    """Entries of pagemap in an ordinary file, and a clear_refs that takes what is written."""

    def __init__(self, root: Path, n_pages: int) -> None:
        self.pid, self.pidfd, self.proc = 7, -1, root
        (root / "7").mkdir()
        self.mapping = Mapping(0x10000, 0x10000 + n_pages * 4096, 0, "00:01", 5, "/memfd:x")
        self.entries = np.zeros(16 + n_pages, dtype="<u8")
        self.write([])
        self.pagemap_fd = os.open(root / "7" / "pagemap", os.O_RDONLY)

    def write(self, pages: list[int]) -> None:
        self.entries[16:] = 1 << 63
        self.entries[[16 + page for page in pages]] |= np.uint64(1 << 55)
        (self.proc / "7" / "pagemap").write_bytes(self.entries.tobytes())


def test_soft_dirty_bits_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel may have none: the bits come from a file with the kernel's layout."""
    process = FakeProcess(tmp_path, 300)
    method = SoftDirty(process)
    monkeypatch.setattr(foreign, "has_soft_dirty", lambda: False)
    with pytest.raises(CapabilityError, match="CONFIG_MEM_SOFT_DIRTY"):
        method.begin()
    monkeypatch.setattr(foreign, "has_soft_dirty", lambda: True)
    cleared = process.proc / "7" / "clear_refs"
    method.begin()
    assert cleared.read_text() == "4\n"
    process.write([1, 70, 299])
    assert method.harvest(0, 300, False, None).gfns().tolist() == [1, 70, 299]
    assert method.harvest(50, 100, True, None).gfns().tolist() == [70]
    # The kernel forgot them all at that; what was not asked for is still known.
    process.write([2])
    assert method.harvest(0, 300, True, None).gfns().tolist() == [1, 2, 299]
    process.write([])
    assert method.harvest(0, 300, True, None).count() == 0
    os.close(process.pagemap_fd)


@pytest.mark.requires_qemu
def test_qemu_guest_memory(qemu) -> None:
    """Pages that the guest touches, phase by phase, seen from outside of QEMU."""
    qemu.touch(1)
    with Attached(qemu.pid, "memory-backend-memfd") as attached:
        assert attached.mapping.n_pages == 64 << 8
        assert Path(attached.state().image).name.startswith("qemu-system")
        pageout_or_skip(attached)
        for phase in (1, 3, 5):  # writes are exact
            qemu.touch(phase)
            young = attached.harvest(4096, 256 * 7).young
            assert young.gfns().tolist() == list(range(4096 + phase, 4096 + phase + 7 * 256, 7))
        for phase in (0, 2, 1):  # reads bring their blocks, and then say that they are coarse
            qemu.touch(phase)
            touched = set(range(4096 + phase, 4096 + phase + 7 * 256, 7))
            young = attached.harvest(4096, 256 * 7).young
            found = set(young.gfns().tolist())
            assert touched <= found
            coarse = set((np.flatnonzero(young.coarse_as_bool()) + 4096).tolist())
            assert found - touched <= coarse
        # The guest goes on, with its memory as it was.
        qemu.touch(6)
        assert qemu.process.poll() is None
        qemu.end()
        with pytest.raises(VmGoneError, match="has ended"):
            attached.harvest()


def test_a_process_that_goes_away(toucher: Callable) -> None:
    victim = toucher(64)
    with Attached(victim.pid) as attached:
        attached.harvest(tracker="present")
        victim.end()
        with pytest.raises(VmGoneError, match="has ended"):
            attached.harvest()
    with pytest.raises(LayoutError, match="no such process"):
        Attached(victim.pid)


def test_a_zombie_is_no_process(toucher: Callable) -> None:
    victim = toucher(64)
    victim.process.kill()
    stat = Path(f"/proc/{victim.pid}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "the zombie")
    with pytest.raises(LayoutError, match=r"no shared mapping|has ended"):
        Attached(victim.pid)


@pytest.mark.parametrize(("how", "text"), [("u 0", "no longer there"), ("x 0", "runs another")])
def test_a_mapping_that_goes_away(toucher: Callable, how: str, text: str) -> None:
    victim = toucher(64)
    with Attached(victim.pid) as attached:
        attached.harvest(tracker="present")
        if how == "u 0":
            victim.tell(how)
        else:
            assert victim.process.stdin is not None
            victim.process.stdin.write("x\n")
            victim.process.stdin.flush()
            exe = Path(f"/proc/{victim.pid}/exe")
            until(lambda: "toucher" not in str(exe.readlink()), "the other program")
        with pytest.raises(VmGoneError, match=text):
            attached.harvest()


def test_private_memory_is_refused_by_name(toucher: Callable) -> None:
    victim = toucher(64, "private")
    with pytest.raises(LayoutError, match="no shared mapping of memory"):
        Attached(victim.pid)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 5, 2**40])
def test_pids_that_are_none(pid: int) -> None:
    with pytest.raises(LayoutError, match="process"):
        Attached(pid)


def test_bad_ranges_and_names(toucher: Callable) -> None:
    with Attached(toucher(64).pid) as attached:
        for first, n_pages in [(0, 65), (-1, 5), (64, 1), (70, None)]:
            with pytest.raises(LayoutError):
                attached.harvest(first, n_pages)
        with pytest.raises(LayoutError, match="mask"):
            attached.harvest(mask=np.zeros(2, dtype=np.uint64))
        for rearm in ("none", "all"):
            with pytest.raises(LayoutError, match="as they are cleared"):
                attached.harvest(rearm=rearm)
        with pytest.raises(LayoutError, match="pageout"):
            attached.harvest(tracker="guestpt")


@pytest.mark.requires_root
def test_without_permission(toucher: Callable) -> None:
    """Another user may not look: exit code 126, and the remedy is named."""
    victim = toucher(64)
    code = (
        "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from kvmhost.errors import CapabilityError\n"
        "from kvmhost.process.attach import Attached\n"
        "try: Attached(int(sys.argv[1]))\n"
        "except CapabilityError as error: print(error)"
    )
    # Imported before the change of user: the project may lie where only root can read.
    code = "import numpy, kvmhost.process.attach\n" + code
    command = [sys.executable, "-c", code, str(victim.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "run as the user of that process" in done.stdout, done.stderr


SMAPS = """\
10000-20000 rw-s 00000000 00:01 11 /memfd:ram (deleted)
VmFlags: rd wr sh uw
20000-30000 rw-s 00010000 00:01 11 /memfd:ram (deleted)
VmFlags: rd wr sh
40000-50000 rw-s 00030000 00:01 11 /memfd:ram (deleted)
VmFlags: rd wr sh uw
60000-a0000 rw-s 00000000 00:05 12 /dev/kvm-something
VmFlags: rd wr sh io
b0000-f0000 r--s 00000000 00:01 13 /memfd:readonly (deleted)
VmFlags: rd sh
f0000-f1000 rw-p 00000000 00:00 0
VmFlags: rd wr
"""


def test_mappings_are_parsed_and_put_together(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "smaps").write_text(SMAPS)
    found = shared_mappings(5, tmp_path)
    assert [(m.start, m.end, m.quiet) for m in found] == [
        (0x60000, 0xA0000, False),
        (0x10000, 0x30000, False),
        (0x40000, 0x50000, True),
    ]
    assert choose_mapping(found).start == 0x10000
    assert choose_mapping(found, "kvm-some").start == 0x60000
    assert choose_mapping(found, "0x4abcd").start == 0x40000
    with pytest.raises(LayoutError, match="/memfd:ram"):
        choose_mapping(found, "nothing")
    with pytest.raises(LayoutError, match="no such process"):
        shared_mappings(6, tmp_path)


def test_probes_say_what_attaching_then_does(toucher: Callable) -> None:
    victim = toucher(64)
    victim.tell("p 0")
    found = probe_methods()
    assert set(found) == set(foreign.METHODS)
    for name, support in found.items():
        assert support.reason
        with Attached(victim.pid) as attached:
            if support.works:
                assert attached.harvest(tracker=name).young.provenance.tracker == name
            else:
                with pytest.raises(CapabilityError):
                    attached.harvest(tracker=name)


# -- several readers of one process ---------------------------------------------------


def test_a_second_reader_that_would_clear_is_refused_by_name(toucher: Callable) -> None:
    """In another process, in this one, by force, and after the first one has ended."""
    victim = toucher(256)
    with Attached(victim.pid) as first:
        try:
            first.harvest(tracker="pageout")
        except CapabilityError as error:
            pytest.skip(str(error))
        words = [sys.executable, "-m", "kvmhost", "young", "snapshot", "--pid", str(victim.pid)]
        options = ["--interval", "0.01", "--tracker"]
        run = functools.partial(subprocess.run, capture_output=True, text=True)
        refused = run([*words, *options, "pageout"])
        assert refused.returncode == 1
        assert f"are taken by process {os.getpid()}" in refused.stderr
        assert run([*words, *options, "present"]).returncode == 0
        assert run([*words, *options, "pageout", "--force"]).returncode == 0
        with Attached(victim.pid) as second:
            with pytest.raises(InUseError, match=f"taken by process {os.getpid()}"):
                second.harvest(tracker="pageout")
            second.harvest(tracker="present")
            second.harvest(tracker="pageout", force=True)
        victim.tell("w 5 1 1")
        assert 5 in first.harvest().young.gfns()
    assert run([*words, *options, "pageout"]).returncode == 0


class _FakeMethod:
    """A method with one accessed bit per page, touched by hand."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.young = np.zeros(256, dtype=bool)

    def harvest(self, first, n_pages, clear, mask):
        here = self.young[first : first + n_pages]
        found = YoungBitmap.from_gfns(first, n_pages, (np.flatnonzero(here) + first).tolist())
        if clear:
            here[:] = False if mask is None else here & ~unpack(mask, n_pages)
        return found


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> dict[str, _FakeMethod]:
    made: dict[str, _FakeMethod] = {}

    def make(name: str, target: object) -> _FakeMethod:
        return made.setdefault(name, _FakeMethod(name))

    monkeypatch.setattr(attach, "open_method", make)
    return made


def test_a_forced_method_is_put_back_when_the_view_ends(toucher: Callable, methods) -> None:
    with Attached(toucher(256).pid) as vm:
        vm.harvest(tracker="pageout", view="a")
        methods["pageout"].young[3] = True
        with pytest.raises(InUseError, match="in use by a"):
            vm.harvest(tracker="written", view="b")
        vm.harvest(tracker="written", view="b", force=True)
        assert vm.state().tracker == "written"
        methods["written"].young[4] = True
        # Who reads by the one before goes on, and keeps what that had found.
        assert vm.harvest(tracker="pageout", view="a").young.gfns().tolist() == [3, 4]
        assert vm.harvest(view="b").young.gfns().tolist() == [4]
        methods["written"].young[5] = True
        assert vm.close_view("b")
        assert vm.state().tracker == "pageout"
        methods["pageout"].young[6] = True
        assert vm.harvest(view="a").young.gfns().tolist() == [5, 6]
        assert not vm.close_view("b")


def test_who_forced_a_method_may_take_it_back(toucher: Callable, methods) -> None:
    with Attached(toucher(256).pid) as vm:
        vm.harvest(tracker="pageout", view="a")
        vm.harvest(tracker="written", view="b", force=True)
        vm.harvest(tracker="pageout", view="b")
        assert vm.state().tracker == "pageout"
        vm.close_view("b")
        assert vm.state().tracker == "pageout"


@pytest.mark.parametrize("name", ["idle", "pageout", "written"])
def test_three_readers_in_one_object_are_exact(toucher: Callable, methods, name: str) -> None:
    """Ranges, masks and samples of three readers, against sets of touched pages."""
    rng = np.random.default_rng(4)
    with Attached(toucher(256).pid) as vm:
        expected: dict[str, np.ndarray] = {}
        for view in ("a", "b", "c"):
            vm.harvest(tracker=name, view=view)
            expected[view] = np.zeros(256, dtype=bool)
        for step in range(60):
            touched = rng.random(256) < 0.1
            methods[name].young |= touched
            for pages in expected.values():
                pages |= touched
            view = ("a", "b", "c")[step % 3]
            low = int(rng.integers(0, 128))
            mask = rng.random(256 - low) < 0.5
            young = vm.harvest(low, 256 - low, view=view, mask=pack(mask)).young
            assert np.array_equal(young.as_bool(), expected[view][low:]), step
            expected[view][low:] &= ~mask
