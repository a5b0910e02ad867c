"""``kvmhost bench exits``: every way sees every write, and two of them spare the exit."""

from __future__ import annotations

import os
import typing

import pytest
from json_page import checked
from waiting import DEADLINE_S

from kvmhost.engine.kvm import KvmEngine
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.tools.bench import exits
from kvmhost.tools.outputs.bench import MethodName

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_cap("COALESCED_PIO")]

PORT, COUNT = 0x600, 400


def test_every_way_is_measured() -> None:
    # Each way checks by itself that it saw as many writes as the guest made.
    result = exits.run(count=COUNT, rounds=1)
    assert [row.method for row in result.methods] == list(typing.get_args(MethodName))
    assert all(row.ns_per_exit > 0 for row in result.methods)
    assert result.methods[0].of_minimal_ratio == 1


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.main(["--exits", "200", "--rounds", "1", "--json"]) == 0
    (found,) = checked("bench exits", capsys.readouterr().out)
    assert found["parameters"] == {"exits": 200, "rounds": 1}


@pytest.mark.requires_cap("IOEVENTFD")
@pytest.mark.parametrize("kernel", [False, True])
def test_writes_that_end_in_the_kernel_are_no_exits(kernel: bool) -> None:
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    params = {"port": PORT, "count": COUNT}
    with Machine(image_path("portout"), mem_bytes=4 << 20, engine="kvm", params=params) as machine:
        assert isinstance(machine.engine, KvmEngine)
        counter = exits._Counter()
        machine.bus.add_port(PORT, 4, counter)
        if kernel:
            machine.engine.vm.ioeventfd(bell, PORT, 4, port=True)
        machine.start()
        assert machine.wait(DEADLINE_S) == 0
        assert machine.vcpus[0].exits == (1 if kernel else COUNT + 1)
        assert counter.writes == (0 if kernel else COUNT)
        if kernel:
            assert os.eventfd_read(bell) == COUNT
    os.close(bell)
