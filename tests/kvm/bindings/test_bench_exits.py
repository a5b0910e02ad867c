"""``kvmhost bench exits``: every way sees every write, and two of them spare the exit."""

from __future__ import annotations

import os

import pytest
from waiting import DEADLINE_S

from kvmhost.engine.kvm import KvmEngine
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.tools.bench import exits

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_cap("COALESCED_PIO")]

PORT, COUNT = 0x600, 400


def test_every_way_is_measured() -> None:
    # Each way checks by itself that it saw as many writes as the guest made.
    result = exits.run(count=COUNT, rounds=1)
    ways = {"minimal C loop", "C run loop", "Python device", "ioeventfd", "coalesced"}
    assert set(result["ns_per_exit"]) == ways
    assert all(ns > 0 for ns in result["ns_per_exit"].values())


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
