"""KVM_RUN that fails with EFAULT: a typed exit, after which the machine goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from waiting import DEADLINE_S, until

from kvmhost._ffi import lib
from kvmhost.engine.kvm import KvmEngine
from kvmhost.errors import UnexpectedExit
from kvmhost.exits import IoOut, Kicked, MemoryFault
from kvmhost.guests import image_path
from kvmhost.machine import Machine

pytestmark = [pytest.mark.requires_kvm, pytest.mark.usefixtures("nothing_left")]

MIB = 1 << 20
FIRST = 1024 << 12
Make = Callable[..., Machine]


def toucher(make_vm: Make, n_vcpus: int = 1, **params: int) -> Machine:
    """Return a guest that touches [4 MiB, 8 MiB) for ever."""
    params = {"gfn_start": 1024, "pages": 1024, "write": 1, "epochs": 0} | params
    return make_vm(
        image_path("touch"), mem_bytes=16 * MIB, engine="kvm", n_vcpus=n_vcpus, params=params
    )


def epochs_pass(machine: Machine) -> None:
    """Wait until every vCPU has rung its doorbell again."""
    before = [vcpu.doorbells for vcpu in machine.vcpus]
    until(
        lambda: all(v.doorbells > b for v, b in zip(machine.vcpus, before, strict=True)),
        "epochs pass",
    )


@pytest.mark.parametrize(("write", "access"), [(1, "read"), (1, "none"), (0, "none")])
def test_a_fault_is_located_and_the_guest_goes_on(make_vm: Make, write: int, access: str) -> None:
    machine = toucher(make_vm, n_vcpus=2, write=write)
    machine.waits_in_memory_faults = True
    (region,) = machine.memory.regions
    machine.start()
    epochs_pass(machine)
    region.protect(FIRST + MIB, MIB, access)
    assert machine.wait_for_memory_faults(DEADLINE_S)
    faults = machine.memory_faults
    assert sorted(faults) == [0, 1]
    for index, fault in faults.items():
        assert fault.gpa is not None
        assert FIRST + MIB <= fault.gpa < FIRST + 2 * MIB
        assert fault.gpa >> 12 & 1 == index, "vCPU v takes every page with page % 2 == v"
        assert fault.hva == region.guest_address + fault.gpa
        assert fault.is_write is bool(write)
        assert fault.rip == machine.vcpus[index].registers()["rip"]
    region.protect(FIRST + MIB, MIB, "write")
    assert machine.memory_faults == faults, "they wait until the retry"
    machine.retry_memory_faults()
    epochs_pass(machine)
    assert not machine.memory_faults


def test_a_machine_whose_vcpus_wait_in_faults_can_be_paused_and_stopped(make_vm: Make) -> None:
    machine = toucher(make_vm, n_vcpus=2)
    machine.waits_in_memory_faults = True
    machine.start()
    epochs_pass(machine)
    machine.memory.regions[0].protect(FIRST, 4 * MIB, "read")
    assert machine.wait_for_memory_faults(DEADLINE_S)
    assert machine.pause(DEADLINE_S).paused
    machine.resume()
    assert not machine.stop().running


def test_a_retry_too_early_waits_again(make_vm: Make) -> None:
    machine = toucher(make_vm)
    machine.waits_in_memory_faults = True
    machine.start()
    epochs_pass(machine)
    machine.memory.regions[0].protect(FIRST, 4 * MIB, "read")
    assert machine.wait_for_memory_faults(DEADLINE_S)
    assert isinstance(machine.engine, KvmEngine)
    before = machine.engine.cores[0].core.faults
    machine.retry_memory_faults()
    until(lambda: machine.engine.cores[0].core.faults > before, "a second fault")
    assert machine.wait_for_memory_faults(DEADLINE_S)


def test_without_waiting_the_error_names_the_place(make_vm: Make) -> None:
    machine = toucher(make_vm)
    machine.start()
    epochs_pass(machine)
    machine.memory.regions[0].protect(FIRST + MIB, 4096, "read")
    with pytest.raises(UnexpectedExit, match=r"memory fault: write of gpa 0x500000 \(host "):
        machine.wait(DEADLINE_S)


def test_a_vacated_range_faults_and_comes_back_with_its_data(make_vm: Make) -> None:
    machine = toucher(make_vm)
    machine.waits_in_memory_faults = True
    (region,) = machine.memory.regions
    machine.start()
    epochs_pass(machine)
    region.vacate(FIRST + MIB, MIB)
    assert machine.wait_for_memory_faults(DEADLINE_S)
    assert machine.memory_faults[0].gpa == FIRST + MIB
    page = bytes(machine.memory[FIRST + MIB : FIRST + MIB + 8])
    assert int.from_bytes(page, "little") == (FIRST + MIB) >> 12, "the alias has the data"
    region.remap(FIRST + MIB, MIB)
    machine.retry_memory_faults()
    epochs_pass(machine)


def test_the_bare_vcpu_returns_an_undescribed_fault_again_and_again(make_vm: Make) -> None:
    machine = toucher(make_vm)
    machine.step_by_doorbell()
    assert machine.run_epoch(DEADLINE_S)
    assert isinstance(machine.engine, KvmEngine)
    (core,) = machine.engine.cores
    machine.memory.regions[0].protect(FIRST, 4 * MIB, "read")
    with machine.stopped_vcpus():
        core.core.stop_at_doorbell = 1
        # The stop left a kick behind.
        runs = (core.run(machine.bus.core) for _ in itertools.count())
        found = list(itertools.islice((e for e in runs if not isinstance(e, Kicked)), 3))
        assert core.core.faults == 3
        machine.memory.regions[0].protect(FIRST, 4 * MIB, "write")
        assert isinstance(core.run(machine.bus.core), IoOut)
    # Linux on x86 describes no fault of this kind; the engine adds what the instruction tells.
    assert found == [MemoryFault()] * 3


def test_faulting_stores_are_skipped_in_c(make_vm: Make) -> None:
    import capstone

    machine = toucher(make_vm, epochs=3)
    machine.waits_in_memory_faults = True
    assert isinstance(machine.engine, KvmEngine)
    (core,) = machine.engine.cores
    (region,) = machine.memory.regions
    region.protect(FIRST, 4 * MIB, "read")
    machine.start()
    assert machine.wait_for_memory_faults(DEADLINE_S)
    rip = machine.memory_faults[0].rip
    assert rip is not None
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    _, size, _, _ = next(decoder.disasm_lite(bytes(machine.memory[rip : rip + 15]), rip, 1))
    lib.kh_vcpu_skip_faults(core.core, rip, size)
    machine.retry_memory_faults()
    assert machine.wait(DEADLINE_S) == 0
    # The first store faulted once more, when it returned.
    assert core.core.faults == 1 + 3 * 1024
    assert not any(machine.memory[FIRST : FIRST + 4 * MIB]), "no store arrived"
