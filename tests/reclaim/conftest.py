"""VM and daemon processes, as a user starts them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from kvmhost.control.client import Client
from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.errors import VmGoneError

DEADLINE_S = 60


class Process:
    """A kvmhost command in a process of its own, its output in files."""

    def __init__(self, directory: Path, number: int, *words: str) -> None:
        self.out_path = directory / f"{number}-{words[0]}.out"
        self.err_path = directory / f"{number}-{words[0]}.err"
        with self.out_path.open("wb") as out, self.err_path.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvmhost", *words], stdout=out, stderr=err
            )
        self.pid = self.process.pid

    @property
    def out(self) -> str:
        return self.out_path.read_text()

    @property
    def err(self) -> str:
        return self.err_path.read_text()

    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds=DEADLINE_S) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; output:\n{self.out}{self.err}") from None

    def wait_for(self, text: str) -> None:
        def found() -> bool:
            return text in self.out or text in self.err or not self.running()

        until(found, f"{text!r} in the output")
        assert text in self.out + self.err, f"ended without {text!r}:\n{self.out}{self.err}"


class Vm(Process):
    """A guest with a control socket."""

    def __init__(self, directory, number, name, image, *words):
        super().__init__(directory, number, "run", image, "--name", name, *words)
        self.name = name
        self.client = Client(name)
        until(self._answers, f"VM {name} answers")

    def _answers(self) -> bool:
        assert self.running(), f"VM ended:\n{self.out}{self.err}"
        with contextlib.suppress(VmGoneError):
            return bool(self.client.state().pid)
        return False

    def pager(self):
        return self.client.counters().pager or {}

    def epochs(self) -> int:
        return self.client.state().doorbells

    def goes_on(self, epochs=5) -> bool:
        """Wait for so many more epochs."""
        seen = self.epochs()
        return bool(until(lambda: self.epochs() >= seen + epochs, "the guest goes on"))


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime directory for the test, which must be empty after it."""
    path = tmp_path / "run"
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(path))
    return path


@pytest.fixture
def start(tmp_path, runtime):
    """Start processes; at the end all are stopped and nothing may be left."""
    started = []

    def process(*words):
        started.append(Process(tmp_path, len(started), *words))
        return started[-1]

    def vm(name, image, *words):
        started.append(Vm(tmp_path, len(started), name, image, *words))
        return started[-1]

    process.vm = vm
    yield process
    killed = False
    for one in started:
        if isinstance(one, Vm):
            one.client.close()
        killed |= one.process.poll() == -signal.SIGKILL
        if one.running():
            one.signal(signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                one.end(20)
        if one.running():
            one.process.kill()
            one.process.wait()
            pytest.fail(f"had to be killed:\n{one.out}{one.err}")
    left = list(runtime.iterdir()) if runtime.exists() else []
    assert killed or left == []


@pytest.fixture
def hotcold(start):
    """Start a hotcold guest: 48 MiB touched, 8 MiB hot, in 64 MiB."""

    def run(name, *words, **params):
        given = {"pages": 12288, "hot": 2048, "epochs": 0} | params
        pairs = [word for key, value in given.items() for word in ("--param", f"{key}={value}")]
        return start.vm(name, "hotcold", "--mem", "64M", *pairs, *words)

    return run


@pytest.fixture
def daemon(start):
    """Start reclaimd with short passes."""

    def run(*words):
        return start("reclaimd", "--interval", "0.05", *words)

    return run
