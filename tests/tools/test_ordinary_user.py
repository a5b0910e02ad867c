"""An ordinary user gets as far as the kernel lets him, and is told how to get further."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.requires_root

NOBODY = 65534
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def as_nobody() -> Command:
    """Run the command as nobody, who has no /dev/kvm."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing; install util-linux")
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    home = Path(f"/tmp/kvmhost-test-nobody-{os.getpid()}")
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    environment = os.environ | {
        "HOME": str(home),
        "KVMHOST_RUNTIME_DIR": str(home / "run"),
        "KVMHOST_HIDE_KVM": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    probe = subprocess.run([*words, sys.executable, "-c", "import kvmhost"], capture_output=True)
    if probe.returncode:
        shutil.rmtree(home)
        pytest.skip("nobody cannot read this interpreter or checkout; put them where all can")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*words, sys.executable, "-m", "kvmhost", *command],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield run
    shutil.rmtree(home)


@pytest.fixture
def no_userfaultfd(as_nobody: Command) -> None:
    """Skip where even nobody may have a userfaultfd."""
    code = "from kvmhost.pager.userfault import probe; raise SystemExit(probe() is not None)"
    words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if subprocess.run([*words, sys.executable, "-c", code]).returncode == 0:
        pytest.skip("every user has userfaultfd here: vm.unprivileged_userfaultfd is 1")


def test_a_guest_runs_without_kvm(as_nobody: Command) -> None:
    done = as_nobody("run", "hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hello")


def test_kvm_that_is_asked_for_is_126(as_nobody: Command) -> None:
    done = as_nobody("run", "hello", "--engine", "kvm")
    assert done.returncode == 126
    assert done.stderr.count("\n") == 1
    assert "/dev/kvm" in done.stderr


@pytest.mark.usefixtures("no_userfaultfd")
@pytest.mark.parametrize(
    "command",
    [
        ("run", "hotcold", "--resident-max", "16M", "--param", "epochs=0"),
        ("demo", "-o", "picture.png"),
    ],
)
def test_eviction_without_userfaultfd_names_every_way_to_it(
    as_nobody: Command, command: tuple[str, ...]
) -> None:
    done = as_nobody(*command)
    assert done.returncode == 126
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for way in ('KERNEL=="userfaultfd"', "vm.unprivileged_userfaultfd=1", "run as root"):
        assert way in done.stderr


@pytest.mark.usefixtures("no_userfaultfd")
def test_doctor_says_so(as_nobody: Command) -> None:
    done = as_nobody("doctor")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["run kvm"].startswith("no, because ")
    assert lines["run emulated"].startswith("yes")
    assert lines["reclaim"].startswith("no, because ")
    assert "/dev/userfaultfd" in lines["reclaim"]
