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
from kvmhost.trackers.harvesting import REARM

pytestmark = pytest.mark.requires_kvm

PARAMS = {"pages": 128, "hot": 32, "epochs": 0, "scan_every": 0}
CALLS: list[dict[str, Any]] = [
    {},
    {"gfn_start": 0x100},
    {"gfn_start": 0x100, "n_pages": 100},
    {"gfn_start": 0x100, "n_pages": 64, "mask": np.ones(1, np.uint64)},
    {"rearm": "none"},
    {"rearm": "sample", "fraction": 0.5},
]
WRONG: list[dict[str, Any]] = [
    {"n_pages": 1 << 40},
    {"gfn_start": 1 << 40, "n_pages": 5},
    {"gfn_start": -1, "n_pages": 5},
    {"tracker": "nonsense"},
    {"rearm": "nonsense"},
    {"n_pages": 100, "mask": np.ones(1, np.uint64)},
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
    assert client.harvest(clear=False) == before
    here = machine.harvest(**how, clear=False).young
    assert client.harvest(**how, clear=False) == here


@pytest.mark.parametrize("how", WRONG, ids=str)
def test_the_same_class_of_error(both, how) -> None:
    for side in both:
        with pytest.raises(LayoutError) as caught:
            side.harvest(**how)
        assert type(caught.value) is LayoutError


def test_the_same_arguments_and_defaults() -> None:
    here = inspect.signature(Machine.harvest).parameters
    there = inspect.signature(Client.harvest).parameters
    assert {name: there[name].default for name in here} == {
        name: parameter.default for name, parameter in here.items()
    }
    assert set(there) - set(here) == {"table_format"}
    assert str(here["rearm"].annotation) == str(there["rearm"].annotation) == "Rearm"
    assert REARM == ("none", "young", "all", "sample")
