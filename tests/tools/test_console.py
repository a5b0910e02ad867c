"""The console blocks of README.md and docs/*.md run, on a VM as docs/young.md starts it.

Every command of a block is run here, or is on a list with the reason why it is not.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, name_of
from waiting import DEADLINE_S, until

#: Commands that are not run, by a pattern for the whole command, and why.
NOT_RUN = {
    r"make .*|KVMHOST_(PAIRS|MUTATION)_\w+=.*": "builds and tests this checkout",
    r"export PATH=.*": "sets up the shell",
    r"kvmhost demo": "tests/tools/test_demo.py runs it",
    r"kvmhost run hotcold --name vm1 .*": "the VM that the others use; docs/young.md's is started",
    r"kvmhost (young watch|top)\b.*": "needs a terminal: tests/tools/test_watch.py, test_vms.py",
    r"kvmhost lab .*": "downloads kernels, or emulates a host: tests/lab",
    r"python tests/mutation/run\.py .*": "runs for hours: tests/mutation",
    r"kvmhost young \w+ hotcold\.zarr\b.*": "reads what lab young recorded: tests/lab",
    r"kvmhost young snapshot vm1 --tracker dirty": "others read this VM by another tracker: "
    "tests/kvm/test_switching.py",
    r"kvmhost run bad\..*": "images that fail on purpose: tests/kvm/test_pc.py",
    r"kvmhost (guests build lines\.c|run \./lines\.elf .*)": "tests/docs/test_examples.py",
    r"kvmhost snapshot vm1 vm1\.snap": "tests/kvm/test_snapshot.py, under a limit too",
    r"kvmhost run --restore .*": "runs until it is stopped: tests/kvm/test_snapshot.py",
    r"kvmhost (pause|resume|stop|drain) vm1": "end the work of the others: tests/tools/test_vms.py",
    r"kvmhost reclaimd '\*' .*": "waits for VMs: tests/reclaim/test_daemon.py",
    r"kvmhost young wss --pid 4711 .*": "another process: tests/attach",
    r".*\$\(pidof -s qemu-system-x86_64\).*": "needs a QEMU: tests/attach",
}
#: What is changed so that a command ends soon, by a pattern for a part of it.
SHORTENED = {
    r"(young record .*)--interval \S+ --count (\d+)": r"\1--interval 0.01 --count \2",
    r"(young record vm1 -o vm1\.young)$": r"\1 --append --count 2",
    r"(reclaimd vm1 .*)": r"\1 --passes 2 --interval 0.05",
    r"(young whatif .*)": r"\1 --no-check --workers 0",
    r"(young snapshot --pid .*|young snapshot vm1.*)": r"\1 --interval 0.05",
}
#: A page at a time may use a record that README and young.md both make.
_AGAIN = "vm1.young"


def console_commands(page: Path) -> list[str]:
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", page.read_text(), re.M | re.S):
        lines = block.replace("\\\n", " ").splitlines()
        found += [_without_comment(line[2:]) for line in lines if line.startswith("$ ")]
    return found


def _without_comment(line: str) -> str:
    return re.sub(r"\s+#.*$|\s*&$", "", line).strip()


def reason_not_to_run(command: str) -> str:
    return next((why for how, why in NOT_RUN.items() if re.fullmatch(how, command)), "")


def shortened(command: str) -> str:
    for how, instead in SHORTENED.items():
        command = re.sub(how, instead, command)
    return command


ALL = {page: console_commands(page) for page in PAGES}
RUN = {page: [c for c in commands if not reason_not_to_run(c)] for page, commands in ALL.items()}


def test_every_reason_is_needed() -> None:
    commands = [command for found in ALL.values() for command in found]
    for how in NOT_RUN:
        assert any(re.fullmatch(how, command) for command in commands), how
    assert sum(map(len, RUN.values())) >= 30


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A directory with ``kvmhost`` on the path, and the VM of docs/young.md."""
    place = tmp_path_factory.mktemp("console")
    (place / "bin").mkdir()
    for name in ("kvmhost", "reclaimd"):
        script = place / "bin" / name
        prefix = "" if name == "kvmhost" else " reclaimd"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m kvmhost{prefix} "$@"\n')
        script.chmod(0o755)
    (place / "docs").symlink_to(ROOT / "docs")
    environ = os.environ | {
        "PATH": f"{place}/bin:{os.environ['PATH']}",
        "KVMHOST_RUNTIME_DIR": f"{place}/run",
        "PYTHONPATH": str(ROOT),
    }
    start = next(c for c in ALL[ROOT / "docs" / "young.md"] if c.startswith("kvmhost run"))
    vm = subprocess.Popen(shlex.split(start), cwd=place, env=environ, stdout=subprocess.DEVNULL)
    try:
        until((place / "run" / "vm1.sock").exists, "the VM", process=vm)
        _run("kvmhost young record vm1 -o first --interval 0.05 --count 2", place, environ)
        yield environ | {"PLACE": str(place)}
    finally:
        vm.send_signal(signal.SIGTERM)
        vm.wait(DEADLINE_S)


def _run(command: str, place: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command],
        cwd=place,
        env=environ,
        text=True,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )


@contextlib.contextmanager
def _daemon(place: Path, environ: dict[str, str]) -> Iterator[None]:
    """Run a daemon beside a command that asks one."""
    words = ["kvmhost", "reclaimd", "vm1", "--interval", "0.05", "--budget", "32M"]
    with (place / "daemon.log").open("wb") as log:
        daemon = subprocess.Popen(words, cwd=place, env=environ, stdout=log, stderr=log)
    try:
        until(lambda: "vm1 pass 2:" in (place / "daemon.log").read_text(), process=daemon)
        yield
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(DEADLINE_S)


@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]], ids=name_of)
def test_the_commands_of_a_page_run(page: Path, shell: dict[str, str]) -> None:
    place = Path(shell["PLACE"])
    if page.name == "trackers.md":
        assert _run("kvmhost young record vm1 -o vm1.young --count 1", place, shell).returncode < 3
    for command in RUN[page]:
        if command.startswith("curl") and shutil.which("curl") is None:
            continue
        if "-o " + _AGAIN in command and "--count" in command:
            shutil.rmtree(place / _AGAIN, ignore_errors=True)
        with _daemon(place, shell) if "lru_gen show" in command else contextlib.nullcontext():
            done = _run(shortened(command), place, shell)
        # On this small VM a budget may be beyond reach of two passes: that is exit code 0 too.
        assert done.returncode == 0, (command, done.stdout[-500:], done.stderr[-1000:])
        assert "Traceback" not in done.stderr, command
