"""Guests of a few bytes, and a check that a test makes the requests it says it covers.

``@pytest.mark.covers("KVM_…")`` names the requests whose effect a test shows; the
table in docs/kvm-api.md is made from it. A test that names a request and does not
make it with success fails. ``@pytest.mark.refused("KVM_…")`` is for requests that
the kernel refuses here, with the answer that the docstring promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmhost import kvm
from kvmhost._ffi import check
from kvmhost.exits import Exit, IoOut
from kvmhost.kvm import KvmVcpu, KvmVm, System
from kvmhost.memory.guest import GuestMemory

#: Where the code of a tiny guest is; below it the real-mode vectors and scratch.
CODE_GPA = 0x1000
#: Where it finds its stack.
STACK_GPA = 0x8000

_CHECKERS = ("descriptor", "system", "vcpu")


@pytest.fixture(autouse=True)
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Record the requests that succeed; compare with what the test covers."""
    seen: set[str] = set()

    def recording(result: int, name: str, **arguments: Any) -> int:
        answer = check(result, name, **arguments)
        seen.add(name)
        return answer

    for module in _CHECKERS:
        monkeypatch.setattr(getattr(kvm, module), "check", recording)
    yield seen
    for marker in request.node.iter_markers("covers"):
        if not request.node.stash.get(_FAILED, True):
            assert set(marker.args) <= seen, "covered, but not made with success"


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call":
        item.stash[_FAILED] = not report.passed


@pytest.fixture
def system() -> Iterator[System]:
    with System() as opened:
        yield opened


@pytest.fixture
def vm(system: System) -> Iterator[KvmVm]:
    with system.create_vm() as made:
        yield made


class Tiny:
    """A VM with 1 MiB and one vCPU in real mode, about to run a few bytes of code.

    Data segments reach 4 GiB, so that 32-bit addresses get to MMIO.

    :param code: at :data:`CODE_GPA`, the first instruction first
    :param prepare: called with the VM before its vCPU is made
    """

    def __init__(
        self, system: System, code: bytes, prepare: Callable[[KvmVm], None] | None = None
    ) -> None:
        self.system = system
        self.vm = system.create_vm()
        self.memory = GuestMemory.of_size(1 << 20)
        self.memory[CODE_GPA : CODE_GPA + len(code)] = code
        region = self.memory.regions[0]
        self.vm.set_memory_region(0, 0, region.n_bytes, region.guest_address)
        if prepare:
            prepare(self.vm)
        self.vcpus = [self.add_vcpu(0)]

    @property
    def vcpu(self) -> KvmVcpu:
        return self.vcpus[0]

    def add_vcpu(self, index: int) -> KvmVcpu:
        vcpu = self.vm.create_vcpu(index)
        vcpu.set_cpuid(self.system.supported_cpuid())
        enter_real_mode(vcpu)
        return vcpu

    def vector(self, number: int, code: bytes) -> None:
        """Put a handler of an interrupt vector into memory."""
        gpa = 0x2000 + 0x40 * number
        self.memory[gpa : gpa + len(code)] = code
        # An entry is offset and segment; the segment is 0.
        self.memory[4 * number : 4 * number + 4] = gpa.to_bytes(4, "little")

    def run(self) -> Exit:
        return self.vcpu.run()

    def out(self) -> int:
        """Run to the next port write; return its value."""
        vm_exit = self.run()
        assert isinstance(vm_exit, IoOut), vm_exit
        return vm_exit.value

    def close(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.memory.close()


def enter_real_mode(vcpu: KvmVcpu, rip: int = CODE_GPA) -> None:
    """Start at ``rip`` with segments from 0."""
    sregs = vcpu.get_sregs()
    sregs.cs.update(base=0, selector=0)
    for name in ("ds", "es", "fs", "gs", "ss"):
        getattr(sregs, name).update(base=0, selector=0, limit=0xFFFFFFFF, g=1)
    vcpu.set_sregs(sregs)
    vcpu.set_regs({"rip": rip, "rsp": STACK_GPA, "rflags": 2})


@pytest.fixture
def tiny(system: System) -> Iterator[Callable[..., Tiny]]:
    """Return a maker of tiny guests."""
    guests: list[Tiny] = []

    def make(code: bytes, prepare: Callable[[KvmVm], None] | None = None) -> Tiny:
        guests.append(Tiny(system, code, prepare))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
