"""The wrapper of structures: fields, dicts, bytes, numpy, printing. Needs no KVM."""

from __future__ import annotations

import gc
import pickle
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhost._ffi import ffi
from kvmhost.kvm import Struct
from kvmhost.kvm.descriptor import as_struct
from kvmhost.kvm.structs import Array, np_dtype

#: All structures with a size that is known before there is one.
FIXED = sorted(
    name
    for name in ffi.list_types()[1]
    if name.startswith("kvm_")
    and all(f.type.kind != "array" or f.type.length for _, f in ffi.typeof(f"struct {name}").fields)
)
TABLES = {
    "kvm_cpuid2": ("entries", {"function": 7, "eax": 0x1234}),
    "kvm_msrs": ("entries", {"index": 0x10, "data": 1 << 63}),
    "kvm_msr_list": ("indices", 0x174),
    "kvm_irq_routing": ("entries", {"gsi": 4, "type": 1, "u": {"irqchip": {"pin": 4}}}),
    "kvm_pmu_event_filter": ("events", 0xC0),
    "kvm_reg_list": ("reg", 1 << 61),
    "kvm_signal_mask": ("sigset", 255),
}


def test_there_are_many() -> None:
    assert {"kvm_regs", "kvm_sregs", "kvm_run", "kvm_irqchip", "kvm_vcpu_events"} <= set(FIXED)


@pytest.mark.parametrize("ctype", FIXED)
def test_round_trips(ctype: str) -> None:
    size = ffi.sizeof(f"struct {ctype}")
    filled = Struct.from_bytes(ctype, bytes(i % 251 for i in range(size)))
    assert len(bytes(filled)) == size
    assert Struct.from_bytes(ctype, filled.raw()) == filled == filled.copy()
    assert pickle.loads(pickle.dumps(filled)) == filled
    told = filled.to_dict()
    assert Struct.from_dict(ctype, told).to_dict() == told
    assert filled.numpy().tobytes() == bytes(filled)
    assert repr(filled).startswith(f"{ctype}(")
    assert not any(name.startswith(("pad", "reserved")) for name in told)


@pytest.mark.parametrize("ctype", TABLES)
def test_tables_count_their_entries(ctype: str) -> None:
    name, entry = TABLES[ctype]
    table = Struct(ctype, **{name: [entry] * 3})
    entries = getattr(table, name)
    assert len(entries) == 3
    again = Struct.from_bytes(ctype, bytes(table))
    assert again == table == pickle.loads(pickle.dumps(table))
    assert Struct.from_dict(ctype, table.to_dict()) == table
    assert len(entries.numpy()) == 3
    with pytest.raises(IndexError, match="item 3 of 3"):
        _ = entries[3]
    with pytest.raises(IndexError, match="4 values for 3 items"):
        setattr(table, name, [entry] * 4)
    assert entries[-1] == entries[2]
    assert len(entries[1:]) == 2


def test_views_share_memory() -> None:
    sregs = Struct("kvm_sregs", cr3=0x1000, cs={"base": 5, "selector": 0x23})
    view = sregs.numpy()
    view["cr3"] = 0x2000
    view["cs"]["selector"] = 0x33
    sregs.cs.base = 9
    assert (sregs.cr3, sregs.cs.selector, int(view["cs"]["base"])) == (0x2000, 0x33, 9)
    part = sregs.cs
    del sregs, view
    assert part.base == 9  # a part keeps the whole alive


def test_views_of_parts_keep_the_whole_alive() -> None:
    def views() -> list[Any]:
        sregs = Struct("kvm_sregs", gdt={"base": 0x1122334455667788})
        sregs.interrupt_bitmap.assign([1, 2, 3, 4])
        table = Struct("kvm_msrs", entries=[{"index": 5, "data": 6}] * 50)
        return [
            sregs.gdt.numpy(),
            sregs.gdt.raw(),
            sregs.interrupt_bitmap.numpy(),
            table.entries[49].raw(),
            table.entries.numpy(),
        ]

    kept = views()
    gc.collect()
    # Whatever was freed is written over.
    scribbled = [Struct.from_bytes("kvm_sregs", b"\xee" * 312) for _ in range(100)]
    scribbled += [Struct.from_bytes("kvm_msrs", b"\xee" * 808) for _ in range(100)]
    assert int(kept[0]["base"]) == 0x1122334455667788
    assert bytes(kept[1][:8]) == bytes.fromhex("8877665544332211")
    assert kept[2].tolist() == [1, 2, 3, 4]
    assert bytes(kept[3]) == struct.pack("<IIQ", 5, 0, 6)
    assert kept[4]["data"].tolist() == [6] * 50


def test_a_part_is_assigned_as_a_whole_or_by_fields() -> None:
    sregs = Struct("kvm_sregs", cs={"base": 5, "selector": 0x23})
    sregs.ds = sregs.cs
    sregs.cs = {"limit": 7}
    assert (sregs.cs.base, sregs.cs.limit) == (5, 7)
    assert (sregs.ds.base, sregs.ds.limit) == (5, 0)
    table = Struct.table("kvm_msrs", 2)
    table.entries[1] = {"index": 5}
    table.entries[0] = table.entries[1]
    assert [entry.index for entry in table.entries] == [5, 5]


def test_hex_where_people_expect_it() -> None:
    assert repr(Struct("kvm_dtable", base=0xFFF0, limit=10)) == "kvm_dtable(base=0xfff0, limit=0xa)"
    msi = Struct("kvm_irq_level", irq=24, level=1)
    assert repr(msi) == "kvm_irq_level(irq=24, level=1)"
    fpu = Struct("kvm_fpu")
    fpu.xmm[1][15] = 0xAB
    assert "00000000000000000000000000000000, 000000000000000000000000000000ab" in repr(fpu)
    assert repr(Struct("kvm_vcpu_events").nmi) == "(injected=0, pending=0, masked=0)"
    chip = Struct("kvm_irqchip", chip_id=2)
    assert "chip=(ioapic=kvm_ioapic_state(" in repr(chip)
    chip.chip_id = 0
    assert "chip=(pic=kvm_pic_state(" in repr(chip)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: setattr(s, "rop", 1), AttributeError, "struct kvm_regs has no field 'rop'"),
        (lambda s: s.rop, AttributeError, r"no field 'rop': \['rax'"),
        (lambda s: setattr(s, "rip", 1 << 64), OverflowError, "kvm_regs.rip"),
        (lambda s: setattr(s, "rip", -1), OverflowError, "kvm_regs.rip"),
        (lambda s: setattr(s, "rip", "x"), TypeError, "kvm_regs.rip"),
        (lambda s: Struct.from_bytes("kvm_regs", b"12"), ValueError, "2 bytes, need 144"),
        (lambda s: as_struct("kvm_sregs", s), TypeError, "not a struct kvm_regs"),
    ],
)
def test_mistakes_are_named(change: Any, error: type[Exception], message: str) -> None:
    regs = Struct("kvm_regs", rip=5)
    with pytest.raises(error, match=message):
        change(regs)
    assert regs.rip == 5


def test_an_entry_that_does_not_fit_is_named() -> None:
    with pytest.raises(OverflowError, match=r"kvm_msrs\.entries: kvm_msr_entry\.index"):
        Struct("kvm_msrs", entries=[{"index": 1 << 32}])


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)), max_size=40))
def test_msr_tables_are_laid_out_as_the_kernel_has_them(msrs: list[tuple[int, int]]) -> None:
    table = Struct("kvm_msrs", entries=[{"index": i, "data": d} for i, d in msrs])
    # u32 nmsrs, u32 pad; then u32 index, u32 reserved, u64 data each.
    expected = struct.pack("<II", len(msrs), 0)
    expected += b"".join(struct.pack("<IIQ", index, 0, data) for index, data in msrs)
    assert bytes(table) == expected
    assert [(int(e["index"]), int(e["data"])) for e in table.entries.numpy()] == msrs


def test_numpy_types_have_the_offsets_of_the_kernel() -> None:
    dtype = np_dtype("kvm_regs")
    assert dtype.itemsize == 144
    fields = dtype.fields
    assert fields is not None
    assert (fields["rip"][1], fields["rflags"][1]) == (128, 136)
    assert np_dtype("kvm_pit_channel_state")["count_load_time"] == np.dtype("<i8")
    lapic = Struct("kvm_lapic_state")
    lapic.regs.numpy()[0x20] = 7
    assert isinstance(lapic.regs, Array)
    assert bytes(lapic)[0x20] == 7
    assert lapic.to_dict()["regs"][0x20] == 7
