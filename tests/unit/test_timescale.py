"""One factor for all time-outs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmhost.errors import LayoutError
from kvmhost.timescale import VARIABLE, check_time_scale, scaled


def test_time_outs_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert scaled(30.0) == 30.0
    monkeypatch.setenv(VARIABLE, "20")
    check_time_scale()
    assert scaled(30.0) == 600.0


@pytest.mark.parametrize("text", ["0", "0.5", "-1", "nan", "inf", "1001", "fast"])
def test_an_invalid_factor_is_one_and_is_refused_by_commands(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert scaled(30.0) == 30.0
    with pytest.raises(LayoutError, match=f"{VARIABLE}='{text}'"):
        check_time_scale()


def test_a_command_names_the_invalid_factor() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmhost", "lab", "list"],
        env={**os.environ, VARIABLE: "x"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "kvmhost lab list: KVMHOST_TIME_SCALE='x': need a number from 1 to 1000\n"
    )


def test_the_time_outs_of_machines_are_scaled() -> None:
    code = (
        "from kvmhost.machine import runner, running; from kvmhost.control import schema\n"
        "print(running.EPOCH_TIMEOUT_S, runner.PAUSE_TIMEOUT_S, schema.CLIENT_TIMEOUT_S)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, VARIABLE: "3"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "180.0 90.0 180.0\n"
