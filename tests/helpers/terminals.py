"""A real terminal for tests: a tmux server of its own, with one window."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import DEADLINE_S, until

_SIZE = ("LINES", "COLUMNS")


class Terminal:
    """A tmux server of its own, with one window."""

    def __init__(self, place: Path, width: int, height: int) -> None:
        self.socket = str(place / "tmux")
        self.run("-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height), "sh")
        self.type("PS1='$ '; clear")
        self.keys("Enter")

    def run(self, *words: str) -> str:
        """Run a tmux command; return its output."""
        # What somebody else's terminal left there would count as the size of this one.
        left = {name: value for name, value in os.environ.items() if name not in _SIZE}
        command = ["tmux", "-S", self.socket, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=left)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        """Type a text."""
        self.run("send-keys", "-l", text)

    def keys(self, *names: str) -> None:
        """Press keys by tmux's names."""
        self.run("send-keys", *names)

    def screen(self) -> list[str]:
        """Return the lines that are shown."""
        return self.run("capture-pane", "-p").rstrip("\n").split("\n")

    def shows(self, text: str) -> list[str]:
        """Wait until a line has this text; return all lines."""
        until(lambda: any(text in line for line in self.screen()), f"{text!r} on the screen")
        return self.screen()


@pytest.fixture
def terminal() -> Iterator[Callable[[int, int], Terminal]]:
    """Return a function that opens a terminal of so many columns and rows."""
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux (Debian: tmux)")
    pytest.importorskip("textual")
    opened: list[Terminal] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:

        def open_one(width: int, height: int) -> Terminal:
            opened.append(Terminal(Path(place), width, height))
            return opened[-1]

        yield open_one
        for one in opened:
            one.run("kill-server")
