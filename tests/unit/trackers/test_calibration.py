"""Calibration against a fake host of each kind.

A fake vCPU touches what the calibration guest touches: it walks the guest's own tables,
sets accessed bits as its kind of host does, and touches the guest mapping.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmhost import engine as engines
from kvmhost.boot.longmode import EntryState
from kvmhost.devices.bus import DOORBELL_PORT, Bus
from kvmhost.engine.base import RearmKind
from kvmhost.errors import CapabilityError, IoctlError, KvmHostError, UnexpectedExit
from kvmhost.exits import Exit, IoOut, Kicked, Shutdown
from kvmhost.memory.guest import GuestMemory
from kvmhost.trackers import calibration
from kvmhost.trackers.calibration import calibrate
from kvmhost.trackers.guestpt import GuestptTracker
from kvmhost.trackers.probeguest import GFN_START

ACCESSED = 1 << 5
ADDRESS = 0x000F_FFFF_FFFF_F000
#: The pages that the calibration guest touches.
FIRST, PAGES = GFN_START, calibration._PAGES


@dataclasses.dataclass
class Host:
    """What a host does.

    :param caches: a translation is cached at the first touch, and sets no bits while it is
    :param flush_drops: so does a flush of the guest's TLB: the translation is the processor's
    :param zap_drops: a zap of the guest mapping drops the cached translation
    :param keeps: whether the translation of the n-th page stays cached over an exit
    :param sets: whether touching the n-th page of the guest sets an accessed bit at all
    :param kicks: times that a run returns for a kick before it gets anywhere
    """

    caches: bool = True
    flush_drops: bool = False
    keeps: Callable[[int], bool] = lambda page: True
    zap_drops: bool = True
    sets: Callable[[int], bool] = lambda page: True
    kicks: int = 0
    vm_exit: Exit | None = None
    create_error: KvmHostError | None = None


class FakeVcpu:
    index = 0

    def __init__(self, host: Host, memory: GuestMemory, state: EntryState) -> None:
        self.host, self.memory, self.cr3 = host, memory, state.cr3
        self.cached: set[int] = set()
        self.kicks, self.closed, self.stops = host.kicks, False, False

    def stop_at_doorbell(self, stop: bool) -> None:
        self.stops = stop

    def flush_guest_tlb(self) -> None:
        if self.host.flush_drops:
            self.cached.clear()

    def run(self) -> Exit:
        assert self.stops
        if self.kicks:
            self.kicks -= 1
            return Kicked()
        if self.host.vm_exit is not None:
            return self.host.vm_exit
        if self.host.zap_drops:
            self.cached -= {gfn for gfn in self.cached if not self.mapped(gfn)}
        for gfn in range(FIRST, FIRST + PAGES):
            self.touch(gfn)
        return IoOut(DOORBELL_PORT, 4, bytes(4), 1)

    def touch(self, gfn: int) -> None:
        if gfn not in self.cached and self.host.sets(gfn - FIRST):
            self.set_accessed(gfn)
        if self.host.caches and self.host.keeps(gfn - FIRST):
            self.cached.add(gfn)
        # The access itself makes the page present in the guest mapping.
        ctypes.string_at(self.memory.regions[0].guest_address + (gfn << 12), 1)

    def mapped(self, gfn: int) -> bool:
        """Whether the guest mapping has the page: what KVM learns from its notifier."""
        address = self.memory.regions[0].guest_address + (gfn << 12)
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(address // 4096 * 8)
            return bool(int.from_bytes(pagemap.read(8), "little") >> 63)

    def set_accessed(self, gfn: int) -> None:
        table = self.cr3
        for shift in (27, 18, 9, 0):
            at = table + (gfn >> shift & 511) * 8
            entry = int.from_bytes(self.memory[at : at + 8], "little")
            assert entry & 1
            self.memory[at : at + 8] = (entry | ACCESSED).to_bytes(8, "little")
            table = entry & ADDRESS

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """An engine of one kind of host; ``opened`` holds all that were made."""

    name = "kvm"
    fixed_rearm: RearmKind | None = None

    def __init__(self, host: Host) -> None:
        self.host, self.closed = host, False
        self.vcpus: list[FakeVcpu] = []

    def attach(self, memory: GuestMemory, bus: Bus) -> None:
        self.memory = memory

    def create_vcpu(self, index: int, state: EntryState) -> FakeVcpu:
        if self.host.create_error is not None:
            raise self.host.create_error
        self.vcpus.append(FakeVcpu(self.host, self.memory, state))
        return self.vcpus[-1]

    def close(self) -> None:
        assert all(vcpu.closed for vcpu in self.vcpus)
        self.closed = True


class Hosts:
    """Engines as :func:`kvmhost.engine.choose` would return them, all of one host."""

    def __init__(self) -> None:
        self.host = Host()
        self.opened: list[FakeEngine] = []

    def choose(self, name: str = "auto") -> FakeEngine:
        self.opened.append(FakeEngine(self.host))
        return self.opened[-1]

    def calibrate(self, host: Host) -> RearmKind:
        self.host = host
        return calibrate(FakeEngine(host)).rearm


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    made = Hosts()
    monkeypatch.setattr(engines, "choose", made.choose)
    monkeypatch.setattr(calibration, "_found", {})
    yield made
    assert all(engine.closed for engine in made.opened)


@pytest.mark.parametrize(
    ("host", "rearm"),
    [
        pytest.param(Host(caches=False), RearmKind.NONE, id="hardware-walks"),
        pytest.param(Host(), RearmKind.ZAP, id="shadow-paging"),
        pytest.param(Host(kicks=3), RearmKind.ZAP, id="kicked-before"),
        pytest.param(Host(caches=False, kicks=3), RearmKind.NONE, id="hardware-and-kicked"),
    ],
)
def test_what_makes_a_bit_set_again(hosts: Hosts, host: Host, rearm: RearmKind) -> None:
    assert hosts.calibrate(host) is rearm
    assert len(hosts.opened) == 1


@pytest.mark.parametrize(
    ("host", "rearm", "walker"),
    [
        # 3 of 32 translations stay: a share of the pages counts.
        (Host(keeps=lambda page: page < 3), RearmKind.NONE, "hardware walks the tables"),
        (
            Host(keeps=lambda page: page < 4, flush_drops=True),
            RearmKind.ZAP,
            "its TLB keeps translations over exits",
        ),
        (Host(flush_drops=True), RearmKind.ZAP, "its TLB keeps translations over exits"),
        (Host(keeps=lambda page: page < 4), RearmKind.ZAP, "KVM shadows the tables"),
    ],
)
def test_a_tagged_tlb_is_told_from_shadow_paging(
    hosts: Hosts, host: Host, rearm: RearmKind, walker: str
) -> None:
    assert hosts.calibrate(host) is rearm
    assert walker in str(calibrate(FakeEngine(host)))


class Flickering:
    """Every third pass over the pages sets no bits: its try fails, whatever the others say."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, page: int) -> bool:
        self.calls += 1
        return (self.calls - 1) // PAGES % 3 != 2


class SomeLater:
    """Sets the bits of all pages at the first pass, then only those of the first ``n``."""

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    def __call__(self, page: int) -> bool:
        self.calls += 1
        return self.calls <= PAGES or page < self.n


@pytest.mark.parametrize(
    ("host", "found"),
    [
        pytest.param(Host(sets=lambda page: False), "no accessed bits at all", id="no-bits"),
        pytest.param(Host(sets=lambda page: page > 0), "no accessed bits at all", id="all-but-one"),
        pytest.param(
            Host(caches=False, sets=Flickering()), "without help 32 0 32 of 32", id="flickering"
        ),
        pytest.param(
            Host(zap_drops=False), "bits that do not come back after a zap", id="stale-tlb"
        ),
        pytest.param(
            Host(caches=False, sets=SomeLater(0)), "do not come back", id="bits-set-only-once"
        ),
        pytest.param(
            Host(caches=False, sets=SomeLater(28)), "do not come back", id="four-bits-are-lost"
        ),
    ],
)
def test_a_host_whose_bits_cannot_be_used_is_refused(hosts: Hosts, host: Host, found: str) -> None:
    with pytest.raises(CapabilityError) as caught:
        hosts.calibrate(host)
    assert found in str(caught.value)
    assert "engine kvm" in str(caught.value)
    assert "--tracker pagemap" in str(caught.value)


def test_a_host_where_the_guest_ends_is_an_error(hosts: Hosts) -> None:
    for vm_exit in (Shutdown(), IoOut(DOORBELL_PORT + 4, 4, bytes(4), 1)):
        with pytest.raises(UnexpectedExit, match=f"calibration: {type(vm_exit).__name__}"):
            hosts.calibrate(Host(vm_exit=vm_exit))


def test_a_host_that_makes_no_vcpu_is_an_error(hosts: Hosts) -> None:
    with pytest.raises(IoctlError, match="KVM_CREATE_VCPU"):
        hosts.calibrate(Host(create_error=IoctlError("KVM_CREATE_VCPU", 12)))
    assert hosts.opened[0].closed


def test_an_engine_that_knows_is_not_tried(hosts: Hosts) -> None:
    engine = FakeEngine(Host())
    engine.fixed_rearm = RearmKind.TLB_FLUSH
    assert calibrate(engine).rearm is RearmKind.TLB_FLUSH
    assert hosts.opened == []


def test_a_host_is_tried_once_but_a_refusal_is_not_kept(hosts: Hosts) -> None:
    with pytest.raises(CapabilityError):
        hosts.calibrate(Host(zap_drops=False))
    assert hosts.calibrate(Host()) is RearmKind.ZAP
    assert hosts.calibrate(Host(caches=False)) is RearmKind.ZAP
    assert len(hosts.opened) == 2


def test_the_probe_reports_what_was_found(hosts: Hosts) -> None:
    hosts.host = Host(zap_drops=False)
    refused = GuestptTracker.probe("kvm")
    assert not refused.works
    assert "do not come back after a zap" in refused.reason
    hosts.host = Host()
    found = GuestptTracker.probe("kvm")
    assert found.works
    assert found.reason == (
        "engine kvm, re-arm by zap: KVM shadows the tables (bits set again: without help 0 0 0 "
        "of 32, after a TLB flush 0 0 0 of 32, after a zap 32 32 32 of 32)"
    )
