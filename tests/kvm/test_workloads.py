"""The guests touch what guests/workloads.py says, whichever way a workload is put together."""

from __future__ import annotations

from collections import Counter
from decimal import ROUND_FLOOR, Decimal, localcontext

import numpy as np
import pytest
from waiting import DEADLINE_S

from kvmhost.guests import image_path
from kvmhost.guests.workloads import hotcold_gfns, hotcold_written_gfns, zipf_ranks, zipf_sums
from kvmhost.machine import Machine

MEM_BYTES = 32 << 20
ENGINES = [pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
START, PAGES = 1024, 3000
INGREDIENTS = {
    "zipf-0.9": {"hot": 0, "cold": 0, "zipf": 400, "scan_every": 0},
    "zipf-0.99": {"hot": 0, "cold": 5, "zipf": 400, "zipf_permille": 990, "scan_every": 0},
    "phases": {"hot": 300, "phase_every": 2, "phase_step": 700, "scan_every": 0},
    "zipf-phases": {"hot": 0, "zipf": 200, "phase_every": 1, "phase_step": 1001},
    "scan-over-hot-set": {"hot": 300, "passes": 3, "scan_every": 3, "scan_epochs": 2},
    "nothing": {"hot": 300, "passes": 0, "cold": 0, "scan_every": 0},
    "few-words": {"hot": 300, "words": 1, "think": 100, "write_permille": 1000},
    "read-only": {"hot": 300, "words": 7, "write_permille": 0},
}


def hotcold(engine: str, n_vcpus: int = 1, **params: int) -> Machine:
    params = {"gfn_start": START, "pages": PAGES, "epochs": 0} | params
    return Machine(
        image_path("hotcold"), mem_bytes=MEM_BYTES, engine=engine, n_vcpus=n_vcpus, params=params
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n_vcpus", [1, 2])
@pytest.mark.parametrize("name", INGREDIENTS)
def test_the_guest_touches_what_was_computed(engine: str, n_vcpus: int, name: str) -> None:
    with hotcold(engine, n_vcpus, **INGREDIENTS[name]) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker("guestpt")
        for epoch in range(6):
            assert machine.run_epoch()
            young = tracker.harvest(START, PAGES + 8)
            tracker.rearm(START, PAGES + 8, young)
            touched = young.gfns()
            expected = hotcold_gfns(machine.params, epoch, n_vcpus)
            assert touched[touched < START + PAGES].tolist() == expected.tolist()


@pytest.mark.requires_kvm
@pytest.mark.requires_cap("MANUAL_DIRTY_LOG_PROTECT2")
@pytest.mark.parametrize("name", INGREDIENTS)
def test_the_guest_writes_what_was_computed(name: str) -> None:
    with hotcold("kvm", 2, **INGREDIENTS[name]) as machine:
        machine.step_by_doorbell()
        tracker = machine.use_tracker("dirty")
        for epoch in range(4):
            assert machine.run_epoch()
            expected = hotcold_written_gfns(machine.params, epoch, 2)
            assert tracker.harvest(START, PAGES).gfns().tolist() == expected.tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("permille", [0, 500, 900, 990, 1000, 2000])
def test_the_guests_zipf_weights_are_those_of_the_definition(engine: str, permille: int) -> None:
    n_ranks = 3000
    with hotcold(engine, zipf=1, zipf_permille=permille, pages=n_ranks) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        notes = (START + n_ranks) * 4096 + n_ranks * 4
        sums = machine.memory.array(notes, n_ranks, "<u8").copy()
    assert np.array_equal(sums, zipf_sums(n_ranks, permille))


def test_the_definition_of_zipf_in_fifty_digits() -> None:
    with localcontext() as context:
        context.prec, context.rounding = 50, ROUND_FLOOR
        one, two = Decimal(1 << 24), Decimal(2)
        sums = zipf_sums(600, 990)
        for k in range(1, 600):
            # Rounded first, so that powers of two are the whole numbers that they are.
            log = (Decimal(k + 1).ln() / two.ln()).quantize(Decimal("1e-30"), "ROUND_HALF_EVEN")
            exponent = 990 * int(log * one) // 1000
            weight = int(two ** (32 - exponent / one))
            assert int(sums[k] - sums[k - 1]) == weight


def test_zipf_draws_have_the_frequencies_of_zipf() -> None:
    draws = np.random.default_rng(7).integers(0, 1 << 64, 200_000, dtype=np.uint64)
    for permille in (900, 990):
        counts = Counter(zipf_ranks(draws, 10_000, permille).tolist())
        weights = np.arange(1, 10_001) ** -(permille / 1000)
        expected = draws.size * weights / weights.sum()
        for rank in range(20):
            assert abs(counts[rank] - expected[rank]) < 6 * expected[rank] ** 0.5
        assert sum(counts[rank] for rank in range(1000, 10_000)) == pytest.approx(
            expected[1000:].sum(), rel=0.02
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "bad",
    [{"pages": 7165}, {"pages": 7140, "zipf": 1}, {"words": 513}, {"words": 0}, {"hot": 2900},
     {"gfn_start": 16}, {"pages": 0}],
)  # fmt: skip
def test_parameters_that_do_not_fit_are_refused(engine: str, bad: dict[str, int]) -> None:
    with hotcold(engine, **bad) as machine:
        machine.start()
        assert machine.wait(DEADLINE_S) == 2
        assert "do not fit" in machine.console_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_results_count_touches_and_name_a_wrong_word(engine: str) -> None:
    params = {"hot": 300, "cold": 10, "zipf": 50, "scan_every": 0, "words": 2}
    with hotcold(engine, **params) as machine:
        machine.step_by_doorbell()
        machine.run_epoch()
        assert machine.result().touches == PAGES
        machine.run_epoch()
        assert (machine.result().touches, machine.result().epoch) == (PAGES + 360, 1)
        first_hot = (START + PAGES // 4) << 12
        # Beyond the checked words first: nobody looks there.
        machine.memory[first_hot + 16 : first_hot + 17] = b"\xff"
        assert machine.run_epoch()
        wrong = bytes(byte ^ 1 for byte in machine.memory[first_hot + 8 : first_hot + 9])
        machine.memory[first_hot + 8 : first_hot + 9] = wrong
        assert not machine.run_epoch()
        result = machine.result()
        assert (machine.wait(DEADLINE_S), result.status, result.gfn) == (1, 1, START + PAGES // 4)
        assert (result.epoch, result.word, result.touches) == (3, 1, PAGES + 720)
        assert result.expected ^ result.found == 1
