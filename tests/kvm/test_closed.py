"""What is closed, or was never started, answers every public call with one clear error.

The calls are found by inspection, so that a new method is tried as well. A crash of the
interpreter ends the whole run; that is the failure that these tests are about.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from young_model import SECOND, Window, write

from kvmhost.bitmap import YoungBitmap
from kvmhost.boot.loaders import load_image
from kvmhost.control.client import Client
from kvmhost.control.schema import LeaseRequest
from kvmhost.errors import CapabilityError, IoctlError, LayoutError, StateError
from kvmhost.exits import IoIn, IoOut, MemoryFault, MmioRead
from kvmhost.guests import image_path
from kvmhost.kvm import System
from kvmhost.kvm.structs import Struct
from kvmhost.machine import Machine
from kvmhost.machine.pc import PcMachine
from kvmhost.memory.guest import GuestMemory
from kvmhost.pager.pager import Pager
from kvmhost.reclaim.record.meta import RecordSession
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.writer import RecordWriter
from kvmhost.trackers import NAMES, create
from kvmhost.vm import HarvestRequest

pytestmark = pytest.mark.requires_kvm

PAGES = 64


def fake_vcpu() -> Any:
    nothing = lambda *given: None  # noqa: E731
    return types.SimpleNamespace(index=0, complete_read=nothing, registers=dict)


SCRATCH = tempfile.TemporaryDirectory(prefix="kvmhost-test-")
#: A value for each required parameter: by name, else by annotation.
BY_NAME: dict[str, Callable[[], Any]] = {
    "edges": lambda: [0, 1],
    "error": lambda: ValueError("made up"),
    "gfn": lambda: 1,
    "gfn_start": lambda: 0,
    "index": lambda: 0,
    "level": lambda: 9,
    "name": lambda: "auto",
    "path": lambda: f"{SCRATCH.name}/file",
    "resident_max_bytes": lambda: 1 << 20,
    "vcpu": lambda: 0,
    "region": lambda: types.SimpleNamespace(gpa=0, guest_address=0, n_bytes=4096),
    "status": lambda: 0,
    "words": lambda: np.zeros(1 << 16, np.uint64),
    "command": lambda: Struct("kvm_sev_cmd"),
    "first": lambda: 0,
    "session": lambda: RecordSession(0, "pagemap", "host"),
    "window": lambda: 0,
}
BY_ANNOTATION: dict[str, Callable[[], Any]] = {
    "HarvestRequest": HarvestRequest,
    "schema.LeaseRequest": lambda: LeaseRequest("me"),
    "bool": lambda: True,
    "bytes": lambda: bytes(8),
    "bytes | bytearray | memoryview": lambda: bytes(8),
    "int": lambda: 8,
    "int | bytes": lambda: 8,
    "int | WriteableBuffer": lambda: 4096,
    "int | tuple[int, ...]": lambda: 8,
    "npt.DTypeLike": lambda: "u1",
    "npt.NDArray[np.int64]": lambda: np.ones(256, np.int64),
    "Cap | int": lambda: 0,
    "Exit": lambda: MmioRead(1 << 40, 4),
    "Gfns": lambda: [1],
    "IoIn": lambda: IoIn(0x80, 1, 1),
    "IoOut": lambda: IoOut(0x80, 1, b"x", 1),
    "MemoryFault": MemoryFault,
    "Mapping[int, int]": dict,
    "Mapping[int, str]": dict,
    "MmioRead | MmioWrite": lambda: MmioRead(1 << 40, 4),
    "Source": dict,
    "Words": lambda: np.zeros(1, np.uint64),
    "YoungBitmap": lambda: YoungBitmap.from_gfns(0, PAGES, [1]),
    "set[int]": set,
    "int | slice": lambda: 0,
    "slice": lambda: slice(0, 8),
    "str": lambda: "auto",
}
OPERATORS = ("__len__", "__getitem__", "__setitem__", "__iter__", "__repr__", "__contains__")
#: What takes nothing from the object; and what ends it, which is done already.
SKIPPED = {"close", "end_vcpus", "stop"}


def public(kind: type) -> list[str]:
    """Return public methods and properties, and what stands for an operator."""
    names = []
    for name in dir(kind):
        static = inspect.getattr_static(kind, name)
        if name in SKIPPED or (name.startswith("_") and name not in OPERATORS):
            continue
        if isinstance(static, classmethod | staticmethod) or static is getattr(object, name, None):
            continue
        if callable(static) or isinstance(static, property):
            names.append(name)
    return names


def value_for(parameter: inspect.Parameter) -> Any:
    make = BY_NAME.get(parameter.name)
    if str(parameter.annotation) == "Vcpu":
        make = fake_vcpu
    make = make or BY_ANNOTATION.get(str(parameter.annotation))
    if make is None:
        kind = str(parameter.annotation).partition("[")[0]
        make = {"Iterable": list, "Sequence": list, "list": list}.get(kind)
    assert make is not None, f"no value for {parameter}"
    return make()


def ask(target: Any, name: str) -> Exception | None:
    """Call a method or read a property to its end; return what it raised."""
    static = inspect.getattr_static(type(target), name)
    try:
        if isinstance(static, property):
            getattr(target, name)
            return None
        parameters = list(inspect.signature(static).parameters.values())[1:]
        required = [
            parameter
            for parameter in parameters
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        found = getattr(target, name)(*map(value_for, required))
        if isinstance(found, contextlib.AbstractContextManager):
            with found:
                pass
        elif isinstance(found, Iterator):
            list(found)
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        return error
    return None


def is_clear(error: Exception) -> bool:
    """Whether an error says that the object is closed."""
    closed_descriptor = isinstance(error, IoctlError) and error.errno == errno.EBADF
    return isinstance(error, StateError) or closed_descriptor


#: Refuse the made-up arguments before anything is asked of the object.
REFUSES = {
    "assemble",
    "handle_memory_fault",
    "handle_mmio",
    "layer",
    "memory_encrypt_op",
    "set_nested_state",
}


def answers(target: Any) -> set[str]:
    """Ask everything; return what answered, and fail for what gave an unclear error."""
    answered = set()
    for name in public(type(target)):
        error = ask(target, name)
        if error is None:
            answered.add(name)
        else:
            assert is_clear(error) or name in REFUSES, f"{type(target).__name__}.{name}: {error!r}"
    return answered


#: What a closed machine still answers: what it remembers, and what ends it once more.
OF_A_MACHINE = {
    "__repr__",
    "closed",
    "console_text",
    "describe_failure",
    "doorbells",
    "ended_vcpus",
    "error",
    "exits",
    "fail",
    "handle_port_read",
    "handle_port_write",
    "has_pager",
    "memory_faults",
    "paused",
    "report_status",
    "running",
    "snapshot_parts",
    "run_state",
    "status",
    "statuses",
    "still",
    "tables_gpa",
    "tracker_name",
    "uptime_s",
}
BY_ENGINES = ["kvm", "emulated"]


def tiny(engine: str = "kvm") -> Machine:
    return Machine(image_path("hotcold"), mem_bytes=4 << 20, engine=engine)


@pytest.mark.parametrize("engine", BY_ENGINES)
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_a_closed_machine(engine: str, used: bool) -> None:
    machine = tiny(engine)
    if used:
        machine.step_by_doorbell()
        machine.run_epoch()
        machine.harvest(0, 16)
    memory, vcpus = machine.memory, machine.vcpus
    machine.close()
    assert answers(machine) == OF_A_MACHINE
    assert repr(machine).endswith("closed>")
    assert answers(memory) == {"__repr__"}
    with pytest.raises(StateError):
        memory.regions[0].zap(0, 1)
    assert vcpus[0].exits == machine.exits
    machine.close()


def test_a_closed_pc(tmp_path: Path) -> None:
    (tmp_path / "a.flat").write_bytes(b"\xf4")
    machine = PcMachine(load_image(tmp_path / "a.flat", "flat16"), mem_bytes=16 << 20)
    machine.close()
    assert answers(machine) == OF_A_MACHINE | {"ending", "handle_mmio", "options"}


def test_a_machine_that_was_not_started() -> None:
    # Given to it by the constructor, or given by whoever handles an exit.
    internal = {"assemble", "adopt", "handle_memory_fault", "handle_mmio"}
    internal |= {"rearm_cost", "run_epoch", "single_step", "wait"}
    internal |= {"wait_for_memory_faults"}
    for name in public(Machine):
        with tiny() as machine:
            error = ask(machine, name)
            if name not in internal:
                assert error is None, f"{name}: {error!r}"
    with tiny() as machine:
        for call in (
            machine.wait,
            lambda: machine.wait(1),
            machine.run_epoch,
            machine.wait_for_memory_faults,
        ):
            with pytest.raises(StateError, match="call "):
                call()
        machine.stop()
        assert machine.wait(1) == 0
    with tiny() as machine:
        machine.start()
        with pytest.raises(StateError, match="started before"):
            machine.start()


def test_a_closed_pager_and_its_userfaultfd() -> None:
    machine = tiny()
    pager, userfault = machine.open_pager(), machine.open_userfault()
    assert pager.evict([0x300]).outcomes.size == 1
    machine.close()
    with pytest.raises(StateError):
        pager.page_out([0x300], lambda: None)
    refusals = {name: ask(pager, name) for name in public(Pager)}
    # Without a swap area that one is refused before anything is asked.
    del refusals["page_out"]
    assert {name for name, error in refusals.items() if error is None} == {"arm", "armed"}
    assert all(error is None or is_clear(error) for error in refusals.values()), refusals
    assert answers(userfault) == {"minor_faults", "release"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", ["unstarted", "stopped", "closed"])
def test_a_tracker_that_sees_nothing(name: str, end: str) -> None:
    with tiny() as machine:
        try:
            tracker = create(name, machine.tracked_vm())
        except CapabilityError as error:
            pytest.skip(str(error))
        if end != "unstarted":
            tracker.start()
        if end == "stopped":
            tracker.stop()
        if end == "closed":
            machine.close()
        for method in public(type(tracker)):
            error = ask(tracker, method)
            assert error is None or is_clear(error), f"{method}: {error!r}"
        if end == "closed":
            with pytest.raises((StateError, IoctlError)):
                tracker.harvest(0, 16)
        tracker.stop()


def test_closed_descriptors_of_kvm() -> None:
    system = System()
    vm = system.create_vm()
    vcpu = vm.create_vcpu(0)
    vcpu.close()
    assert answers(vcpu) == {"complete_hypercall", "complete_msr", "complete_read", "kick"}
    vm.close()
    assert answers(vm) <= {"buffers"}
    system.close()
    assert answers(system) == set()


def test_a_closed_client(tmp_path: Path) -> None:
    client = Client(tmp_path / "vm.sock")
    client.close()
    assert answers(client) == set()


def test_a_closed_record(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    window = Window(256, frozenset({1}), None, SECOND, 2 * SECOND)
    write(tmp_path / "r.young", 0, [window], 256).close()
    record = YoungRecord.open(tmp_path / "r.young")
    assert len(record) == 1
    record.close()
    assert answers(record) == {"__repr__"}
    writer = RecordWriter.resume(tmp_path / "r.young")
    writer.close()
    assert answers(writer) == {"metadata", "n_windows"}


@pytest.mark.parametrize("where", [0x400, "a", slice(None, None, 2), slice("a", 5), None])
def test_what_is_no_range_of_memory(where: Any) -> None:
    with GuestMemory.of_size(1 << 20) as memory:
        with pytest.raises((TypeError, LayoutError), match="guest memory takes"):
            memory[where]
        with pytest.raises((TypeError, LayoutError), match="guest memory takes"):
            memory[where] = b"x"


@pytest.mark.parametrize("bounds", [(1 << 20, (1 << 20) + 1), (-8, 8), (8, 4), (0, 1 << 60)])
def test_ranges_outside_of_memory(bounds: tuple[int, int]) -> None:
    with GuestMemory.of_size(1 << 20) as memory, pytest.raises(LayoutError):
        memory[slice(*bounds)]
