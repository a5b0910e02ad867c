"""``kvmhost list``, ``top``, ``pause``, ``resume`` and ``stop``, on VMs that run as processes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from json_page import checked
from terminals import Terminal
from waiting import DEADLINE_S, until

from kvmhost.control.client import Client
from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.errors import VmGoneError
from kvmhost.tools.main import main

Run = Callable[[str], "subprocess.Popen[bytes]"]
NOBODY = 65534
PARAMS = ("pages=1000", "hot=100", "scan_every=0", "epochs=0")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Start VMs by name, and wait until each of them runs."""
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path / "run"))
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str) -> subprocess.Popen[bytes]:
        pairs = [word for pair in PARAMS for word in ("--param", pair)]
        words = ["run", "hotcold", "--name", name, "--mem", "16M", "--engine", "emulated", *pairs]
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmhost", *words], stderr=subprocess.PIPE
        )
        started.append(process)
        until(lambda: doorbells(name) > 0, f"{name} runs")
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(DEADLINE_S)
        assert process.stderr is not None
        process.stderr.close()


def doorbells(name: str) -> int:
    try:
        with Client(name) as client:
            return client.state().doorbells
    except VmGoneError:
        return 0


def test_the_socket_is_printed_without_a_terminal(run: Run, tmp_path: Path) -> None:
    process = run("a")
    assert process.stderr is not None
    shown = process.stderr.readline().decode()
    assert shown == f"control socket: {tmp_path / 'run' / 'a.sock'}\n"


def test_list_shows_what_runs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err.startswith("no VM runs here")) == ("", True)
    first, second = run("first"), run("second")
    assert main(["list"]) == 0
    titles, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["first", "second"]
    assert rows[0][titles.index("ENGINE")] == "emulated"
    second.kill()
    second.wait(DEADLINE_S)
    assert main(["list", "--json"]) == 0
    (listed,) = checked("list", capsys.readouterr().out)
    (vm,) = listed["vms"]
    assert (vm["vm"], vm["uid"], vm["problem"]) == ("first", os.geteuid(), "")
    assert vm["condition"] == "running"
    assert (vm["state"]["pid"], vm["state"]["engine"]) == (first.pid, "emulated")
    assert vm["state"]["n_exits"] >= 1


def test_a_vm_that_does_not_answer_is_listed_and_delays_no_other(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = run("a")
    run("b")
    stopped.send_signal(signal.SIGSTOP)
    try:
        assert main(["list", "--timeout", "3"]) == 1
    finally:
        stopped.send_signal(signal.SIGCONT)
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].split()[:2] == ["a", "silent"]
    assert "kvmhost list: a: no answer in time" in shown.err


def test_an_unknown_name_is_told_which_vms_run(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("vm1")
    for command in (["pause", "vm2"], ["resume", "vm2"], ["stop", "vm2"], ["limit", "vm2", "1M"]):
        assert main(command) == 1, command
        assert "did you mean 'vm1'? (running: vm1)" in capsys.readouterr().err


def test_pauses_add_up_and_are_undone_by_number(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("a")
    assert main(["pause", "a"]) == main(["pause", "a", "--json"]) == 0
    text, answer = capsys.readouterr().out.splitlines()
    assert text == "a: paused (pause 1)"
    assert checked("pause", answer + "\n")[0]["pause_number"] == 2
    before = doorbells("a")
    assert main(["resume", "a", "--pause", "1"]) == 0
    assert capsys.readouterr().out == "a: still paused, by another pause\n"
    assert doorbells("a") == before
    assert main(["resume", "a", "--json"]) == 0
    (answer,) = checked("resume", capsys.readouterr().out)
    assert answer == {"vm": "a", "running": True, "paused": False, "pause_number": None}
    until(lambda: doorbells("a") > before, "the guest runs on")
    assert main(["resume", "a", "--pause", "7"]) != 0
    assert "pause 7 is over" in capsys.readouterr().err


def test_a_pause_with_a_duration_ends_by_itself(run: Run) -> None:
    run("a")
    assert main(["pause", "a", "--duration", "0.2"]) == 0
    before = doorbells("a")
    until(lambda: doorbells("a") > before, "the pause ends")


def test_stop_ends_several_and_tells_of_each(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    processes = [run("a"), run("b")]
    assert main(["pause", "b"]) == 0
    capsys.readouterr()
    assert main(["stop", "a", "nobody", "b"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "a: ended\nb: ended\n"
    assert "'nobody'" in shown.err
    assert all(process.wait(DEADLINE_S) is not None for process in processes)
    assert main(["stop", "a", "--json"]) == 1
    ((row,),) = [answer["vms"] for answer in checked("stop", capsys.readouterr().out)]
    assert (row["vm"], row["ended"], "nothing answers" in row["problem"]) == ("a", False, True)


def test_stop_gives_up_on_a_vm_that_hangs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    process = run("a")
    process.send_signal(signal.SIGSTOP)
    try:
        assert main(["stop", "a", "--timeout", "1"]) == 124
    finally:
        process.send_signal(signal.SIGCONT)
    assert capsys.readouterr().err.startswith("kvmhost stop: ")


@pytest.mark.requires_root
def test_root_sees_the_vms_of_other_users(capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing; install util-linux")
    as_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    environment = {key: value for key, value in os.environ.items() if key != RUNTIME_DIR_ENV}
    environment |= {"KVMHOST_HIDE_KVM": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("XDG_RUNTIME_DIR", None)
    if subprocess.run([*as_nobody, sys.executable, "-c", "import kvmhost"], cwd="/").returncode:
        pytest.skip("nobody cannot read this interpreter or checkout; put them where all can")
    name = f"test-{os.getpid()}"
    pairs = [word for pair in PARAMS for word in ("--param", pair)]
    words = ["run", "hotcold", "--name", name, "--mem", "16M", *pairs]
    with subprocess.Popen(
        [*as_nobody, sys.executable, "-m", "kvmhost", *words],
        env=environment, cwd="/", stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            socket = process.stderr.readline().removeprefix("control socket: ").strip()
            assert Path(socket).name == f"{name}.sock"
            assert main(["list", "--json"]) in (0, 1)
            vms = {vm["socket"]: vm for vm in json.loads(capsys.readouterr().out)["vms"]}
            assert (vms[socket]["uid"], vms[socket]["vm"]) == (NOBODY, socket)
            assert main(["stop", vms[socket]["vm"]]) == 0
            process.wait(DEADLINE_S)
        finally:
            process.kill()


def test_top_shows_the_table_and_pauses_the_vm_under_the_cursor(
    run: Run, terminal: Callable[[int, int], Terminal]
) -> None:
    run("a")
    run("b")
    screen = terminal(150, 12)
    runtime = shlex.quote(os.environ[RUNTIME_DIR_ENV])
    command = shlex.join([sys.executable, "-m", "kvmhost", "top", "--interval", "0.2"])
    screen.type(f"{RUNTIME_DIR_ENV}={runtime} {command}; echo ended $?")
    screen.keys("Enter")
    lines = screen.shows("EXITS/S")
    screen.shows(" b ")
    until(lambda: any(line.startswith(" a ") for line in screen.screen()), "both VMs")
    assert max(map(len, lines)) <= 150
    screen.keys("Down")
    screen.keys("p")
    screen.shows("paused")
    with Client("b") as client:
        until(lambda: client.state().paused, "b is paused")
    with Client("a") as client:
        assert not client.state().paused
    screen.keys("p")
    with Client("b") as client:
        until(lambda: not client.state().paused, "b runs")
    screen.keys("s")
    screen.shows("sorted by USER")
    screen.keys("q")
    screen.shows("ended 0")


def test_top_needs_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top"]) == 2
    assert "kvmhost list --json" in capsys.readouterr().err
