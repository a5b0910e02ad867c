"""The system descriptor, clocks, devices of the kernel, statistics, filters."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmhost._ffi import lib
from kvmhost.errors import IoctlError, KvmHostError
from kvmhost.exits import Hlt
from kvmhost.kvm import Cap, KvmVm, System
from kvmhost.kvm.stats import Kind, Stat, StatDescriptor, Stats, Unit
from kvmhost.kvm.system import API_VERSION

Maker = Callable[..., Any]


def refusal(attempt: Callable[[], Any]) -> int:
    """Return the errno that a request is refused with, 0 if it is not."""
    try:
        attempt()
    except IoctlError as error:
        return error.errno or 0
    return 0


@pytest.mark.requires_kvm
@pytest.mark.covers("KVM_GET_API_VERSION", "KVM_GET_VCPU_MMAP_SIZE", "KVM_CHECK_EXTENSION")
def test_what_the_system_says_of_itself(system: System, vm: KvmVm) -> None:
    assert system.get_api_version() == API_VERSION
    assert system.vcpu_run_bytes() % os.sysconf("SC_PAGESIZE") == 0
    assert system.check_extension(Cap.USER_MEMORY) == vm.check_extension(3) == 1
    assert system.check_extension(9999) == 0


@pytest.mark.requires_kvm
@pytest.mark.covers("KVM_CREATE_VM", "KVM_CREATE_VCPU")
def test_vms_of_the_kinds_that_there_are(system: System) -> None:
    with system.create_vm(0) as vm, vm.create_vcpu(5):
        with pytest.raises(IoctlError) as caught:
            vm.create_vcpu(5)
        assert caught.value.errno == errno.EEXIST
    with pytest.raises(IoctlError, match="type=0x3f") as caught:
        system.create_vm(63)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("EXT_EMUL_CPUID")
@pytest.mark.covers("KVM_GET_EMULATED_CPUID")
def test_features_that_are_emulated(system: System) -> None:
    leaf = {entry.function: entry for entry in system.emulated_cpuid().entries}
    assert leaf[1].ecx & 1 << 22  # MOVBE


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("SYS_HYPERV_CPUID")
@pytest.mark.covers("KVM_GET_SUPPORTED_HV_CPUID")
def test_hyperv_leaves(system: System, vm: KvmVm) -> None:
    leaves = [entry.function for entry in system.supported_hv_cpuid().entries]
    assert leaves[0] == 0x40000000
    with vm.create_vcpu(0) as vcpu:
        assert vcpu.supported_hv_cpuid().entries[0].function == 0x40000000


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("GET_MSR_FEATURES")
@pytest.mark.covers("KVM_GET_MSR_FEATURE_INDEX_LIST", "KVM_GET_MSRS")
def test_feature_msrs(system: System) -> None:
    listed = system.msr_feature_index_list()
    values = system.get_msrs(listed)
    assert list(values) == listed
    assert values.get(0x8B) != 0  # microcode revision


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("SYS_ATTRIBUTES")
@pytest.mark.covers("KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR")
def test_attributes_of_the_system(system: System) -> None:
    assert system.has_attr(0, lib.KVM_X86_XCOMP_GUEST_SUPP)
    assert system.get_attr(0, lib.KVM_X86_XCOMP_GUEST_SUPP) & 3 == 3  # x87 and SSE


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("ADJUST_CLOCK")
@pytest.mark.covers("KVM_GET_CLOCK", "KVM_SET_CLOCK")
def test_the_clock_goes_on_from_where_it_was_set(vm: KvmVm) -> None:
    vm.set_clock({"clock": 10**15})
    first = vm.get_clock()
    second = vm.get_clock()
    assert 10**15 < first.clock < second.clock < 10**15 + 60 * 10**9
    with pytest.raises(IoctlError) as caught:
        vm.set_clock({"clock": 1, "flags": 1 << 20})
    assert caught.value.errno == errno.EINVAL


@pytest.mark.requires_kvm
@pytest.mark.covers("KVM_SET_TSS_ADDR", "KVM_SET_IDENTITY_MAP_ADDR")
def test_pages_for_intel(vm: KvmVm) -> None:
    vm.set_tss_addr(0xFFFBD000)
    vm.set_identity_map_addr(0xFFFBC000)
    with vm.create_vcpu(0), pytest.raises(IoctlError) as caught:
        vm.set_identity_map_addr(0xFFFBC000)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("DEVICE_CTRL")
@pytest.mark.covers("KVM_CREATE_DEVICE", "KVM_HAS_DEVICE_ATTR")
def test_a_device_of_the_kernel(vm: KvmVm) -> None:
    assert vm.create_device(lib.KVM_DEV_TYPE_VFIO, test=True) is None
    device = vm.create_device(lib.KVM_DEV_TYPE_VFIO)
    assert device is not None
    with device:
        assert device.has_attr(lib.KVM_DEV_VFIO_GROUP, lib.KVM_DEV_VFIO_GROUP_ADD)
        assert not device.has_attr(77, 0)
        with pytest.raises(IoctlError) as caught:
            device.set_attr(lib.KVM_DEV_VFIO_GROUP, lib.KVM_DEV_VFIO_GROUP_ADD, -1 % 2**32, 4)
        assert caught.value.errno == errno.EBADF
        with pytest.raises(IoctlError) as caught:
            device.get_attr(lib.KVM_DEV_VFIO_GROUP, lib.KVM_DEV_VFIO_GROUP_ADD)
    with pytest.raises(IoctlError) as caught:
        vm.create_device(7777)
    assert caught.value.errno == errno.ENODEV


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("PMU_EVENT_FILTER")
@pytest.mark.covers("KVM_SET_PMU_EVENT_FILTER")
def test_events_that_may_be_counted(vm: KvmVm) -> None:
    vm.set_pmu_event_filter([0xC0, 0x3C], allow=True)
    with pytest.raises(IoctlError) as caught:
        vm.set_pmu_event_filter([], allow=True, flags=1 << 20)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.refused("KVM_GET_SUPPORTED_HV_CPUID")
@pytest.mark.requires_kvm
def test_hyperv_leaves_are_there_or_refused(system: System) -> None:
    assert refusal(system.supported_hv_cpuid) in (0, errno.EINVAL, errno.ENOTTY)


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("BINARY_STATS_FD")
@pytest.mark.covers("KVM_GET_STATS_FD")
def test_statistics_count_what_the_guest_does(tiny: Maker) -> None:
    guest = tiny(bytes.fromhex("66 e7 80") * 5 + b"\xf4")
    with guest.vcpu.stats() as stats, guest.vm.stats() as of_vm:
        before = stats.read()["io_exits"].value
        for _ in range(5):
            guest.out()
        assert guest.run() == Hlt()
        after = stats.read()
        # Where KVM emulates level 0, a string of instructions may be one exit of hardware.
        assert after["io_exits"].value in (before, before + 5)
        assert after["exits"].value > 0
        assert stats.values().keys() == after.keys()
        assert "vcpu" in stats.id
        assert "vcpu" not in of_vm.id
        assert of_vm.read()["max_mmu_page_hash_collisions"].descriptor.kind == Kind.PEAK


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("BINARY_STATS_FD")
def test_every_statistic_is_described(vm: KvmVm) -> None:
    with vm.create_vcpu(0) as vcpu, vcpu.stats() as stats:
        read = stats.read()
        assert list(read) == list(stats.descriptors)
        told = stats.descriptors["halt_poll_success_hist"]
        assert (told.kind, told.unit, told.unit_text()) == (Kind.LOG_HIST, Unit.SECONDS, "ns")
        assert len(read["halt_poll_success_hist"].raw) == told.n_items == len(told.edges())
        words = stats.numpy()
        for stat in read.values():
            assert isinstance(stat.descriptor.kind, Kind)
            assert isinstance(stat.descriptor.unit, Unit)
            start = stat.descriptor.offset // 8
            assert words[start : start + stat.descriptor.n_items].shape == (len(stat.raw),)


def fake_stats(path: Path, descriptors: list[tuple[int, int, int, int, str]], data: bytes) -> int:
    """Write a file as the kernel lays it out: header, id, descriptors, numbers."""
    name_size, n = 48, len(descriptors)
    id_offset, desc_offset = 24, 24 + name_size
    data_offset = desc_offset + n * (16 + name_size)
    content = struct.pack("<6I", 0, name_size, n, id_offset, desc_offset, data_offset)
    content += b"kvm-1/vcpu-0".ljust(name_size, b"\0")
    offset = 0
    for flags, exponent, size, bucket, name in descriptors:
        content += struct.pack("<IhHII", flags, exponent, size, offset, bucket)
        content += name.encode().ljust(name_size, b"\0")
        offset += 8 * size
    path.write_bytes(content + data)
    return os.open(path, os.O_RDONLY)


def test_statistics_of_every_kind_and_unit(tmp_path: Path) -> None:
    descriptors = [
        (0x000, 0, 1, 0, "plain"),
        (0x021, -9, 1, 0, "nanoseconds"),
        (0x112, 10, 1, 0, "kibibytes"),
        (0x041, 0, 1, 0, "yes"),
        (0x023, -6, 3, 100, "linear"),
        (0x004, 0, 4, 0, "logarithmic"),
        (0x0F9, 0, 1, 0, "of tomorrow"),
    ]
    numbers = struct.pack("<12Q", 7, 1_500_000_000, 3, 1, 1, 0, 2, 4, 3, 2, 1, 9)
    with Stats(fake_stats(tmp_path / "stats", descriptors, numbers)) as stats:
        read = stats.read()
    assert stats.id == "kvm-1/vcpu-0"
    assert read["plain"].value == 7
    assert read["nanoseconds"].value == 1.5
    assert read["kibibytes"].value == 3072
    assert read["yes"].value is True
    assert read["linear"].value == (1, 0, 2)
    assert read["linear"].descriptor.edges() == [0, 100, 200]
    assert read["logarithmic"].descriptor.edges() == [0, 1, 2, 4]
    assert [str(stat) for stat in read.values()] == [
        "plain: 7",
        "nanoseconds: 1500000000 ns",
        "kibibytes: 3 KiB",
        "yes: 1 bool",
        "linear: {0+: 1, 200+: 2} us",
        "logarithmic: {0+: 4, 1+: 3, 2+: 2, 4+: 1}",
        "of tomorrow: 9 unit 15",
    ]


def test_a_truncated_statistics_file_is_refused(tmp_path: Path) -> None:
    fd = fake_stats(tmp_path / "stats", [(0, 0, 4, 0, "much")], b"\0" * 8)
    with Stats(fd) as stats, pytest.raises(KvmHostError, match="8 bytes at offset"):
        stats.read()
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(KvmHostError, match="0 bytes at offset 0"):
        Stats(os.open(empty, os.O_RDONLY))


def test_a_unit_without_a_name_shows_its_power() -> None:
    told = StatDescriptor("x", Kind.PEAK, Unit.BYTES, 2, 15, 1, 0, 0)
    assert str(Stat(told, (2,))) == "x: 2 2^15 B"
    assert Stat(told, (2,)).value == 65536
