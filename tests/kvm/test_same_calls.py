"""The same calls of a machine and of a client of its socket: same results, same errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from kvmhost.control.client import Client
from kvmhost.control.server import ControlServer
from kvmhost.errors import KvmHostError, LayoutError
from kvmhost.guests import image_path
from kvmhost.machine import BaseMachine, Machine
from kvmhost.machine.pc import PcMachine
from kvmhost.process.attach import Attached
from kvmhost.vm import Harvest, Harvestable, HarvestRequest
from kvmhost.vm.answers import RearmCost, VmState
from kvmhost.vm.protocol import Vm, YoungSource

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


# -- all of Vm -------------------------------------------------------------------

GFN = 0x180
#: Calls by what they show; each is made on a machine, then on its client.
SAME: dict[str, Callable[[Vm], Any]] = {
    "memory map": lambda vm: vm.memory_map(),
    "page": lambda vm: vm.page(GFN),
    "resident": lambda vm: vm.resident().tolist(),
    "a part": lambda vm: vm.resident(GFN, 10).tolist(),
    "evict nothing": lambda vm: vm.evict([], each=True),
    "evict and restore": lambda vm: (vm.evict([GFN, GFN + 1], each=True), vm.restore(GFN, 8)),
    "evict a pinned page": lambda vm: vm.evict([vm.memory_map().pinned[0].gfn_start]),
    "drain": lambda vm: (vm.evict([GFN]), vm.drain()),
    "limit": lambda vm: (vm.set_limit(1 << 20), vm.state().resident_max_bytes, vm.set_limit(0)),
    "shrink": lambda vm: (vm.shrink(6 << 20), vm.drain()),
    "victims": lambda vm: vm.set_victims([GFN, GFN + 1]),
    "view": lambda vm: (vm.harvest(view="a").young, vm.close_view("a"), vm.close_view("a")),
    "cost of re-arming": lambda vm: (vm.harvest().n_young, _without_age(vm.rearm_cost())),
    "pause": lambda vm: (vm.pause().paused, vm.state().paused, vm.resume()),
}


def _without_age(cost: RearmCost) -> RearmCost:
    return msgspec.structs.replace(cost, age_s=0.0)


REFUSED: dict[str, Callable[[Vm], Any]] = {
    "cost without a tracker": lambda vm: vm.rearm_cost(),
    "page of no memslot": lambda vm: vm.page(1 << 30),
    "page below 0": lambda vm: vm.page(-1),
    "resident beyond": lambda vm: vm.resident(0, 1 << 40),
    "resident below 0": lambda vm: vm.resident(-1),
    "evict beyond": lambda vm: vm.evict([GFN, 1 << 40]),
    "evict to nowhere": lambda vm: vm.evict([GFN], actuator="tape"),  # type: ignore[arg-type]
    "restore beyond": lambda vm: vm.restore(1 << 40),
    "restore no pages": lambda vm: vm.restore(GFN, 0),
    "restore below 0": lambda vm: vm.restore(-1, 2),
    "limit of a byte": lambda vm: vm.set_limit(1),
    "limit below 0": lambda vm: vm.set_limit(-4096),
    "shrink to a byte": lambda vm: vm.shrink(1),
    "view of no name": lambda vm: vm.close_view("a/b"),
    "victims beyond": lambda vm: vm.set_victims([1 << 40]),
    "snapshot in no directory": lambda vm: vm.snapshot("/nowhere/at/all.snap"),
    "snapshot over a device": lambda vm: vm.snapshot("/dev/null"),
}


@pytest.mark.requires_uffd
@pytest.mark.parametrize("name", SAME)
def test_the_same_results(both, name: str) -> None:
    machine, client = both
    machine.set_limit(0)
    here, there = SAME[name](machine), SAME[name](client)
    assert type(here) is type(there)
    assert here == there


@pytest.mark.requires_uffd
@pytest.mark.parametrize("name", REFUSED)
def test_the_same_refusals(both, name: str) -> None:
    found = []
    for vm in both:
        with pytest.raises(KvmHostError) as caught:
            REFUSED[name](vm)
        error = caught.value
        found.append((type(error), str(error), {**vars(error)}))
    assert found[0] == found[1]


def test_state_and_counters_have_the_same_fields(both) -> None:
    machine, client = both
    here, there = machine.state(), client.state()
    assert type(here) is type(there) is VmState
    differ = {
        name for name in here.__struct_fields__ if getattr(here, name) != getattr(there, name)
    }
    # The server has its own name for the VM; the process may gain a page in between.
    assert differ <= {"name", "uptime_s", "resident_bytes"}
    assert type(machine.counters()) is type(client.counters())


def test_both_are_vms_and_a_process_can_be_harvested() -> None:
    assert issubclass(Machine, Vm)
    assert issubclass(PcMachine, Vm)
    assert issubclass(Client, Vm)
    assert issubclass(Attached, YoungSource)
    assert not issubclass(Attached, Vm)


#: Arguments that only one side has: what holds a pause that its client forgets, what waits.
OWN = {
    "close_view": {"owner"},
    "evict": {"event"},
    "pause": {"for_s", "timeout_s"},
    "resume": {"pause"},
    "drain": {"force"},
    "snapshot": {"cancelled"},
}


@pytest.mark.parametrize("name", sorted(n for n in dir(Vm) if not n.startswith("_")))
def test_arguments_and_defaults_of_the_protocol(name: str) -> None:
    told = inspect.signature(getattr(Vm, name)).parameters
    for side in (Machine, PcMachine, Client):
        taken = inspect.signature(getattr(side, name)).parameters
        assert set(taken) - set(told) <= OWN.get(name, set())
        for argument, parameter in told.items():
            assert taken[argument].default == parameter.default
            assert taken[argument].kind == parameter.kind


def test_kinds_of_machines_take_the_same_arguments() -> None:
    for name in dir(BaseMachine):
        base = getattr(BaseMachine, name)
        if name.startswith("_") or not inspect.isfunction(base):
            continue
        for kind in (Machine, PcMachine):
            taken = inspect.signature(getattr(kind, name)).parameters
            assert list(taken) == list(inspect.signature(base).parameters), name
