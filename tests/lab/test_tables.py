"""Accessed bits in the tables that a host's own KVM built, harvested from outside.

The truth is computed: which gfns an epoch of the guest touches. Beside it stand the model of
this project, in which the same pages are touched, and the trackers inside the host.
"""

from __future__ import annotations

import numpy as np
import pytest

from kvmhost.errors import TableError
from kvmhost.guests import image_path
from kvmhost.lab.tables import open_tables
from kvmhost.mmu.memslots import MemSlot, MemSlots
from kvmhost.mmu.radix import RadixTable
from kvmhost.mmu.stage2 import Stage2Table
from kvmhost.mmu.tdp import TdpTable

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3000)]

#: Enough for a host that is emulated on a machine that others use.
DEADLINE_S = 2800.0
N_PAGES, STRIDE = 900, 3
SLOW = pytest.mark.slow
HOSTS = [
    "amd64-6.12",
    "arm64-6.12",
    "ppc64el-6.1",
    pytest.param("amd64-6.1", marks=SLOW),
    pytest.param("amd64-7.3", marks=SLOW),
    pytest.param("arm64-6.12-noaf", marks=SLOW),
    pytest.param("arm64-7.3", marks=SLOW),
    pytest.param("arm64-7.3-noaf", marks=SLOW),
]


def options(**more):
    return {"n_pages": N_PAGES, "stride": STRIDE, "image": str(image_path("touch")), **more}


def model_of(root, page_bytes):
    """A table of this project with the geometry of a root."""
    if root.table_format == "npt":
        return TdpTable("npt", levels=root.levels)
    if root.table_format == "stage2":
        return Stage2Table(root.ipa_bits)
    return RadixTable(page_bytes.bit_length() - 1)


@pytest.mark.parametrize("name", HOSTS)
def test_each_window_has_exactly_the_touched_pages(lab_host, name):
    host = lab_host(name)
    with open_tables(host, options(), timeout_s=DEADLINE_S) as tables:
        unit = tables.table().page_bytes // 4096
        touched = sorted({gfn // unit for gfn in tables.run_epoch()})
        start, n_pages = touched[0] - 5, touched[-1] - touched[0] + 10
        slots = MemSlots([MemSlot(0, start, n_pages, 1 << 40)], page_bytes=unit * 4096)
        with model_of(tables.table().root, unit * 4096) as model:
            model.set_slots(slots)
            for _ in range(3):
                young = tables.harvest(start, n_pages)
                for gfn in touched:
                    model.touch(gfn)
                assert young.gfns().tolist() == touched, "precision and recall 1.0"
                assert young == model.harvest(start, n_pages)
                assert young.coarse is None
                assert not tables.harvest(start, n_pages), "no page was used since"
                tables.run_epoch()
            # A test without clear leaves the bits; a mask leaves all but its own.
            assert tables.harvest(start, n_pages, clear=False).gfns().tolist() == touched
            mask = np.zeros((n_pages + 63) // 64, dtype=np.uint64)
            mask[0] = ~np.uint64(0)
            tables.harvest(start, n_pages, mask=mask)
            left = [gfn for gfn in touched if gfn >= start + 64]
            assert tables.harvest(start, n_pages).gfns().tolist() == left
        stats = tables.table().stats()
        assert stats["lost"] == stats["bad_pointers"] == 0
        tables.ask("close")
        with pytest.raises(TableError, match="no guest has a root; it was"):
            tables.harvest(start, n_pages)


@SLOW
@pytest.mark.parametrize("name", ["arm64-6.12", "ppc64el-6.1"])
def test_huge_leaves_are_coarse(lab_host, name):
    """Huge pages of the host: KVM maps them by leaves of level 2."""
    host = lab_host(name)
    with open_tables(host, options(huge=True, stride=512), timeout_s=DEADLINE_S) as tables:
        unit = tables.table().page_bytes // 4096
        touched = sorted({gfn // unit for gfn in tables.run_epoch()})
        span = (2 << 20) // (unit * 4096)
        start = touched[0] & -span
        for _ in range(2):
            young = tables.harvest(start, 4 * span)
            assert np.array_equal(young.coarse_as_bool(), young.as_bool())
            blocks = {gfn & -span for gfn in touched}
            leaves = [tables.table().leaf(gfn) for gfn in blocks]
            assert [leaf and leaf[0] for leaf in leaves] == [2] * len(blocks), "levels"
            assert set(young) == {gfn + i for gfn in blocks for i in range(span)}
            tables.run_epoch()


@SLOW
@pytest.mark.parametrize("tracker", ["guestpt", "pagemap"])
def test_trackers_inside_see_the_same(lab_host, tracker):
    host = lab_host("amd64-6.12")
    with open_tables(host, options(tracker=tracker), timeout_s=DEADLINE_S) as tables:
        for _ in range(3):
            touched = tables.run_epoch()
            start, n_pages = touched[0], touched[-1] - touched[0] + 1
            assert tables.harvest(start, n_pages).gfns().tolist() == touched
            assert tables.tracker_gfns() == touched
