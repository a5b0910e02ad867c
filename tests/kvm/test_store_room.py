"""How much the store holds for what it keeps: sparse chunks are emptied, the limit is on memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import until

from kvmhost.errors import LayoutError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.pager.options import StoreOptions
from kvmhost.pager.results import EvictOutcome
from kvmhost.units import PAGE_BYTES

pytestmark = pytest.mark.requires_uffd

GFN, N = 0x400, 6000
CHUNK_BYTES = 32768
#: What passes leave alone: a few chunks of each size.
SPARE_BYTES = 16 * CHUNK_BYTES + 65 * CHUNK_BYTES


def pages_of_many_sizes() -> np.ndarray:
    rng = np.random.default_rng(7)
    pages = np.zeros((N, 512), dtype=np.uint64)
    for page, words in zip(pages, rng.integers(20, 500, N), strict=True):
        page[:words] = rng.integers(0, 1 << 63, words)
    return pages


@pytest.fixture(params=["memory", "file"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "store" if request.param == "file" else None


def make(options: StoreOptions) -> Iterator[Machine]:
    with Machine(
        image_path("hello"), mem_bytes=48 << 20, engine="emulated", store=options
    ) as machine:
        machine.memory.array(GFN * PAGE_BYTES, (N, 512), "<u8")[:] = pages_of_many_sizes()
        yield machine


@pytest.fixture
def machine(where: Path | None) -> Iterator[Machine]:
    yield from make(StoreOptions(path=where))


def seen(machine: Machine) -> np.ndarray:
    return machine.memory.array(GFN * PAGE_BYTES, (N, 512), "<u8").copy()


def is_tight(machine: Machine) -> bool:
    counters = machine.open_pager().counters()
    return bool(counters["store_held_bytes"] <= 2.5 * counters["store_bytes"] + SPARE_BYTES)


@pytest.mark.parametrize("how", ["restored", "touched"])
def test_store_of_which_most_came_back_holds_little(
    machine: Machine, where: Path | None, how: str
) -> None:
    pager = machine.open_pager()
    assert pager.evict(GFN + np.arange(N)).count(EvictOutcome.DONE) == N
    before = pager.counters()["store_held_bytes"]
    back = np.random.default_rng(1).permutation(N)[: N * 97 // 100]
    for page in back:
        if how == "restored":
            pager.restore(GFN + int(page))
        else:
            bytes(machine.memory.view((GFN + int(page)) * PAGE_BYTES, 1))
    until(lambda: is_tight(machine), "the sparse chunks are emptied")
    counters = pager.counters()
    assert counters["evicted_pages"] == N - back.size
    assert counters["store_held_bytes"] < before / 4
    assert counters["moved_records"] > 0
    if where is not None:
        assert where.stat().st_blocks * 512 <= counters["store_held_bytes"] + 2 * PAGE_BYTES
    np.testing.assert_array_equal(seen(machine), pages_of_many_sizes())
    assert pager.counters()["store_held_bytes"] == 0


def test_the_limit_is_on_what_is_held(where: Path | None) -> None:
    limit = 2 << 20
    for machine in make(StoreOptions(path=where, limit_bytes=limit)):
        pager, rng = machine.open_pager(), np.random.default_rng(2)
        for _ in range(6):
            result = pager.evict(GFN + rng.permutation(N))
            assert result.count(EvictOutcome.FULL) > 0
            counters = pager.counters()
            assert counters["store_bytes"] <= counters["store_held_bytes"] <= limit
            # Nearly all of it is of use, however often pages of all sizes came and went.
            assert counters["store_bytes"] > limit / 2
            out = result.gfns[result.outcomes == EvictOutcome.DONE]
            for gfn in rng.permutation(out)[: out.size * 9 // 10]:
                pager.restore(int(gfn))
            assert pager.counters()["store_held_bytes"] <= limit
        np.testing.assert_array_equal(seen(machine), pages_of_many_sizes())


def test_a_limit_that_no_chunk_fits_is_refused() -> None:
    for limit in (-1, 1, CHUNK_BYTES - 1):
        with pytest.raises(LayoutError, match="store limit"):
            StoreOptions(limit_bytes=limit)
