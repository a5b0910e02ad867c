"""Temporary folders are removed when a signal arrives between any two steps."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmhost.temporary import temporary_folder


def then_interrupt(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that receives Ctrl-C when its work is done."""

    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return result

    return both


def test_interrupt_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", then_interrupt(tempfile.mkdtemp))
    with pytest.raises(KeyboardInterrupt), temporary_folder("x-", tmp_path):
        pytest.fail("the body runs")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(path: Path, *args: Any, **kwargs: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(path, *args, **kwargs)

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", ending)
    with pytest.raises(KeyboardInterrupt), temporary_folder("x-", tmp_path) as folder:
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_body_runs_and_the_folder_goes(tmp_path: Path) -> None:
    with temporary_folder("x-", tmp_path) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []
