"""One guest, looked at through every table format: the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from kvmhost.bitmap import pack
from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns, touch_gfns
from kvmhost.machine import Machine
from kvmhost.mmu.feed import Feed

MEM_BYTES = 48 << 20
START, PAGES = 1029, 2043
FORMATS = ("npt", "ept", "stage2", "radix")
TRACKERS = [
    pytest.param("kvm", "guestpt", marks=pytest.mark.requires_kvm),
    pytest.param("kvm", "pagemap", marks=[pytest.mark.requires_kvm, pytest.mark.requires_uffd]),
    pytest.param("kvm", "uffd", marks=[pytest.mark.requires_kvm, pytest.mark.requires_uffd]),
    pytest.param("kvm", "dirty", marks=pytest.mark.requires_kvm),
    pytest.param("emulated", "guestpt"),
    pytest.param("emulated", "pagemap", marks=pytest.mark.requires_uffd),
]


def machine_of(engine: str, guest: str, n_vcpus: int = 1, **params: int) -> Machine:
    given = {"gfn_start": START, "pages": PAGES, "epochs": 0} | params
    machine = Machine(
        image_path(guest), mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=given
    )
    machine.step_by_doorbell()
    return machine


@pytest.mark.parametrize(("engine", "tracker"), TRACKERS)
def test_all_formats_agree_with_the_tracker_and_the_prediction(engine: str, tracker: str) -> None:
    params = {"pattern": 2, "count": 300, "write": int(tracker == "dirty")}
    with machine_of(engine, "touch", **params) as machine:
        used = machine.use_tracker(tracker)
        feeds = {name: Feed(name, machine.memory.regions) for name in FORMATS}
        for epoch in range(5):
            assert machine.run_epoch()
            own = used.harvest(START - 500, PAGES + 1000)
            used.rearm(START - 500, PAGES + 1000, own)
            assert own.gfns().tolist() == touch_gfns(machine.params, epoch).tolist()
            for name, feed in feeds.items():
                found = feed.harvest_via_model(own)
                assert np.array_equal(found.words, own.words), name
                assert found.provenance.tracker == tracker
                assert found.provenance.table_format == f"{name}-model"
        for feed in feeds.values():
            feed.close()


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
def test_windows_of_the_walkers_agree_over_many_epochs() -> None:
    """Bits add up in the tables; walkers clear with masks, and must still agree."""
    params = {"hot": 400, "cold": 60, "scan_every": 3, "scan_epochs": 2}
    rng = np.random.default_rng(11)
    with machine_of("kvm", "hotcold", 2, **params) as machine:
        used = machine.use_tracker("pagemap")
        feeds = {name: Feed(name, machine.memory.regions) for name in FORMATS}
        expected = np.zeros(PAGES, dtype=bool)
        for epoch in range(10):
            assert machine.run_epoch()
            own = used.harvest(START, PAGES)
            expected[hotcold_gfns(machine.params, epoch, 2) - START] = True
            asked = rng.random(PAGES) < 0.3
            answers = []
            for feed in feeds.values():
                feed.feed(own)
                answers.append(feed.table.harvest(START, PAGES, True, pack(asked)))
            # hotcold keeps a list beside its range, of which a page may lie in it: its own
            # pages are what is predicted.
            inside = hotcold_gfns(machine.params, 0, 2) - START
            for answer in answers:
                assert np.array_equal(answer.words, answers[0].words)
                assert np.array_equal(answer.as_bool()[inside], expected[inside])
            expected &= ~asked
        for feed in feeds.values():
            feed.close()
