"""Turns: one at a time, in order, and nobody keeps others waiting for ever."""

from __future__ import annotations

import threading

import pytest
from waiting import DEADLINE_S

from kvmhost.engine.turns import Turns


def in_threads(*works: object) -> None:
    threads = [threading.Thread(target=work) for work in works]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=DEADLINE_S)
        assert not thread.is_alive()


def test_one_at_a_time() -> None:
    turns, inside, most = Turns(slice_s=0.0001), [], []

    def work() -> None:
        for _ in range(300):
            with turns.turn(lambda: None):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    in_threads(work, work, work)
    assert len(most) == 900
    assert max(most) == 1


def test_the_holder_is_interrupted_for_who_waits() -> None:
    turns, leave, held = Turns(slice_s=0.001), threading.Event(), threading.Event()
    order: list[str] = []

    def holder() -> None:
        with turns.turn(leave.set):
            held.set()
            assert leave.wait(DEADLINE_S), "nobody interrupted"
            order.append("holder")

    def waiter() -> None:
        assert held.wait(DEADLINE_S)
        with turns.turn(lambda: None):
            order.append("waiter")

    in_threads(holder, waiter)
    assert order == ["holder", "waiter"]


def test_nobody_is_interrupted_without_need() -> None:
    turns, interrupted = Turns(), []
    for _ in range(3):
        with turns.turn(lambda: interrupted.append(1)):
            pass
    assert interrupted == []


def test_a_turn_ends_with_an_error_too() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.turn(lambda: None):
        raise KeyError
    with turns.turn(lambda: None):
        pass
