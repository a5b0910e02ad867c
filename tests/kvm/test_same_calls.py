"""The same harvests of a machine and of a client of its socket: same pages, same errors."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from kvmhost.control.client import Client
from kvmhost.control.server import ControlServer
from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.process.attach import Attached
from kvmhost.vm import Harvest, Harvestable, HarvestRequest

pytestmark = pytest.mark.requires_kvm

PARAMS = {"pages": 128, "hot": 32, "epochs": 0, "scan_every": 0}
CALLS: list[dict[str, Any]] = [
    {},
    {"gfn_start": 0x100},
    {"gfn_start": 0x100, "n_pages": 100},
    {"gfn_start": 0x100, "n_pages": 64, "mask": np.ones(1, np.uint64)},
    {"rearm": "none"},
    {"rearm": "sample", "fraction": 0.5},
    {"table_format": "stage2"},
]
WRONG: list[dict[str, Any]] = [
    {"n_pages": 1 << 40},
    {"gfn_start": 1 << 40, "n_pages": 5},
    {"gfn_start": -1, "n_pages": 5},
    {"tracker": "nonsense"},
    {"rearm": "nonsense"},
    {"n_pages": -1},
    {"n_pages": 100, "mask": np.ones(1, np.uint64)},
    {"n_pages": 64, "mask": np.ones(1, bool)},
    {"n_pages": 64, "mask": [1]},
    {"mask": np.ones(1, np.uint64)},
    {"fraction": 0.5},
    {"rearm": "sample", "fraction": 2.0},
    {"table_format": "nonsense"},
]


@pytest.fixture
def both(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    with Machine(image_path("hotcold"), mem_bytes=6 << 20, params=PARAMS) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        server = ControlServer(machine, name="same")
        server.start()
        try:
            with Client("same") as client:
                yield machine, client
        finally:
            server.close()


@pytest.mark.parametrize("how", CALLS, ids=str)
def test_the_same_pages(both, how) -> None:
    machine, client = both
    machine.harvest()
    machine.run_epoch()
    before = machine.harvest(clear=False).young
    assert before
    assert client.harvest(clear=False).young == before
    here, there = machine.harvest(**how, clear=False), client.harvest(**how, clear=False)
    assert type(here) is type(there) is Harvest
    assert there.young == here.young
    assert there.young.provenance.table_format == here.young.provenance.table_format


@pytest.mark.parametrize("how", WRONG, ids=str)
def test_the_same_error(both, how) -> None:
    found = []
    for side in both:
        with pytest.raises(LayoutError) as caught:
            side.harvest(**how)
        found.append((type(caught.value), str(caught.value), caught.value.field))
    assert found[0] == found[1]
    assert both[0].tracker_name is None, "what is refused starts no tracker"


def test_one_list_of_arguments() -> None:
    assert Machine.harvest is Client.harvest is Attached.harvest is Harvestable.harvest
    asked = inspect.signature(HarvestRequest).parameters
    taken = inspect.signature(Machine.harvest).parameters
    assert list(asked) == list(taken)[1:]
    assert all(taken[name].default == asked[name].default for name in asked)
