"""Harvests between doorbell epochs equal the sets computed from a guest's parameters."""

from __future__ import annotations

import numpy as np
import pytest

from kvmhost.bitmap import YoungBitmap, n_words, pack
from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns, touch_gfns
from kvmhost.machine import Machine
from kvmhost.trackers.calibration import calibrate

MEM_BYTES = 48 << 20
START, PAGES = 1024, 2048

PATTERNS = {
    "reads": {},
    "writes": {"write": 1},
    "every-3rd": {"stride": 3},
    "every-64th-write": {"stride": 64, "write": 1},
    "backwards": {"pattern": 1},
    "backwards-every-2nd": {"pattern": 1, "stride": 2},
    "random": {"pattern": 2, "count": 300, "seed": 7},
    "random-writes": {"pattern": 2, "count": 700, "seed": 8, "write": 1},
}

COMBINATIONS = [
    pytest.param("kvm", "guestpt", marks=pytest.mark.requires_kvm),
    pytest.param("kvm", "pagemap", marks=[pytest.mark.requires_kvm, pytest.mark.requires_uffd]),
    pytest.param("emulated", "guestpt"),
    pytest.param("emulated", "pagemap", marks=pytest.mark.requires_uffd),
]


def touch_machine(engine: str, n_vcpus: int = 1, **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 0} | params
    machine = Machine(
        image_path("touch"), mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=given
    )
    machine.step_by_doorbell()
    return machine


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("engine", "tracker"), COMBINATIONS)
def test_bitmap_equals_prediction(engine: str, tracker: str, pattern: str) -> None:
    with touch_machine(engine, **PATTERNS[pattern]) as machine:
        used = machine.use_tracker(tracker)
        for epoch in range(3):
            assert machine.run_epoch()
            expected = touch_gfns(machine.params, epoch)
            # Beyond the range on both sides too: nothing else may look touched.
            young = used.harvest(START - 512, PAGES + 1024)
            used.rearm(START - 512, PAGES + 1024, young)
            assert young.gfns().tolist() == expected.tolist()
            assert young.provenance.tracker == tracker
            calibrated = str(calibrate(machine.engine)) if tracker == "guestpt" else ""
            assert young.provenance.evidence == calibrated
            assert young.coarse is None


@pytest.mark.parametrize(("engine", "tracker"), COMBINATIONS)
@pytest.mark.parametrize("n_vcpus", [1, 2])
def test_hotcold_epochs(engine: str, tracker: str, n_vcpus: int) -> None:
    params = {"pages": 3001, "hot": 400, "scan_every": 4, "scan_epochs": 2, "epochs": 0}
    image = image_path("hotcold")
    with Machine(
        image, mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=params
    ) as machine:
        machine.step_by_doorbell()
        used = machine.use_tracker(tracker)
        for epoch in range(6):
            assert machine.run_epoch()
            young = used.harvest(machine.params["gfn_start"], 3001)
            used.rearm(machine.params["gfn_start"], 3001, young)
            expected = hotcold_gfns(machine.params, epoch, n_vcpus)
            assert young.gfns().tolist() == expected.tolist()


@pytest.mark.parametrize(("engine", "tracker"), COMBINATIONS)
def test_clear_false_keeps_everything(engine: str, tracker: str) -> None:
    with touch_machine(engine, stride=5) as machine:
        used = machine.use_tracker(tracker)
        machine.run_epoch()
        first = used.harvest(START, PAGES, clear=False)
        second = used.harvest(START, PAGES, clear=False)
        assert first.gfns().tolist() == touch_gfns(machine.params, 0).tolist()
        assert first == second
        assert used.harvest(START, PAGES, clear=True) == first
        assert used.harvest(START, PAGES).count() == 0


@pytest.mark.parametrize(("engine", "tracker"), COMBINATIONS)
def test_mask_clears_only_what_is_asked(engine: str, tracker: str) -> None:
    with touch_machine(engine) as machine:
        used = machine.use_tracker(tracker)
        machine.run_epoch()
        asked = np.zeros(PAGES, dtype=bool)
        asked[np.random.default_rng(3).choice(PAGES, 700, replace=False)] = True
        everything = used.harvest(START, PAGES, mask=pack(asked))
        assert everything.count() == PAGES
        left = used.harvest(START, PAGES, clear=False)
        assert np.array_equal(left.as_bool(), ~asked)


@pytest.mark.requires_kvm
def test_clearing_without_rearming_goes_stale() -> None:
    with touch_machine("kvm") as machine:
        used = machine.use_tracker("guestpt")
        machine.run_epoch()
        assert used.harvest(START, PAGES).count() == PAGES
        machine.run_epoch()
        stale = used.harvest(START, PAGES)
        from kvmhost.engine.base import RearmKind

        if used.rearm_kind is RearmKind.NONE:
            pytest.skip("hardware walks the tables here: bits come back without re-arming")
        assert stale.count() == 0
        # What was cleared stays pending: re-arming "the young ones" covers it.
        used.rearm(START, PAGES, stale)
        machine.run_epoch()
        assert used.harvest(START, PAGES).count() == PAGES


@pytest.mark.requires_kvm
def test_rearming_young_pages_is_as_exact_as_rearming_all() -> None:
    with touch_machine("kvm", pattern=2, count=200) as machine:
        used = machine.use_tracker("guestpt")
        for epoch in range(12):
            machine.run_epoch()
            young = used.harvest(START, PAGES)
            used.rearm(START, PAGES, young if epoch % 3 else None)
            assert young.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()


@pytest.mark.requires_kvm
def test_wire_form_agrees_with_array_form_on_a_live_guest() -> None:
    rng = np.random.default_rng(11)
    with touch_machine("kvm", pattern=2, count=900) as machine:
        used = machine.use_tracker("guestpt")
        region = machine.memory.regions[0]
        for _ in range(8):
            machine.run_epoch()
            first = int(rng.integers(0, START + PAGES))
            n_pages = int(rng.integers(1, 3000))
            array = used.harvest(first, n_pages, clear=False)
            hva = region.guest_address + first * 4096
            # Zeros only test: each young page flips its bit to 1, from the end backwards.
            wire = np.zeros(n_words(n_pages), dtype=np.uint64)
            used.table.test_clear_young(hva, hva + n_pages * 4096, wire)
            mirrored = YoungBitmap(first, n_pages, wire).as_bool()[::-1]
            assert np.array_equal(mirrored, array.as_bool())
            assert used.harvest(first, n_pages, clear=False) == array
            # Ones test and clear: each young page flips its bit to 0.
            wire = pack(np.ones(n_pages, dtype=bool))
            used.table.test_clear_young(hva, hva + n_pages * 4096, wire)
            assert np.array_equal(
                ~YoungBitmap(first, n_pages, wire).as_bool()[::-1], array.as_bool()
            )
            assert used.harvest(first, n_pages, clear=False).count() == 0
            used.rearm(0, machine.memory.gfn_end)
            used.harvest(0, machine.memory.gfn_end)


@pytest.mark.requires_kvm
@pytest.mark.parametrize("tracker", ["guestpt", "pagemap"])
def test_the_whole_vm_may_be_asked_for_and_no_page_more(tracker: str) -> None:
    with touch_machine("kvm") as machine:
        used = machine.use_tracker(tracker)
        machine.run_epoch()
        gfn_end = machine.memory.gfn_end
        with pytest.raises(LayoutError, match=f"memory ends at gfn {gfn_end:#x}"):
            used.harvest(0, gfn_end + 1)
        young = used.harvest(0, gfn_end)
        assert set(touch_gfns(machine.params, 0).tolist()) <= set(young.gfns().tolist())


@pytest.mark.requires_uffd
@pytest.mark.requires_kvm
def test_plain_pagemap_reads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMHOST_PLAIN_PAGEMAP", "1")
    with touch_machine("kvm", pattern=2, count=333) as machine:
        used = machine.use_tracker("pagemap")
        assert not used.scans
        machine.run_epoch()
        young = used.harvest(START, PAGES)
        assert young.gfns().tolist() == touch_gfns(machine.params, 0).tolist()


@pytest.mark.requires_kvm
def test_dirty_bits_follow_writes() -> None:
    with touch_machine("kvm", stride=2, write=1) as machine:
        used = machine.use_tracker("guestpt")
        machine.run_epoch()
        dirty = used.table.harvest_dirty(START, PAGES)
        assert dirty.gfns().tolist() == touch_gfns(machine.params, 0).tolist()
    with touch_machine("kvm", stride=2) as machine:
        used = machine.use_tracker("guestpt")
        machine.run_epoch()
        assert used.table.harvest_dirty(START, PAGES).count() == 0
