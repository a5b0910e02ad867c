"""docs/kvm-api.md: made from the code, complete against the installed header."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvmhost._ffi import lib
from kvmhost.kvm import Cap


def load() -> ModuleType:
    path = Path(__file__).with_name("api_table.py")
    spec = importlib.util.spec_from_file_location("api_table", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["api_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = load()
ROWS = TABLE.rows()


def test_the_page_is_up_to_date() -> None:
    text = TABLE.DOCUMENT.read_text()
    found = text.split(TABLE.BEGIN)[1].split(TABLE.END)[0]
    assert found == TABLE.table(), "run python tests/kvm/bindings/api_table.py"


def test_no_request_of_the_installed_header_is_missing() -> None:
    listed = TABLE.header_ioctls()
    assert {"KVM_RUN", "KVM_GET_STATS_FD", "KVM_REGISTER_COALESCED_MMIO"} <= listed
    here = {n for n in listed if not TABLE.OTHER.match(n)} - set(TABLE.OTHER_NAMES)
    assert here - set(ROWS) - set(TABLE.LEFT_OUT) == set()
    assert not set(ROWS) & set(TABLE.LEFT_OUT)


@pytest.mark.parametrize("name", ROWS)
def test_every_request_is_wrapped_and_tested(name: str) -> None:
    row = ROWS[name]
    assert row.wrappers, "a test names a request that nothing makes"
    assert row.tests or row.refusals
    assert getattr(lib, name) >> 8 & 0xFF == 0xAE  # KVMIO


def test_capabilities_have_the_numbers_of_the_header() -> None:
    text = Path("/usr/include/linux/kvm.h").read_text()
    numbers = dict(re.findall(r"^#define KVM_CAP_(\w+)\s+(\d+)", text, re.M))
    wrong = {c.name for c in Cap if c.name in numbers and int(numbers[c.name]) != c}
    assert wrong == set()
    others = r"(S390|PPC|ARM|MIPS|SPAPR|RISCV|LOONGARCH)_|IRQ_MPIC|IRQ_XICS|SW_TLB"
    ours = {name for name in numbers if not re.match(others, name)}
    # A header of tomorrow may have more; none that this version was made with is lost.
    known = {name for name in ours if int(numbers[name]) <= Cap.GUEST_MEMFD_FLAGS}
    assert known - {"COUNTER_OFFSET"} <= set(Cap.__members__)
