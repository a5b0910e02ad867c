"""The store of evicted pages: codecs, checksums, files, and what goes wrong with them.

The oracle is the guest, which checks every byte it touches, or the bytes that the
test itself wrote and keeps.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost.errors import CapabilityError, LayoutError, LostPageError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.pager.codec import find_codec
from kvmhost.pager.hostswap import swap_refusal
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import EvictOutcome, PageState, RestoreResult
from kvmhost.pager.storefile import HEADER_BYTES, StoreFile
from kvmhost.units import PAGE_BYTES

pytestmark = pytest.mark.requires_uffd

GFN = 0x400
#: Of a page that is kept as it is: checksum, index and page.
RECORD_BYTES = 16 + PAGE_BYTES
ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]


def idle_machine(options: StoreOptions | None = None, mem_bytes: int = 16 << 20) -> Machine:
    """A machine that never runs: its memory is the test's."""
    return Machine(image_path("hello"), mem_bytes=mem_bytes, engine="emulated", store=options)


def mixed_pages(n_pages: int, seed: int = 3) -> np.ndarray:
    """Pages that compress well, badly, not at all, and same-filled ones, in turn."""
    rng = np.random.default_rng(seed)
    pages = np.zeros((n_pages, 512), dtype=np.uint64)
    for i in range(n_pages):
        if i % 4 == 1:
            pages[i] = 0x0102030405060708 + i
        elif i % 4 == 2:
            pages[i] = rng.integers(0, 1 << 16, 512)
        elif i % 4 == 3:
            pages[i] = rng.integers(0, 1 << 63, 512)
    return pages


def put(machine: Machine, pages: np.ndarray) -> np.ndarray:
    """Write pages from GFN on; return their gfns."""
    view = machine.memory.array(GFN * PAGE_BYTES, pages.shape, "<u8")
    view[:] = pages
    return GFN + np.arange(len(pages))


def seen(machine: Machine, n_pages: int) -> np.ndarray:
    return machine.memory.array(GFN * PAGE_BYTES, (n_pages, 512), "<u8").copy()


@pytest.fixture(params=["lz4", "zstd", "none"])
def codec(request: pytest.FixtureRequest) -> str:
    try:
        find_codec(request.param)
    except CapabilityError as error:
        pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(params=["memory", "file"])
def options(request: pytest.FixtureRequest, tmp_path: Path, codec: str) -> StoreOptions:
    path = tmp_path / "store" if request.param == "file" else None
    return StoreOptions(codec=codec, path=path)


def test_every_kind_of_page_comes_back_as_it_went(options: StoreOptions) -> None:
    pages = mixed_pages(400)
    with idle_machine(options) as machine:
        gfns = put(machine, pages)
        for _ in range(3):
            assert machine.open_pager().evict(gfns).count(EvictOutcome.DONE) == 400
            assert (machine.open_pager().states()[gfns] == PageState.EVICTED).all()
            counters = machine.open_pager().counters()
            assert counters["same_filled_pages"] == 200
            raw = 200 if options.codec == "none" else 100
            assert counters["raw_pages"] == raw
            assert raw * PAGE_BYTES <= counters["store_bytes"] <= 200 * PAGE_BYTES
            np.testing.assert_array_equal(seen(machine, 400), pages)
        counters = machine.open_pager().counters()
        assert (counters["store_bytes"], counters["store_held_bytes"]) == (0, 0)
        assert counters["lost_pages"] == counters["errors"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guest_that_checks_its_bytes_runs_on_either_store(
    engine: str, options: StoreOptions
) -> None:
    params = {"pages": 1500, "hot": 100, "epochs": 6, "scan_every": 2, "write_permille": 700}
    with Machine(
        image_path("hotcold"), mem_bytes=32 << 20, engine=engine, params=params, store=options
    ) as machine:
        machine.open_pager().set_limit(600 * 4096)
        machine.start()
        assert machine.wait(DEADLINE_S) == 0
        assert machine.open_pager().counters()["fault_ins"] > 200


def test_zstd_packs_tighter_than_lz4() -> None:
    held = {}
    words = np.random.default_rng(2).integers(0, 1 << 12, (100, 512)).astype(np.uint64)
    for name in ("lz4", "zstd"):
        with idle_machine(StoreOptions(codec=name)) as machine:
            machine.open_pager().evict(put(machine, words))
            held[name] = machine.open_pager().counters()["store_bytes"]
    assert held["zstd"] < held["lz4"] < 100 * PAGE_BYTES


def test_incompressible_pages_are_refused_by_policy(options: StoreOptions) -> None:
    strict = StoreOptions(codec=options.codec, path=options.path, refuse_incompressible=True)
    pages = mixed_pages(80)
    with idle_machine(strict) as machine:
        gfns = put(machine, pages)
        result = machine.open_pager().evict(gfns)
        refused = 40 if strict.codec == "none" else 20
        assert result.count(EvictOutcome.REFUSED) == refused
        assert result.count(EvictOutcome.DONE) == 80 - refused
        assert machine.open_pager().counters()["outcomes"]["refused"] == refused
        assert machine.open_pager().counters()["raw_pages"] == 0
        np.testing.assert_array_equal(seen(machine, 80), pages)


def test_store_limit_counts_for_files_too(options: StoreOptions) -> None:
    limit = 10 * PAGE_BYTES
    tight = StoreOptions(codec=options.codec, path=options.path, limit_bytes=limit)
    pages = mixed_pages(400)
    with idle_machine(tight) as machine:
        result = machine.open_pager().evict(put(machine, pages))
        assert result.count(EvictOutcome.FULL) > 50
        assert machine.open_pager().counters()["store_bytes"] <= limit
        assert machine.open_pager().counters()["disk_full"] == 0
        np.testing.assert_array_equal(seen(machine, 400), pages)


# -- files ---------------------------------------------------------------------


def damage(path: Path, first: int, n_bytes: int) -> None:
    with path.open("r+b") as file:
        file.seek(first)
        old = file.read(n_bytes)
        file.seek(first)
        file.write(bytes(byte ^ 0x5A for byte in old))


@pytest.mark.parametrize("engine", ENGINES)
def test_corrupted_store_file_is_a_machine_check_with_the_gfn(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "store"
    params = {"pages": 1500, "hot": 100, "scan_every": 1, "same_filled_permille": 0}
    with Machine(
        image_path("hotcold"),
        mem_bytes=32 << 20,
        engine=engine,
        params=params,
        store=StoreOptions(path=path),
    ) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        gone = machine.open_pager().evict(GFN + np.arange(1500))
        assert gone.count(EvictOutcome.DONE) > 1000
        damage(path, HEADER_BYTES, path.stat().st_size - HEADER_BYTES)
        machine.step_by_doorbell(False)
        with pytest.raises(LostPageError, match=r"gfn 0x.*checksum does not fit in") as caught:
            machine.wait(DEADLINE_S)
        assert set(caught.value.gfns) <= set(gone.gfns.tolist())
        assert str(path) in str(caught.value)
        # Not one wrong byte was shown: a guest that found one would have said so.
        machine.stop()
        assert machine.status is None
        assert machine.result().status == 0


def test_pages_swapped_in_the_file_are_found_out(tmp_path: Path) -> None:
    """A right record in the wrong place: same length, good checksum, another page's."""
    path = tmp_path / "store"
    pages = np.random.default_rng(1).integers(0, 1 << 63, (2, 512)).astype(np.uint64)
    with idle_machine(StoreOptions(codec="none", path=path)) as machine:
        gfns = put(machine, pages)
        assert machine.open_pager().evict(gfns).count(EvictOutcome.DONE) == 2
        stored = path.read_bytes()
        slot = 4160
        first, second = (stored[HEADER_BYTES + i * slot :][:4112] for i in range(2))
        assert bytes(pages[0].tobytes()) in first
        assert bytes(pages[1].tobytes()) in second
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES)
            file.write(second)
            file.seek(HEADER_BYTES + slot)
            file.write(first)
        result = machine.open_pager().restore(GFN, 2)
        assert (result.restored, result.lost, result.left) == (0, 2, 0)


def one_record(path: Path, page: np.ndarray) -> tuple[bytes, RestoreResult]:
    """Evict a page into a file, have the caller's record put there, and restore."""
    with idle_machine(StoreOptions(codec="none", path=path)) as machine:
        gfns = put(machine, page)
        assert machine.open_pager().evict(gfns).count(EvictOutcome.DONE) == 1
        record = path.read_bytes()[HEADER_BYTES:][:RECORD_BYTES]
        return record, machine.open_pager().restore(GFN, 1)


def test_nobody_else_can_make_a_record_that_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one with a checksum of his own, nor one from another VM's store."""
    xxhash = pytest.importorskip("xxhash")
    path = tmp_path / "store"
    page = np.random.default_rng(1).integers(0, 1 << 63, (1, 512)).astype(np.uint64)
    records = []
    for _ in range(2):
        record, result = one_record(path, page)
        assert result.restored == 1
        records.append(record)
    assert records[0][8:] == records[1][8:] == GFN.to_bytes(8, "little") + page.tobytes()
    assert records[0][:8] != records[1][:8], "the checksum has no key"
    forged = (~page).tobytes()
    checksums = [xxhash.xxh3_64_intdigest(forged, seed).to_bytes(8, "little") for seed in (0, GFN)]
    for fake in [
        *(checksum + GFN.to_bytes(8, "little") + forged for checksum in checksums),
        records[0],
    ]:
        with idle_machine(StoreOptions(codec="none", path=path)) as machine:
            machine.open_pager().evict(put(machine, page))
            with path.open("r+b") as file:
                file.seek(HEADER_BYTES)
                file.write(fake)
            result = machine.open_pager().restore(GFN, 1)
            assert (result.restored, result.lost) == (0, 1)


def test_an_old_record_of_the_same_page_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "store"
    pages = np.random.default_rng(1).integers(0, 1 << 63, (2, 1, 512)).astype(np.uint64)
    with idle_machine(StoreOptions(codec="none", path=path)) as machine:
        pager = machine.open_pager()
        pager.evict(put(machine, pages[0]))
        old = path.read_bytes()[HEADER_BYTES:][:RECORD_BYTES]
        assert pager.restore(GFN, 1).restored == 1
        pager.evict(put(machine, pages[1]))
        with path.open("r+b") as file:
            file.seek(HEADER_BYTES)
            file.write(old)
        assert pager.restore(GFN, 1).lost == 1


@pytest.mark.parametrize("codec_name", ["lz4", "zstd", "none"])
def test_one_flipped_bit_anywhere_loses_that_page_and_no_other(
    tmp_path: Path, codec_name: str
) -> None:
    path = tmp_path / "store"
    rng = np.random.default_rng(9)
    pages = rng.integers(0, 1 << 20, (40, 512)).astype(np.uint64)
    with idle_machine(StoreOptions(codec=codec_name, path=path)) as machine:
        gfns = put(machine, pages)
        for _ in range(20):
            assert machine.open_pager().evict(gfns).count(EvictOutcome.DONE) == 40
            # All came back before: what is in the file now are records of these pages.
            stored = np.frombuffer(path.read_bytes(), dtype=np.uint8)[HEADER_BYTES:]
            at = HEADER_BYTES + int(rng.choice(np.flatnonzero(stored)))
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ 1 << int(rng.integers(8))]))
            result = machine.open_pager().restore(GFN, 40)
            assert (result.restored, result.lost) == (39, 1)
            (lost,) = machine.open_pager().lost_gfns()
            machine.open_pager().drop(lost)  # what a guest would do with it: begin anew
            machine.memory.array(lost * PAGE_BYTES, 512, "<u8")[:] = pages[lost - GFN]
            np.testing.assert_array_equal(seen(machine, 40), pages)


def test_truncated_store_file_loses_pages_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with idle_machine(StoreOptions(path=path)) as machine:
        gfns = put(machine, mixed_pages(100))
        machine.open_pager().evict(gfns)
        os.truncate(path, HEADER_BYTES)
        result = machine.open_pager().restore(GFN, 100)
        assert (result.restored, result.lost, result.left) == (50, 50, 0)
        assert machine.open_pager().counters()["lost_pages"] == 50


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_full_disk_refuses_evictions_and_loses_nothing(small_disk: Path) -> None:
    pages = mixed_pages(400)
    with idle_machine(StoreOptions(path=small_disk / "store")) as machine:
        gfns = put(machine, pages)
        result = machine.open_pager().evict(gfns)
        assert result.count(EvictOutcome.FULL) > 50
        assert result.count(EvictOutcome.DONE) > 200
        assert result.count(EvictOutcome.ERROR) == 0
        counters = machine.open_pager().counters()
        assert counters["disk_full"] == result.count(EvictOutcome.FULL)
        np.testing.assert_array_equal(seen(machine, 400), pages)
        # Room again: the store works on.
        assert machine.open_pager().evict(gfns[:100]).count(EvictOutcome.DONE) == 100
        np.testing.assert_array_equal(seen(machine, 400), pages)
        assert machine.open_pager().counters()["lost_pages"] == 0


@pytest.mark.requires_kvm
def test_guest_under_a_limit_outlives_a_full_disk(small_disk: Path) -> None:
    params = {"pages": 1500, "hot": 100, "epochs": 6, "scan_every": 2}
    with Machine(
        image_path("hotcold"),
        mem_bytes=32 << 20,
        engine="kvm",
        params=params,
        store=StoreOptions(path=small_disk / "store"),
    ) as machine:
        machine.open_pager().set_limit(500 * 4096)
        machine.start()
        assert machine.wait(DEADLINE_S) == 0
        counters = machine.open_pager().counters()
        assert counters["disk_full"] > 0
        assert counters["lost_pages"] == 0


def test_file_size_limit_is_a_full_disk_too(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    pages = mixed_pages(400)
    path = tmp_path / "store"
    with idle_machine(StoreOptions(path=path)) as machine:
        gfns = put(machine, pages)
        machine.open_pager().arm()
        # Guest memory is a file of 16 MiB, too: the limit is for what is written.
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 << 10, hard))
        try:
            result = machine.open_pager().evict(gfns)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert result.count(EvictOutcome.FULL) > 50
        assert result.count(EvictOutcome.ERROR) == 0
        np.testing.assert_array_equal(seen(machine, 400), pages)


def test_a_store_file_goes_away_with_its_vm(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with idle_machine(StoreOptions(path=path)) as machine:
        machine.open_pager().evict(put(machine, mixed_pages(40)))
        assert path.stat().st_size > HEADER_BYTES
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_store_file_of_a_vm_that_was_killed_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "store"
    code = (
        "import os, sys, pathlib; from kvmhost.pager.storefile import StoreFile; "
        f"f = StoreFile(pathlib.Path({str(path)!r})); os.ftruncate(f.fd, 1 << 20); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert path.stat().st_size == 1 << 20
    file = StoreFile(path)
    assert path.stat().st_size < HEADER_BYTES
    with pytest.raises(LayoutError, match="another VM uses it"):
        StoreFile(path)
    file.close()


@pytest.mark.parametrize("kind", ["text", "folder", "link", "pipe", "nowhere"])
def test_what_is_no_store_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "text":
        path.write_text("letters from home")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        (tmp_path / "target").write_text("letters")
        path.symlink_to(tmp_path / "target")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path = tmp_path / "no" / "such" / "folder"
    with pytest.raises(LayoutError, match="store file"):
        StoreFile(path)
    if kind == "text":
        assert path.read_text() == "letters from home"
    if kind == "link":
        assert (tmp_path / "target").read_text() == "letters"


# -- drain, prefetch, swap -------------------------------------------------------


def test_drain_brings_all_back_and_lifts_the_limit() -> None:
    pages = mixed_pages(600)
    with idle_machine() as machine:
        assert machine.open_pager().drain().restored == 0
        gfns = put(machine, pages)
        machine.open_pager().evict(gfns)
        machine.open_pager().set_limit(300 * 4096)
        result = machine.open_pager().drain()
        assert (result.restored, result.lost, result.left) == (600, 0, 0)
        assert machine.memory.resident()[gfns].all()
        np.testing.assert_array_equal(seen(machine, 600), pages)
        counters = machine.open_pager().counters()
        assert (counters["restored_pages"], counters["fault_ins"]) == (600, 0)
        assert machine.open_pager().shrink().evicted == 0


def test_drain_counts_each_page_and_stops_at_none() -> None:
    with idle_machine() as machine:
        gfns = put(machine, mixed_pages(100))
        machine.open_pager().evict(gfns)
        machine.open_pager().inject_failures(loads=3)
        result = machine.open_pager().drain()
        assert (result.restored, result.lost, result.left) == (97, 3, 0)
        assert machine.open_pager().lost_gfns() == [GFN, GFN + 1, GFN + 2]


@pytest.mark.requires_kvm
def test_drain_under_a_busy_guest() -> None:
    params = {"pages": 4000, "hot": 200, "epochs": 0, "scan_every": 3}
    with Machine(image_path("hotcold"), mem_bytes=32 << 20, engine="kvm", params=params) as machine:
        machine.open_pager().set_limit(2000 * 4096)
        machine.step_by_doorbell()
        for _ in range(4):
            machine.run_epoch()
        machine.step_by_doorbell(False)
        for _ in range(5):
            machine.open_pager().evict(GFN + np.arange(4000))
            result = machine.open_pager().drain()
            assert (result.lost, result.left) == (0, 0)
            assert machine.open_pager().counters()["evicted_pages"] == 0
        assert machine.running, machine.error


def test_prefetch_brings_back_what_went_together() -> None:
    pages = mixed_pages(100)
    with idle_machine(StoreOptions(prefetch_pages=8)) as machine:
        gfns = put(machine, pages)
        machine.open_pager().evict(gfns[:50])
        machine.open_pager().evict(gfns[50:])
        assert machine.memory.array((GFN + 6) * PAGE_BYTES, 512, "<u8")[0] == pages[6][0]
        # The counters follow the touched page: what comes beside it comes later.
        machine.open_pager().restore(GFN + 99)
        out = np.flatnonzero(machine.open_pager().states()[gfns] == PageState.RESIDENT).tolist()
        assert out == [*range(6, 15), 99]
        assert machine.open_pager().counters()["prefetched_pages"] == 8
        assert machine.open_pager().counters()["fault_ins"] == 1
        # At the border of the two batches it ends; page 50 compresses: it has its batch.
        assert machine.memory.array((GFN + 47) * PAGE_BYTES, 512, "<u8")[0] == pages[47][0]
        machine.open_pager().restore(GFN + 98)
        out = np.flatnonzero(machine.open_pager().states()[gfns] == PageState.RESIDENT).tolist()
        assert out[:-2] == [*range(6, 15), 47, 48, 49]
        np.testing.assert_array_equal(seen(machine, 100), pages)


@pytest.mark.requires_kvm
def test_guest_with_prefetch_finds_its_bytes() -> None:
    params = {"pages": 3000, "hot": 100, "epochs": 8, "scan_every": 2, "write_permille": 700}
    with Machine(
        image_path("hotcold"),
        mem_bytes=32 << 20,
        engine="kvm",
        n_vcpus=2,
        params=params,
        store=StoreOptions(prefetch_pages=16),
    ) as machine:
        machine.open_pager().set_limit(1000 * 4096)
        machine.start()
        assert machine.wait(DEADLINE_S) == 0
        counters = machine.open_pager().counters()
        assert counters["prefetched_pages"] > 1000
        machine.stop()
        assert counters["resident_pages"] <= 1000 + 32


@pytest.mark.parametrize(
    ("swaps", "free", "word"),
    [
        ("Filename\tType\n", 0, "lists no swap area"),
        ("Filename\tType\n/dev/zram0\tpartition\t100\t100\t5\n", 0, "SwapFree is 0"),
        ("Filename\tType\n/dev/zram0\tpartition\t100\t0\t5\n", 64, None),
    ],
)
def test_decision_on_host_swap(tmp_path: Path, swaps: str, free: int, word: str | None) -> None:
    (tmp_path / "swaps").write_text(swaps)
    (tmp_path / "meminfo").write_text(f"MemFree: 5 kB\nSwapFree:        {free} kB\n")
    reason = swap_refusal(tmp_path, tmp_path / "cgroup")
    assert reason is None if word is None else word in str(reason)


def test_cgroup_may_forbid_host_swap(tmp_path: Path) -> None:
    (tmp_path / "swaps").write_text("Filename\n/swap\tfile\t1\t0\t5\n")
    (tmp_path / "meminfo").write_text("SwapFree: 9 kB\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("1:memory:/x\n0::/vms/one\n")
    group = tmp_path / "cgroup" / "vms" / "one"
    group.mkdir(parents=True)
    (group / "memory.swap.max").write_text("max\n")
    assert swap_refusal(tmp_path, tmp_path / "cgroup") is None
    (group.parent / "memory.swap.max").write_text("0\n")
    assert "memory.swap.max is 0" in str(swap_refusal(tmp_path, tmp_path / "cgroup"))


def test_page_out_asks_first_and_loses_nothing() -> None:
    pages = mixed_pages(64)
    with idle_machine() as machine:
        gfns = put(machine, pages)
        with pytest.raises(CapabilityError, match="no swap here"):
            machine.open_pager().page_out(gfns, lambda: "no swap here")
        assert not machine.open_pager().armed
        result = machine.open_pager().page_out([1, *gfns], lambda: None)
        assert result.count(EvictOutcome.PINNED) == 1
        # Whether they go is the kernel's affair; without swap they stay.
        went = result.count(EvictOutcome.DONE)
        assert went + result.count(EvictOutcome.REFUSED) == 64
        if swap_refusal() is not None:
            assert went == 0
        assert machine.open_pager().counters()["paged_out_pages"] == went
        np.testing.assert_array_equal(seen(machine, 64), pages)


def test_options_out_of_range_are_refused() -> None:
    for bad in ({"codec": "zip"}, {"prefetch_pages": 65}, {"prefetch_pages": -1}):
        with pytest.raises(LayoutError):
            StoreOptions(**bad)
