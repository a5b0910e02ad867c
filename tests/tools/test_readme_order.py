"""The commands of README's first five minutes, in their order, in one shell.

What the README runs in a terminal of its own runs here in the background, and what it says
about Ctrl-C is a SIGINT. Everything else is run as it stands.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import DEADLINE_S

from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.reclaim.record.reader import YoungRecord

pytestmark = [pytest.mark.requires_kvm, pytest.mark.requires_uffd]

ROOT = Path(__file__).parents[2]
#: What runs until it is ended, and how to see that it is there.
IN_BACKGROUND = {
    "kvmhost run hotcold": "until kvmhost list | grep -q vm1; do sleep 0.2; done",
    "kvmhost reclaimd": "until kvmhost lru_gen show vm1 >shown 2>&1; do sleep 0.2; done",
}


def commands() -> list[str]:
    """Return the commands of the section, without the choice of a PATH."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## First five minutes")[2].partition("\n## ")[0]
    found = re.findall(r"^\$ (kvmhost .*)$", section, re.MULTILINE)
    assert len(found) >= 10
    return found


def script() -> str:
    lines = ["set -e"]
    for command in commands():
        waits = [how for begin, how in IN_BACKGROUND.items() if command.startswith(begin)]
        if command.startswith("kvmhost drain"):
            lines += ["kill -INT $reclaimd", "wait $reclaimd || test $? = 130"]
        if waits:
            name = command.split()[1]
            lines += [f"{command} >{name}.log 2>&1 &", f"{name}=$!", *waits]
        else:
            lines += [f"echo '$ {command}'", command]
    return "\n".join([*lines, "kvmhost stop vm1", "wait $run || test $? -lt 128", ""])


def test_the_first_five_minutes_in_one_shell(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, RUNTIME_DIR_ENV: str(tmp_path / "run")}
    with subprocess.Popen(
        ["bash", "-c", script()],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            out, _ = shell.communicate(timeout=5 * DEADLINE_S)
        finally:
            # Of a script that failed half way, the guest and the daemon still run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    logs = "".join(log.read_text() for log in tmp_path.glob("*.log"))
    assert shell.returncode == 0, out + logs
    assert "20 windows" in out
    assert (tmp_path / "vm1.html").stat().st_size > 0
    with YoungRecord.open(tmp_path / "vm1.young") as record:
        assert record.n_windows == 20
        # Beside a daemon that clears the same bits.
        assert sum(record.bitmap(window).count() for window in range(20)) > 0
