"""Memslots, dirty logs, guest_memfd: seen from inside a guest, or by what KVM answers."""

from __future__ import annotations

import errno
import mmap
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from kvmhost._ffi import lib
from kvmhost.errors import IoctlError, LayoutError
from kvmhost.exits import Hlt, MmioRead, MmioWrite
from kvmhost.kvm import Cap, KvmVm, Struct, System
from kvmhost.memory.guest import Region

pytestmark = pytest.mark.requires_kvm

Maker = Callable[..., Any]

SLOT, PLACE, PAGES = 1, 0x200000, 130
PAGE = mmap.PAGESIZE


def store(address: int, value: int) -> bytes:
    """Mov byte [address], value (16-bit code, 32-bit address)."""
    return b"\x67\xc6\x05" + address.to_bytes(4, "little") + bytes([value])


def load(address: int) -> bytes:
    """Mov eax, [address]; out 0x80, eax."""
    return b"\x67\x66\xa1" + address.to_bytes(4, "little") + bytes.fromhex("66 e7 80")


def refusal(attempt: Callable[[], Any]) -> int:
    """Return the errno that a request is refused with, 0 if it is not."""
    try:
        attempt()
    except IoctlError as error:
        return error.errno or 0
    return 0


@pytest.fixture
def region() -> Any:
    made = Region(PLACE, PAGES * PAGE)
    yield made
    made.close()


@pytest.mark.covers("KVM_SET_USER_MEMORY_REGION")
def test_a_slot_is_created_moved_and_deleted(tiny: Maker, region: Region) -> None:
    moved = PLACE + 0x100000
    guest = tiny(load(PLACE) + load(moved) + load(moved) + b"\xf4")
    region.alias[:4] = (77).to_bytes(4, "little")
    address, size = region.guest_address, region.n_bytes
    guest.vm.set_memory_region(SLOT, PLACE, size, address)
    assert guest.out() == 77
    guest.vm.set_memory_region(SLOT, moved, size, address)
    assert guest.out() == 77
    guest.vm.delete_memory_region(SLOT)
    assert guest.run() == MmioRead(moved, 4)
    guest.vcpu.complete_read((5).to_bytes(4, "little"))
    assert guest.out() == 5


@pytest.mark.covers("KVM_SET_USER_MEMORY_REGION")
def test_a_buffer_backs_a_slot_and_is_held_until_it_is_deleted(tiny: Maker) -> None:
    guest = tiny(load(PLACE) + store(PLACE + PAGE, 42) + b"\xf4")
    memory, other = mmap.mmap(-1, 2 * PAGE), mmap.mmap(-1, 2 * PAGE)
    memory[:4] = (77).to_bytes(4, "little")
    guest.vm.set_memory_region(SLOT, PLACE, 2 * PAGE, memory)
    assert guest.out() == 77
    assert guest.run() == Hlt()
    assert memory[PAGE] == 42
    with pytest.raises(BufferError):
        memory.close()
    # A request that fails changes nothing: the old buffer is held, the new one is not.
    with pytest.raises(IoctlError):
        guest.vm.set_memory_region(SLOT, PLACE, PAGE, other)
    with pytest.raises(BufferError):
        memory.close()
    other.close()
    guest.vm.delete_memory_region(SLOT)
    memory.close()


def test_closing_the_vm_releases_its_buffers() -> None:
    memory = mmap.mmap(-1, PAGE)
    with System() as system, system.create_vm() as vm:
        vm.set_memory_region(SLOT, PLACE, PAGE, memory)
        with pytest.raises(BufferError):
            memory.close()
    memory.close()


def test_buffers_that_cannot_be_guest_memory(vm: KvmVm) -> None:
    memory = mmap.mmap(-1, PAGE)
    for buffer, why in [
        (memory, "has 0x1000 bytes, the slot 0x2000"),
        (memoryview(mmap.mmap(-1, 4 * PAGE))[8:], "inside a page"),
        (bytes(2 * PAGE), "writable"),
        ("text", "writable buffer"),
    ]:
        with pytest.raises(LayoutError, match=why):
            vm.set_memory_region(SLOT, PLACE, 2 * PAGE, buffer)  # type: ignore[arg-type]
    memory.close()


def test_bad_slots_are_refused(vm: KvmVm, region: Region) -> None:
    address, size = region.guest_address, region.n_bytes
    vm.set_memory_region(SLOT, PLACE, size, address)
    for arguments, answer in [
        ((2, PLACE + PAGE, size, address), errno.EEXIST),  # overlap
        ((SLOT, PLACE, 2 * PAGE, address), errno.EINVAL),  # another size
        ((2, PLACE + 1, size, address), errno.EINVAL),  # alignment
        ((1 << 15, PLACE * 8, size, address), errno.EINVAL),  # no such number
    ]:
        with pytest.raises(IoctlError) as caught:
            vm.set_memory_region(*arguments)
        assert caught.value.errno == answer, arguments
    with pytest.raises(IoctlError):
        vm.delete_memory_region(5)


@pytest.mark.requires_cap("READONLY_MEM")
@pytest.mark.covers("KVM_SET_USER_MEMORY_REGION")
def test_writes_to_a_read_only_slot_come_out(tiny: Maker, region: Region) -> None:
    guest = tiny(load(PLACE) + store(PLACE, 9) + b"\xf4")
    region.alias[:4] = (5).to_bytes(4, "little")
    flags = lib.KVM_MEM_READONLY
    guest.vm.set_memory_region(SLOT, PLACE, region.n_bytes, region.guest_address, flags)
    assert guest.out() == 5
    assert guest.run() == MmioWrite(PLACE, b"\x09")
    assert guest.run() == Hlt()
    assert region.alias[0] == 5


@pytest.mark.requires_cap("USER_MEMORY2")
@pytest.mark.covers("KVM_SET_USER_MEMORY_REGION2")
def test_a_slot_of_the_second_form(tiny: Maker, region: Region) -> None:
    guest = tiny(store(PLACE + 3 * PAGE, 9) + b"\xf4")
    guest.vm.set_memory_region2(SLOT, PLACE, region.n_bytes, region.guest_address)
    assert guest.run() == Hlt()
    assert region.alias[3 * PAGE] == 9


@pytest.mark.requires_cap("GUEST_MEMFD_FLAGS")
@pytest.mark.covers("KVM_CREATE_GUEST_MEMFD", "KVM_SET_USER_MEMORY_REGION2")
def test_a_guest_writes_to_its_guest_memfd(tiny: Maker) -> None:
    guest = tiny(store(PLACE + PAGE, 42) + b"\xf4")
    flags = lib.GUEST_MEMFD_FLAG_MMAP | lib.GUEST_MEMFD_FLAG_INIT_SHARED
    with guest.vm.create_guest_memfd(4 * PAGE, flags) as memory:
        mapping = memory.map()
        guest.vm.set_memory_region2(
            SLOT, PLACE, 4 * PAGE, mapping, guest_memfd=memory.fd, guest_memfd_offset=0
        )
        assert guest.run() == Hlt()
        assert mapping[PAGE] == 42
        memory.punch(0, 4 * PAGE)
        assert mapping[PAGE] == 0
        guest.vm.delete_memory_region(SLOT)


@pytest.mark.requires_cap("GUEST_MEMFD")
def test_a_guest_memfd_is_not_for_others(vm: KvmVm) -> None:
    with vm.create_guest_memfd(4 * PAGE) as memory:
        with pytest.raises(OSError, match="No such device") as caught:
            memory.map()
        assert caught.value.errno == errno.ENODEV
    for n_bytes, flags in ((PAGE + 1, 0), (PAGE, 1 << 40), (0, 0)):
        with pytest.raises(IoctlError) as refused:
            vm.create_guest_memfd(n_bytes, flags)
        assert refused.value.errno == errno.EINVAL


@pytest.mark.requires_cap("MEMORY_ATTRIBUTES")
@pytest.mark.covers("KVM_SET_MEMORY_ATTRIBUTES")
def test_memory_is_made_private(system: System) -> None:
    protected = 1  # KVM_X86_SW_PROTECTED_VM
    if not system.check_extension(Cap.VM_TYPES) & 1 << protected:
        pytest.skip("this KVM has no VM type with private memory; set CONFIG_KVM_SW_PROTECTED_VM")
    with system.create_vm(protected) as vm:
        known = vm.check_extension(Cap.MEMORY_ATTRIBUTES)
        assert known & lib.KVM_MEMORY_ATTRIBUTE_PRIVATE
        vm.set_memory_attributes(PLACE, PAGE, lib.KVM_MEMORY_ATTRIBUTE_PRIVATE)
        vm.set_memory_attributes(PLACE, PAGE, 0)


@pytest.mark.refused("KVM_SET_MEMORY_ATTRIBUTES")
def test_unknown_memory_attributes_are_refused(vm: KvmVm) -> None:
    with pytest.raises(IoctlError) as caught:
        vm.set_memory_attributes(PLACE, PAGE, 1 << 60)
    assert caught.value.errno in (errno.EINVAL, errno.ENOTTY)


@pytest.mark.requires_cap("MANUAL_DIRTY_LOG_PROTECT2")
@pytest.mark.covers("KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG", "KVM_ENABLE_CAP")
def test_the_dirty_log_under_manual_protection(tiny: Maker, region: Region) -> None:
    pages = (0, 64, 129)
    code = b"".join(store(PLACE + page * PAGE, 1) for page in pages)
    guest = tiny(code + bytes.fromhex("66 e7 80") + code + b"\xf4")
    guest.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, lib.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)
    flags = lib.KVM_MEM_LOG_DIRTY_PAGES
    guest.vm.set_memory_region(SLOT, PLACE, region.n_bytes, region.guest_address, flags)
    guest.out()
    expected = array("Q", [1, 1, 1 << 1])
    assert dirty_log(guest.vm) == dirty_log(guest.vm) == expected  # reading clears nothing
    guest.vm.clear_dirty_log(SLOT, 64, 64, array("Q", [1]))
    assert dirty_log(guest.vm) == array("Q", [1, 0, 1 << 1])
    assert guest.run() == Hlt()
    assert dirty_log(guest.vm) == expected  # the cleared page was protected again
    with pytest.raises(LayoutError, match="1 words for 128 pages"):
        guest.vm.clear_dirty_log(SLOT, 0, 128, array("Q", [1]))
    with pytest.raises(IoctlError) as caught:
        guest.vm.clear_dirty_log(SLOT, 3, 64, array("Q", [1]))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.covers("KVM_GET_DIRTY_LOG")
def test_a_dirty_log_is_never_written_past_its_array(tiny: Maker, region: Region) -> None:
    """130 pages are three words: two would have KVM write behind the array."""
    guest = tiny(store(PLACE + 129 * PAGE, 1) + b"\xf4")
    flags = lib.KVM_MEM_LOG_DIRTY_PAGES
    guest.vm.set_memory_region(SLOT, PLACE, 130 * PAGE, region.guest_address, flags)
    assert guest.run() == Hlt()
    backing = array("Q", [0xAA] * 4)
    with pytest.raises(LayoutError, match=r"2 words for slot \d+ of 130 pages, which needs 3"):
        guest.vm.get_dirty_log(SLOT, memoryview(backing)[:2])  # type: ignore[arg-type]
    assert backing == array("Q", [0xAA] * 4)
    assert guest.vm.get_dirty_log(SLOT).tolist() == [0, 0, 1 << 1]
    guest.vm.set_memory_region(SLOT, PLACE, 0, region.guest_address)
    with pytest.raises(IoctlError) as caught:
        guest.vm.get_dirty_log(SLOT)
    assert caught.value.errno == errno.ENOENT


def dirty_log(vm: KvmVm) -> array[int]:
    words = array("Q", [0] * 3)
    vm.get_dirty_log(SLOT, words)  # type: ignore[arg-type]
    return words


@pytest.mark.requires_cap("DIRTY_LOG_RING")
@pytest.mark.covers("KVM_RESET_DIRTY_RINGS")
def test_entries_of_the_dirty_ring_are_given_back(tiny: Maker, region: Region) -> None:
    n_entries = 1024
    pages = (3, 7)
    code = b"".join(store(PLACE + page * PAGE, 1) for page in pages)
    guest = tiny(
        code + b"\xf4",
        lambda vm: vm.enable_cap(Cap.DIRTY_LOG_RING, n_entries * 16),
    )
    flags = lib.KVM_MEM_LOG_DIRTY_PAGES
    guest.vm.set_memory_region(SLOT, PLACE, region.n_bytes, region.guest_address, flags)
    assert guest.run() == Hlt()
    offset = lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE
    with mmap.mmap(guest.vcpu.fd, n_entries * 16, offset=offset) as mapping:
        ring = memoryview(mapping).cast("I")
        # flags, slot, offset (64 bits)
        assert [(ring[4 * i + 1], ring[4 * i + 2]) for i in range(2)] == [(SLOT, 3), (SLOT, 7)]
        for i in range(2):
            assert ring[4 * i] == 1
            ring[4 * i] = 2  # harvested
        assert guest.vm.reset_dirty_rings() == 2
        assert ring[0] == 0
        ring.release()


@pytest.mark.requires_cap("MMU_SHADOW_CACHE_CONTROL")
@pytest.mark.covers("KVM_SET_NR_MMU_PAGES")
def test_pages_for_shadow_tables(vm: KvmVm) -> None:
    vm.set_nr_mmu_pages(64)
    with pytest.raises(IoctlError) as caught:
        vm.set_nr_mmu_pages(19)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.refused("KVM_GET_NR_MMU_PAGES")
def test_the_limit_on_shadow_tables_cannot_be_read_any_more(vm: KvmVm) -> None:
    vm.set_nr_mmu_pages(64)
    assert refusal(vm.get_nr_mmu_pages) in (0, errno.ENOTTY)  # gone since Linux 6.4


@pytest.mark.requires_cap("PRE_FAULT_MEMORY")
@pytest.mark.covers("KVM_PRE_FAULT_MEMORY")
def test_memory_is_mapped_ahead(tiny: Maker) -> None:
    guest = tiny(b"\xf4")
    assert guest.vcpu.pre_fault_memory(0, 16 * PAGE) == 0


@pytest.mark.refused(
    "KVM_PRE_FAULT_MEMORY",
    "KVM_MEMORY_ENCRYPT_OP",
    "KVM_MEMORY_ENCRYPT_REG_REGION",
    "KVM_MEMORY_ENCRYPT_UNREG_REGION",
)
def test_what_this_vm_cannot_do_is_refused(tiny: Maker, region: Region) -> None:
    guest = tiny(b"\xf4")
    address, size = region.guest_address, region.n_bytes
    for attempt in (
        lambda: guest.vcpu.pre_fault_memory(1, 1),
        lambda: guest.vm.register_encrypted_region(address, size),
        lambda: guest.vm.unregister_encrypted_region(address, size),
        lambda: guest.vm.memory_encrypt_op(Struct("kvm_sev_cmd", id=0xFFFF)),
    ):
        with pytest.raises(IoctlError) as caught:
            attempt()
        assert caught.value.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP)
