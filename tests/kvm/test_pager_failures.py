"""What the pager does when the kernel, the store or the host fails it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from waiting import until

from kvmhost._ffi import lib
from kvmhost.errors import IoctlError, LayoutError, LostPageError, PagerError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.memory.guest import GuestMemory
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.pager import Pager
from kvmhost.pager.results import EvictOutcome, PageState
from kvmhost.pager.userfault import PLAIN_USERFAULT_ENV, Userfault
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

pytestmark = pytest.mark.requires_uffd

GENEROUS_S = 300


class World:
    """Memory with a pager and no guest: the test touches pages itself."""

    def __init__(self, n_pages: int = 256, options: StoreOptions | None = None) -> None:
        self.memory = GuestMemory.of_size(n_pages * PAGE_BYTES)
        self.userfault = Userfault()
        self.failures: list[PagerError] = []
        self.told, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.pager = Pager(self.memory, self.userfault, options, on_failure=self._fail)

    def _fail(self, error: PagerError) -> None:
        self.failures.append(error)
        self.told.set()
        self.go_on.wait(GENEROUS_S)

    def fill(self, gfns: range) -> np.ndarray:
        pages = np.arange(len(gfns) * 512, dtype=np.uint64).reshape(-1, 512) + 1
        self.memory.array(gfns[0] << PAGE_SHIFT, pages.shape, "<u8")[:] = pages
        return pages

    def read(self, gfn: int) -> np.ndarray:
        """Read a page through the alias, in a way that SIGBUS does not end the process."""
        with self.memory.view(gfn << PAGE_SHIFT, PAGE_BYTES) as page:
            read_end, write_end = os.pipe()
            try:
                os.write(write_end, page)
                return np.frombuffer(os.read(read_end, PAGE_BYTES), "<u8")
            finally:
                os.close(read_end)
                os.close(write_end)

    def close(self) -> None:
        self.go_on.set()
        self.pager.close()
        self.userfault.close()
        self.memory.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture(params=["poison", "plain"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the kernel is, and as one before 6.6, without UFFDIO_POISON."""
    if request.param == "plain":
        monkeypatch.setenv(PLAIN_USERFAULT_ENV, "1")
    yield
    lib.kh_uffd_force_plain(0)


def in_thread(call, *arguments):
    """Run a call that may wait for a page; fail the test, not the process, if it waits on."""
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(call(*arguments)), daemon=True)
    thread.start()
    thread.join(GENEROUS_S)
    assert not thread.is_alive(), "the fault is not served"
    return result[0]


def test_faults_are_served_while_a_failure_is_being_reported(world: World) -> None:
    """Who reports it may wait for the interpreter, and its holder for a page."""
    pages = world.fill(range(8))
    assert world.pager.evict(range(8)).count(EvictOutcome.DONE) == 8
    world.go_on.clear()
    world.pager.inject_failures(loads=1)
    with pytest.raises(OSError, match="Bad address"):
        world.read(3)
    assert world.told.wait(GENEROUS_S)
    np.testing.assert_array_equal(in_thread(world.read, 5), pages[5])
    world.go_on.set()
    assert isinstance(world.failures[0], LostPageError)
    assert world.failures[0].gfns == [3]
    assert world.pager.state(3) is PageState.LOST


def test_arming_that_fails_half_way_is_undone_and_may_be_tried_again(world: World) -> None:
    pages = world.fill(range(8))
    (region,) = world.memory.regions
    other = Userfault()
    try:
        assert not lib.kh_uffd_register(
            other.fd, region.alias_address, region.n_bytes, lib.KH_UFFD_WP
        )
        for _ in range(3):
            with pytest.raises(IoctlError, match="UFFDIO_REGISTER"):
                world.pager.evict([3])
            assert not world.pager.armed
        # EBUSY if the guest mapping were still registered.
        assert not lib.kh_uffd_register(
            other.fd, region.guest_address, region.n_bytes, lib.KH_UFFD_WP
        )
        assert world.pager.counters()["resident_pages"] == 0
    finally:
        other.close()
    assert world.pager.evict([3]).count(EvictOutcome.DONE) == 1
    assert world.pager.counters()["resident_pages"] == 7
    np.testing.assert_array_equal(in_thread(world.read, 3), pages[3])


def test_undone_arming_leaves_fault_around_silenced(world: World) -> None:
    (region,) = world.memory.regions
    world.userfault.silence_fault_around(region)
    other = Userfault()
    try:
        for mapping in (region.alias_address, region.guest_address):
            result = lib.kh_uffd_register(other.fd, mapping, region.n_bytes, lib.KH_UFFD_WP)
            if mapping == region.alias_address:
                assert not result
                with pytest.raises(IoctlError):
                    world.pager.arm()
            else:
                assert result < 0, "the guest mapping is no longer registered"
    finally:
        other.close()


@pytest.mark.requires_kvm
def test_guest_that_touches_fresh_memory_outlives_arming_that_fails() -> None:
    params = {"gfn_start": 0x800, "pages": 2000, "epochs": 3}
    with Machine(image_path("touch"), mem_bytes=16 << 20, engine="kvm", params=params) as machine:
        (region,) = machine.memory.regions
        other = Userfault()
        try:
            lib.kh_uffd_register(other.fd, region.alias_address, region.n_bytes, lib.KH_UFFD_WP)
            machine.start()
            for _ in range(100):
                with pytest.raises(IoctlError):
                    machine.open_pager().arm()
            assert machine.wait(GENEROUS_S) == 0
        finally:
            other.close()


# -- no memory on the host -------------------------------------------------------


def test_a_fault_without_memory_evicts_waits_and_is_served(world: World) -> None:
    pages = world.fill(range(64))
    world.pager.evict(range(16))
    world.pager.inject_failures(fills=5)
    np.testing.assert_array_equal(in_thread(world.read, 3), pages[3])
    counters = world.pager.counters()
    assert counters["memory_waits"] == 1
    assert counters["memory_evictions"] >= 16
    assert (counters["lost_pages"], counters["errors"]) == (0, 0)
    until(lambda: world.pager.counters()["pending_faults"] == 0, "none waits")
    assert not world.failures
    for gfn in range(64):
        np.testing.assert_array_equal(in_thread(world.read, gfn), pages[gfn])


def test_faults_that_wait_for_memory_hold_up_no_other(world: World) -> None:
    pages = world.fill(range(16))
    world.pager.evict(range(16))
    world.pager.inject_failures(fills=1 << 40)
    readers = [threading.Thread(target=world.read, args=(gfn,)) for gfn in range(4)]
    for reader in readers:
        reader.start()
    until(lambda: world.pager.counters()["pending_faults"] == 4, "all four wait")
    assert world.pager.restore(8).left == 1
    world.pager.inject_failures()
    np.testing.assert_array_equal(in_thread(world.read, 9), pages[9])
    for reader in readers:
        reader.join(GENEROUS_S)
        assert not reader.is_alive()
    assert not world.failures


def test_a_fault_that_waited_too_long_ends_the_vm_and_says_why() -> None:
    world = World(options=StoreOptions(memory_wait_s=0.05))
    try:
        world.fill(range(16))
        world.pager.evict(range(16))
        world.pager.inject_failures(fills=1 << 40)
        with pytest.raises(OSError, match="Bad address"):
            world.read(3)
        assert world.told.wait(GENEROUS_S)
        assert "no memory for a guest page: a fault waited for 0.05 s" in str(world.failures[0])
        assert not isinstance(world.failures[0], LostPageError)
        assert world.pager.state(3) is PageState.EVICTED
    finally:
        world.close()


def test_a_wait_for_memory_that_is_none_is_refused() -> None:
    for seconds in (0, -1, 1e9):
        with pytest.raises(LayoutError, match="wait for memory"):
            StoreOptions(memory_wait_s=seconds)


# -- the host's swap --------------------------------------------------------------


def test_pages_in_swap_are_neither_fresh_nor_resident_when_the_pager_arms(world: World) -> None:
    pages = world.fill(range(8))
    world.pager.fake_swap(2, 3)
    world.pager.arm()
    states = world.pager.states()[:9].tolist()
    swapped, resident = PageState.SWAPPED, PageState.RESIDENT
    assert states == [resident] * 2 + [swapped] * 3 + [resident] * 3 + [PageState.FRESH]
    counters = world.pager.counters()
    assert (counters["resident_pages"], counters["swapped_pages"]) == (5, 3)
    assert world.pager.evict(range(8)).by_name() | {"absent": 0} == {
        "done": 5, "absent": 0, "pinned": 0, "full": 0, "refused": 0, "error": 0, "stayed": 0
    }  # fmt: skip
    world.pager.fake_swap(2, 3, swapped=False)  # the guest touched them: nobody tells
    assert world.pager.evict([2]).count(EvictOutcome.DONE) == 1
    for gfn in range(8):
        np.testing.assert_array_equal(in_thread(world.read, gfn), pages[gfn])
    assert world.pager.counters()["swapped_pages"] == 2


def test_a_page_that_the_host_swapped_out_counts_as_resident_no_longer_than_to_its_eviction(
    world: World,
) -> None:
    world.fill(range(64))
    world.pager.arm()
    world.pager.set_limit(40 * 4096)
    world.pager.fake_swap(0, 32)
    shrunk = world.pager.shrink()
    counters = world.pager.counters()
    # 32 are in swap; the other 32 are under the limit.
    assert (counters["resident_pages"], counters["swapped_pages"]) == (32, 32)
    assert shrunk.over_pages == 0
    assert shrunk.evicted <= 16
    world.pager.fake_swap(0, 32, swapped=False)  # all come back from swap by themselves
    assert world.pager.shrink().over_pages == 0
    counters = world.pager.counters()
    assert counters["swapped_pages"] == 0
    assert counters["resident_pages"] <= 40 < counters["resident_pages"] + counters["evicted_pages"]


def test_a_page_that_is_put_in_beside_the_pager_is_counted_once(world: World) -> None:
    """What a fault finds is what holds, whatever the state was."""
    world.pager.arm()
    (region,) = world.memory.regions
    os.pwrite(region.memfd, b"x" * PAGE_BYTES, 5 * PAGE_BYTES)
    assert world.pager.state(5) is PageState.FRESH
    os.pwrite(region.memfd, b"y" * PAGE_BYTES, 6 * PAGE_BYTES)
    for _ in range(2):
        assert world.pager.evict([5, 6]).count(EvictOutcome.DONE) == 2
        assert bytes(in_thread(world.read, 5)) == b"x" * PAGE_BYTES
        assert bytes(in_thread(world.read, 6)) == b"y" * PAGE_BYTES
    assert world.pager.counters()["resident_pages"] == 2


# -- the limit ----------------------------------------------------------------------


def noise(world: World, gfns: range) -> np.ndarray:
    pages = np.random.default_rng(1).integers(0, 1 << 63, (len(gfns), 512)).astype(np.uint64)
    world.memory.array(gfns[0] << PAGE_SHIFT, pages.shape, "<u8")[:] = pages
    return pages


@pytest.fixture
def picky() -> Iterator[World]:
    """A pager that does not store what does not compress."""
    made = World(1024, StoreOptions(refuse_incompressible=True))
    yield made
    made.close()


def test_pages_that_refuse_do_not_end_the_search(picky: World) -> None:
    noise(picky, range(300))
    picky.fill(range(300, 1000))
    picky.pager.arm()
    picky.pager.set_limit(400 * 4096)
    shrunk = picky.pager.shrink()
    assert shrunk.over_pages == 0
    assert shrunk.evicted >= 600
    # Those that refused are still there, and were asked once.
    assert (picky.pager.states()[:300] == PageState.RESIDENT).all()
    assert picky.pager.counters()["outcomes"]["refused"] <= 300
    assert picky.pager.shrink().evicted == 0
    picky.pager.set_limit(100 * 4096)
    assert picky.pager.shrink().over_pages == 200
    assert picky.pager.counters()["outcomes"]["refused"] == 300
    assert picky.pager.shrink().over_pages == 200
    assert picky.pager.counters()["outcomes"]["refused"] == 300


def test_a_page_that_refused_is_asked_again_once_it_is_written(picky: World) -> None:
    pages = noise(picky, range(32))
    assert picky.pager.evict(range(32)).count(EvictOutcome.REFUSED) == 32
    picky.pager.set_limit(10 * 4096)
    assert (picky.pager.shrink().evicted, picky.pager.shrink().over_pages) == (0, 22)
    for gfn in (3, 17):
        in_thread(lambda gfn=gfn: picky.memory.array(gfn << PAGE_SHIFT, 512, "<u8").fill(7))
        pages[gfn] = 7
    assert (picky.pager.shrink().evicted, picky.pager.shrink().over_pages) == (2, 20)
    for gfn in range(32):
        np.testing.assert_array_equal(in_thread(picky.read, gfn), pages[gfn])


def test_faults_at_the_limit_go_on_past_pages_that_refuse(picky: World) -> None:
    noise(picky, range(400))
    pages = picky.fill(range(400, 1000))
    picky.pager.evict(range(400, 1000))
    picky.pager.set_limit(500 * 4096)
    for gfn in range(400, 1000):
        np.testing.assert_array_equal(in_thread(picky.read, gfn), pages[gfn - 400])
    counters = picky.pager.counters()
    assert counters["resident_pages"] <= 500
    assert counters["outcomes"]["refused"] <= 400
    # A fault tries 128 pages at most, and each refuses once.
    assert counters["over_limit"] <= 4


# -- older kernels ------------------------------------------------------------------


@pytest.mark.usefixtures("kernel")
def test_the_vmms_touch_of_a_lost_page_is_an_error_and_no_hang() -> None:
    world = World()
    try:
        pages = world.fill(range(8))
        world.pager.evict(range(8))
        world.pager.inject_failures(loads=1)

        def touch() -> str:
            try:
                return str(world.read(3))
            except OSError as error:
                return str(error.strerror)

        assert in_thread(touch) == in_thread(touch) == "Bad address"
        for gfn in (2, 4):
            np.testing.assert_array_equal(in_thread(world.read, gfn), pages[gfn])
        assert world.told.wait(GENEROUS_S)
        # Declared free, it is as good as new, and evicted and brought back as any other.
        assert world.pager.drop(3).dropped == 1
        assert not in_thread(world.read, 3).any()
        pages[3] = world.fill(range(3, 4))
        assert world.pager.evict([3]).count(EvictOutcome.DONE) == 1
        np.testing.assert_array_equal(in_thread(world.read, 3), pages[3])
    finally:
        world.close()


@pytest.mark.requires_kvm
def test_a_vm_ends_though_no_signal_reaches_the_vcpu_that_waits_for_a_lost_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As before Linux 6.2, where KVM's fault-in does not see signals."""
    params = {"gfn_start": 0x800, "pages": 500, "epochs": 0}
    with Machine(image_path("touch"), mem_bytes=16 << 20, engine="kvm", params=params) as machine:
        machine.memory.array(0x800 << PAGE_SHIFT, (500, 512), "<u8")[:] = 5
        machine.open_pager().evict(range(0x800, 0x800 + 500))
        machine.open_pager().inject_failures(loads=1)
        (vcpu,) = machine.vcpus
        real_kick, abandon = vcpu.kick, machine.paging.abandon
        monkeypatch.setattr(vcpu, "kick", lambda: None)

        def let_go() -> None:
            """The signal is seen once the wait for the page is over."""
            monkeypatch.setattr(vcpu, "kick", real_kick)
            abandon()

        monkeypatch.setattr(machine.paging, "abandon", let_go)
        machine.start()
        with pytest.raises(LostPageError):
            machine.wait(GENEROUS_S)
        machine.stop()
        assert not machine.running
