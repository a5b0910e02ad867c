"""Wait for a condition, with a deadline that a slow machine meets."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kvmhost.timescale import scaled

__all__ = ["DEADLINE_S", "until", "until_async"]

DEADLINE_S = scaled(120.0)
_STEP_S = 0.005

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    what: str = "the condition",
    seconds: float = DEADLINE_S,
    *,
    process: subprocess.Popen[Any] | None = None,
) -> T:
    """Return the first true value of a condition.

    :param process: fail at once if it ends before
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before: {what}")
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(_STEP_S)
    return found


async def until_async(
    condition: Callable[[], T],
    step: Callable[[], Awaitable[Any]],
    what: str = "the condition",
    seconds: float = DEADLINE_S,
) -> T:
    """Return the first true value of a condition; await ``step`` before each test of it."""
    deadline = time.monotonic() + seconds
    while True:
        await step()
        if found := condition():
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(_STEP_S)
