"""Pauses of the control socket never outlive it, whatever was under way when it closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvmhost.control.pauses import Pauses
from kvmhost.errors import PauseTimeout

SOON = 60.0


class CountingMachine:
    """Counts pauses; :attr:`may_pause` and :attr:`may_stop` let the calls through."""

    def __init__(self) -> None:
        self.pauses = 0
        self.error: Exception | None = None
        self.pausing, self.may_pause = threading.Event(), threading.Event()
        self.may_pause.set()
        self.stopped = threading.Event()

    def pause(self) -> None:
        self.pausing.set()
        assert self.may_pause.wait(SOON)
        if self.error is not None:
            raise self.error
        self.pauses += 1

    def resume(self) -> None:
        self.pauses = max(0, self.pauses - 1)

    def stop(self) -> None:
        self.stopped.set()
        self.may_pause.set()


def make(machine: CountingMachine) -> Pauses:
    async def work(call: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(call)

    return Pauses(machine, "vm", work)  # type: ignore[arg-type]


def test_closing_ends_the_pauses_of_the_socket_and_no_others() -> None:
    machine = CountingMachine()

    async def run() -> None:
        pauses = make(machine)
        machine.pause()  # somebody else's
        await pauses.pause(0)
        await pauses.pause(60)
        assert machine.pauses == 3
        pauses.close()

    asyncio.run(run())
    assert machine.pauses == 1


def test_a_pause_that_is_under_way_when_the_socket_closes_ends_too() -> None:
    machine = CountingMachine()

    async def run() -> None:
        pauses = make(machine)
        machine.may_pause.clear()
        asked = asyncio.create_task(pauses.pause(0))
        await asyncio.to_thread(machine.pausing.wait, SOON)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        pauses.close()
        machine.may_pause.set()

    asyncio.run(run())  # waits for the worker thread
    assert machine.pauses == 0


def test_a_pause_that_fails_leaves_nothing_to_undo() -> None:
    machine = CountingMachine()

    async def run() -> None:
        pauses = make(machine)
        machine.error = PauseTimeout([0], 30.0)
        with pytest.raises(PauseTimeout):
            await pauses.pause(0)
        machine.error = None
        assert await pauses.pause(0) == 1
        await pauses.resume(1)

    asyncio.run(run())
    assert machine.pauses == 0


def test_stop_does_not_wait_for_a_pause() -> None:
    machine = CountingMachine()

    async def run() -> None:
        pauses = make(machine)
        machine.may_pause.clear()
        asked = asyncio.create_task(pauses.pause(0))
        await asyncio.to_thread(machine.pausing.wait, SOON)
        await asyncio.wait_for(pauses.stop(), SOON)
        await asked

    asyncio.run(run())
    assert machine.stopped.is_set()
