"""``kvmhost young watch`` in a real terminal (tmux), on a real VM whose touches are known."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys

import pytest
from waiting import DEADLINE_S, until

from kvmhost.control.client import Client
from kvmhost.errors import VmGoneError

PARAMS = {"pages": 4096, "hot": 1024, "cold": 0, "scan_every": 0, "epochs": 0}


@pytest.fixture
def vm(tmp_path, monkeypatch):
    """A VM named ``v`` that touches its hot set only, as a process to be ended."""
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path / "run"))
    pairs = [word for key, value in PARAMS.items() for word in ("--param", f"{key}={value}")]
    words = ["run", "hotcold", "--name", "v", "--mem", "24M", *pairs]
    process = subprocess.Popen([sys.executable, "-m", "kvmhost", *words])

    def beyond_first_epoch():
        try:
            with Client("v") as client:
                return client.state().doorbells > 3
        except VmGoneError:
            assert process.poll() is None
            return False

    until(beyond_first_epoch, "the first epochs")
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait(DEADLINE_S)


def watch(terminal, *words):
    runtime = shlex.quote(os.environ["KVMHOST_RUNTIME_DIR"])
    command = shlex.join([sys.executable, "-m", "kvmhost", "young", "watch", *words])
    terminal.type(f"KVMHOST_RUNTIME_DIR={runtime} {command}; echo ended $?")
    terminal.keys("Enter")


@pytest.mark.requires_kvm
@pytest.mark.parametrize(("width", "height"), [(80, 24), (132, 43)])
def test_it_shows_the_vm_obeys_keys_and_leaves_the_terminal_clean(vm, terminal, width, height):
    screen = terminal(width, height)
    watch(screen, "v", "--interval", "0.2")
    # The hot set, all of which is young in each window, and memory that nobody touches.
    screen.shows("████████")
    until(lambda: len(screen.screen()) == height, "all lines")
    lines = screen.shows("own cost")
    assert lines[0].startswith(" v  guestpt (npt)")
    assert lines[-1].startswith(" arrows")
    assert max(len(line) for line in lines) <= width
    assert any(line.strip().startswith("0x0 ") for line in lines)
    assert any("········" in line for line in lines)
    assert any(line.startswith(" wss of 10 ticks") for line in lines)
    screen.keys("+")
    screen.keys("Space")
    screen.shows("PAUSED")
    screen.keys("?")
    screen.shows("any key closes this")
    screen.keys("x")
    screen.shows("PAUSED")
    screen.keys("Space")
    screen.keys("m")
    screen.shows("since tick")
    screen.keys("q" if width == 80 else "C-c")
    lines = screen.shows("ended 0")
    assert not any("own cost" in line for line in lines)
    assert screen.run("display-message", "-p", "#{alternate_on} #{mouse_any_flag}") == "0 0\n"
    screen.type("echo typed-$((1+1))")
    assert any("$ echo typed-$((1+1))" in line for line in screen.shows("typed-"))


@pytest.mark.requires_kvm
def test_a_vm_that_ends_is_said_and_the_view_stays(vm, terminal):
    screen = terminal(80, 24)
    watch(screen, "v", "--interval", "0.2")
    screen.shows("own cost")
    vm.send_signal(signal.SIGTERM)
    vm.wait(DEADLINE_S)
    lines = screen.shows("VM 'v'")
    assert any("0x0" in line for line in lines)
    screen.keys("q")
    screen.shows("ended 0")


def test_no_such_vm_and_no_terminal(tmp_path, monkeypatch, terminal):
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "kvmhost", "young", "watch", "v"],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr
    screen = terminal(80, 24)
    watch(screen, "v")
    lines = screen.shows("ended 1")
    assert any("nothing answers" in line for line in lines)
