"""The dispatcher: help of every command, unknown ones, exit codes of errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
from waiting import DEADLINE_S

from kvmhost import __version__
from kvmhost.errors import (
    CapabilityError,
    ControlError,
    GuestTimeout,
    ImageError,
    KvmHostError,
    LayoutError,
    UnexpectedExit,
)
from kvmhost.tools.bench import SUBCOMMANDS as BENCHES
from kvmhost.tools.commands import COMMANDS
from kvmhost.tools.ending import exit_code


def kvmhost(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmhost", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = kvmhost(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: kvmhost " + name)
    assert done.stderr == ""


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_has_help(name: str) -> None:
    done = kvmhost("bench", name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: kvmhost bench {name}")


@pytest.mark.parametrize("name", ["snapshot", "heatmap"])
def test_young_subcommands_have_help(name: str) -> None:
    done = kvmhost("young", name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: kvmhost young {name}")


def test_usage_and_version() -> None:
    assert kvmhost().returncode == 2
    assert kvmhost("--help").returncode == 0
    assert kvmhost("--version").stdout == f"kvmhost {__version__}\n"
    unknown = kvmhost("frobnicate")
    assert unknown.returncode == 2
    assert "unknown command 'frobnicate'" in unknown.stderr
    assert kvmhost("bench", "frobnicate").returncode == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LayoutError("x"), 2),
        (ImageError("f", "field", "x"), 2),
        (ControlError(400, "x"), 2),
        (ControlError(500, "x"), 1),
        (ControlError(501, "x"), 126),
        (GuestTimeout(1), 124),
        (UnexpectedExit(0, "x"), 125),
        (KvmHostError("x"), 125),
        (CapabilityError("a", "b", "c", "d"), 126),
    ],
)
def test_exit_codes_of_errors(error: KvmHostError, code: int) -> None:
    assert exit_code(error) == code
