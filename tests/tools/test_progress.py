"""Progress: shown on a terminal within two seconds, never in a pipe."""

from __future__ import annotations

import io

import pytest
from waiting import until

from kvmhost.tools.progress import working


class Stream(io.StringIO):
    """Standard error that may be a terminal."""

    def __init__(self, tty):
        super().__init__()
        self.isatty = lambda: tty


def test_a_terminal_shows_what_is_worked_on_and_is_cleared(monkeypatch):
    stream = Stream(tty=True)
    monkeypatch.setattr("sys.stderr", stream)
    with working("measuring"):
        until(lambda: stream.getvalue().count("s] measuring") >= 2, "two updates")
    assert stream.getvalue().endswith("\r\x1b[K")


def test_a_short_piece_of_work_shows_nothing(monkeypatch):
    stream = Stream(tty=True)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("kvmhost.tools.progress._SHOW_AFTER_S", 1e6)
    with working("measuring"):
        pass
    assert stream.getvalue() == ""


def test_a_pipe_gets_nothing_and_errors_pass_through(monkeypatch):
    stream = Stream(tty=False)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr("kvmhost.tools.progress._SHOW_AFTER_S", 0.0)
    with pytest.raises(ValueError, match="inside"), working("measuring"):
        raise ValueError("inside")
    assert stream.getvalue() == ""
