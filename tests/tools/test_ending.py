"""How commands end: signals, closed and full output, what the system refuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

from kvmhost.errors import ControlError, HostError
from kvmhost.tools.ending import Ended, exit_code, guard, message_of

KVMHOST = [sys.executable, "-m", "kvmhost"]


def shell(script: str, **names: str) -> subprocess.CompletedProcess[str]:
    """Run a script in which ``$K`` is the command."""
    words = ["bash", "-c", 'K() { "$PYTHON" -m kvmhost "$@"; }; ' + script]
    environment = os.environ | {"PYTHON": sys.executable} | names
    return subprocess.run(
        words, capture_output=True, text=True, timeout=DEADLINE_S, env=environment
    )


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtime"
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **options: object) -> subprocess.Popen[bytes]:
        processes.append(
            subprocess.Popen([*KVMHOST, *words], stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


ENDS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_ends_run_and_leaves_no_socket(
    number: int, code: int, runtime: Path, started: Callable[..., subprocess.Popen[bytes]]
) -> None:
    vm = started("run", "hotcold", "--engine", "emulated", "--name", "ended", "--param", "epochs=0")
    until(lambda: runtime.is_dir() and any(runtime.glob("ended*.sock")), process=vm)
    # Where the socket is there, the machine may not be: the signal waits for it.
    vm.send_signal(number)
    assert vm.wait(DEADLINE_S) == code
    assert not list(runtime.glob("*.sock"))


@pytest.mark.parametrize(("number", "code"), ENDS)
def test_a_signal_ends_a_command_with_its_number(number: int, code: int) -> None:
    def command() -> int:
        os.kill(os.getpid(), number)
        time.sleep(DEADLINE_S)
        return 0

    assert guard("kvmhost test", command) == code
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_cleanup_is_not_interrupted_by_a_second_signal() -> None:
    cleaned = []

    def command() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(DEADLINE_S)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)
        return 0

    assert guard("kvmhost test", command) == 143
    assert cleaned == [True]


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def command() -> int:
            os.kill(os.getpid(), signal.SIGHUP)
            return 7

        assert guard("kvmhost test", command) == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ended_is_an_interrupt() -> None:
    assert issubclass(Ended, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HostError("f", errno.ENOSPC), 1),
        (HostError("f", errno.EISDIR), 2),
        (OSError(errno.EFBIG, "x"), 1),
        (FileNotFoundError(errno.ENOENT, "x", "f"), 2),
        (PermissionError(errno.EACCES, "x", "f"), 2),
        (MemoryError(), 1),
    ],
)
def test_exit_codes_of_the_system(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_messages_have_no_number() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    assert message_of(full).startswith("/a/b: No space left on device; ")
    assert message_of(OSError(errno.EBADF, "x")) == "Bad file descriptor"
    assert message_of(OSError("plain")) == "plain"


@pytest.mark.parametrize(
    "command", ["guests", "guests --json", "run hello --help", "--help", "doctor --json"]
)
def test_output_to_a_full_disk_is_one_line(command: str) -> None:
    done = shell(f"K {command} >/dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith("standard output: No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["guests", "run hello", "run --help"])
def test_closed_output_is_one_line(command: str) -> None:
    done = shell(f"K {command} >&-")
    assert done.returncode == 1
    assert "standard output is closed" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["guests", "run --help", "young --help"])
def test_a_reader_that_has_gone_is_no_news(command: str) -> None:
    done = shell(f"K {command} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stderr == ""
    # The reader may still have been there for so little.
    assert done.stdout in ("0\n", "1\n")


def test_closed_input_and_errors_are_replaced() -> None:
    done = shell("K guests <&- 2>&-")
    assert done.returncode == 0
    assert done.stdout


def test_output_of_a_guest_that_is_lost_is_told() -> None:
    done = shell("K run hello >/dev/full")
    assert done.returncode == 1
    assert "output could not be written" in done.stderr


@pytest.mark.parametrize(
    ("limit", "text"),
    [("-f 20000", "File too large"), ("-v 400000", "Cannot allocate memory")],
)
def test_memory_that_the_system_refuses_is_one_line(limit: str, text: str) -> None:
    done = shell(f"ulimit {limit}; K run hello --mem 512M")
    assert done.returncode == 1
    assert done.stderr.startswith("kvmhost run: guest memory of 536,870,912 bytes: " + text)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("size", ["0", "4T", "400T", "1"])
def test_memory_sizes_out_of_range_are_wrong_usage(size: str) -> None:
    done = shell(f"K run hello --mem {size}")
    assert done.returncode == 2
    assert "mem" in done.stderr.splitlines()[-1]
    assert "-0x" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("status", "code"), [(501, 126), (400, 2), (409, 1)])
def test_a_refusal_of_the_vm_has_its_code_in_record(
    status: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    from kvmhost.tools.young import record

    def refusing(vm: str | None, pid: int | None, mapping: str) -> None:
        raise ControlError(status, "no")

    monkeypatch.setattr(record, "open_source", refusing)
    assert record.main(["vm", "-o", str(tmp_path / "r")]) == code
