"""Kicks in all interleavings: the shipped order holds, each order that is tempting does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvmhost.engine.kickmodel
from kvmhost.engine.kickmodel import KICKS, LOWERINGS, explore_kicks


@pytest.mark.parametrize("kickers", [1, 2, 3])
def test_the_shipped_order_loses_no_kick_and_never_spins(kickers: int) -> None:
    report = explore_kicks(KICKS[0], LOWERINGS[0], kickers=kickers)
    assert (report.failed, report.deadlocks) == (0, 0)
    assert report.schedules >= 300


@pytest.mark.parametrize(
    ("kick", "lowering", "needed"),
    [
        ("raise, look, signal", "see, then lower", 2),
        ("look, raise, signal", "lower, then see", 1),
        ("raise, signal refused", "lower, then see", 1),
        ("two words", "two words", 2),
    ],
)
def test_other_orders_fail(kick: str, lowering: str, needed: int) -> None:
    report = explore_kicks(kick, lowering, kickers=needed)
    assert 0 < report.failed < report.schedules
    assert report.example[-1] == "end"


def test_two_words_fail_only_with_two_kickers() -> None:
    """Why tests with one kicker at a time never saw it."""
    assert explore_kicks("two words", "two words", kickers=1).failed == 0


def test_the_code_names_the_steps_of_the_model() -> None:
    model = Path(kvmhost.engine.kickmodel.__file__ or "")
    table = re.findall(r"^(?:kicker|vCPU) +``(\w+)``", model.read_text(), re.M)
    code = (model.parents[1] / "_core/vcpu.c").read_text()
    named = set(re.findall(r"\[(\w+)\]", re.sub(r"^(?!.*(?:/\*|^\s\*)).*$", "", code, flags=re.M)))
    in_python = {"request", "see"}
    in_the_kernel = {"check"}
    assert set(table) - in_python - in_the_kernel == named
