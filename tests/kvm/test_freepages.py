"""Pages that the guest declares free: zeros from then on, and nobody else's data."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost.devices.bus import FREE_PORT
from kvmhost.devices.freelist import MAX_RANGES
from kvmhost.errors import LostPageError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.pager.results import EvictOutcome, PageState
from kvmhost.units import PAGE_BYTES

ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
START, PAGES = 2048, 3000


def freepages(engine: str, n_vcpus: int = 1, **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 3}
    return Machine(
        image_path("freepages"),
        mem_bytes=32 << 20,
        engine=engine,
        n_vcpus=n_vcpus,
        params=given | params,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_pager_the_memory_goes_back(engine: str) -> None:
    with freepages(engine, epochs=1) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        full = machine.memory.resident()
        machine.run_epoch()
        freed = full & ~machine.memory.resident()
        (device, _) = machine.bus.port_handler(FREE_PORT) or (None, 0)
        assert freed.sum() == device.dropped_pages
        assert 0.4 * PAGES < device.dropped_pages < 0.6 * PAGES
        assert not freed[:START].any()
        assert not machine.has_pager
        while machine.run_epoch():
            pass
        assert machine.wait(DEADLINE_S) == 0


@pytest.mark.requires_uffd
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_vcpus", [1, 2])
def test_pages_declared_free_while_others_are_evicted(engine: str, n_vcpus: int) -> None:
    with freepages(engine, n_vcpus) as machine:
        machine.open_pager().set_limit(1200 * 4096)
        machine.start()
        assert machine.wait(DEADLINE_S) == 0, machine.result()
        counters = machine.open_pager().counters()
        assert counters["dropped_pages"] > PAGES
        assert counters["dropped_evicted_pages"] > 100
        assert counters["lost_pages"] == counters["errors"] == 0
        resident = counters["resident_pages"]
        assert resident * PAGE_BYTES == machine.memory.resident_bytes()


@pytest.mark.requires_uffd
@pytest.mark.requires_kvm
def test_all_evicted_between_declaration_and_check() -> None:
    with freepages("kvm", n_vcpus=2) as machine:
        machine.step_by_doorbell()
        more = True
        while more:
            more = machine.run_epoch()
            result = machine.open_pager().evict(np.arange(START, START + PAGES))
            assert result.count(EvictOutcome.ERROR) == 0
        assert machine.wait(DEADLINE_S) == 0, machine.result()


@pytest.mark.requires_uffd
def test_dropping_by_state() -> None:
    """Resident, evicted, fresh and pinned pages; the neighbours keep their bytes."""
    with Machine(image_path("hello"), mem_bytes=16 << 20, engine="emulated") as machine:
        gfn = 0x400
        pages = machine.memory.array(gfn * PAGE_BYTES, (64, 512), "<u8")
        pages[:] = np.arange(1, 64 * 512 + 1).reshape(64, 512)
        machine.open_pager().evict(np.arange(gfn, gfn + 32))
        resident = machine.open_pager().counters()["resident_pages"]
        assert machine.drop(gfn + 16, 32).dropped_pages == 32
        states = machine.open_pager().states()[gfn : gfn + 64]
        expected = [PageState.EVICTED] * 16 + [PageState.FRESH] * 32 + [PageState.RESIDENT] * 16
        assert states.tolist() == expected
        counters = machine.open_pager().counters()
        assert (counters["evicted_pages"], counters["dropped_evicted_pages"]) == (16, 16)
        assert counters["resident_pages"] == resident - 16
        assert not pages[16:48].any()
        assert (pages[48:] == np.arange(1, 64 * 512 + 1).reshape(64, 512)[48:]).all()
        assert (pages[:16] == np.arange(1, 64 * 512 + 1).reshape(64, 512)[:16]).all()
        assert machine.drop(gfn + 16, 32).dropped_pages == 32
        assert machine.drop(1, 1).dropped_pages == 0  # the parameter page is pinned
        del pages


@pytest.mark.parametrize("armed", [False, pytest.param(True, marks=pytest.mark.requires_uffd)])
def test_a_list_that_lies_harms_only_itself(armed: bool) -> None:
    with Machine(image_path("hello"), mem_bytes=16 << 20, engine="emulated") as machine:
        if armed:
            machine.open_pager().arm()
        device, _ = machine.bus.port_handler(FREE_PORT) or (None, 0)
        gpa = 0x400 * PAGE_BYTES
        machine.memory[gpa + PAGE_BYTES : gpa + 2 * PAGE_BYTES] = b"\x07" * PAGE_BYTES
        before = bytes(machine.memory[0x1000:0x2000])
        ranges = [(0, 1 << 63), (1, 1), (0x401, 1), (1 << 52, 1), (0x402, 0), (0xFFF, 2)]
        body = struct.pack("<4Q", len(ranges), 9, 9, 0)
        body += b"".join(struct.pack("<2Q", *r) for r in ranges)
        machine.memory[gpa : gpa + len(body)] = body
        device.write(0, 4, 0x400)
        n, dropped, kept, _ = struct.unpack("<4Q", machine.memory[gpa : gpa + 32])
        assert (n, dropped) == (len(ranges), 1)
        assert kept == (1 << 63) + 1 + 1 + 2
        assert bytes(machine.memory[0x1000:0x2000]) == before
        assert not any(machine.memory[gpa + PAGE_BYTES : gpa + 2 * PAGE_BYTES])
        # The same range over and over, to keep the host busy: it is worked off once.
        whole = (0x400, machine.memory.regions[0].n_pages - 0x400)
        body = struct.pack("<4Q", 254, 0, 0, 0) + struct.pack("<2Q", *whole) * 254
        machine.memory[0x300 * PAGE_BYTES : 0x300 * PAGE_BYTES + len(body)] = body
        device.write(0, 4, 0x300)
        _, dropped, kept, _ = struct.unpack("<4Q", machine.memory[0x300000:0x300020])
        assert dropped + kept == 254 * whole[1]
        assert dropped <= machine.memory.n_pages
        # A count beyond the page, and lists that are not in memory at all.
        machine.memory[gpa : gpa + 8] = struct.pack("<Q", 1 << 40)
        device.write(0, 4, 0x400)
        device.write(0, 4, 0xFFFFFFFF)
        assert device.lists == 3
        assert MAX_RANGES == 254


@pytest.mark.requires_uffd
def test_a_list_that_is_lost_is_a_machine_check() -> None:
    with Machine(image_path("hello"), mem_bytes=16 << 20, engine="emulated") as machine:
        device, _ = machine.bus.port_handler(FREE_PORT) or (None, 0)
        machine.memory[0x400000:0x400018] = struct.pack("<3Q", 1, 2, 3)
        machine.open_pager().evict([0x400])
        machine.open_pager().inject_failures(loads=1)
        with pytest.raises(LostPageError, match="gfn 0x400"):
            device.write(0, 4, 0x400)
        with pytest.raises(LostPageError, match="gfn 0x400"):
            device.write(0, 4, 0x400)
