"""What the pager does when the kernel, the store or the host fails it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvmhost._ffi import lib
from kvmhost.errors import IoctlError, LostPageError, PagerError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.memory.guest import GuestMemory
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.pager import Pager
from kvmhost.pager.results import EvictOutcome, PageState
from kvmhost.pager.userfault import Userfault
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
    params = {"start_gfn": 0x800, "pages": 2000, "epochs": 3}
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
