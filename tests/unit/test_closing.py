"""Ctrl-C that is delivered when a close returns: the cleanup does not close again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmhost.closing import Closing
from kvmhost.kvm.descriptor import Descriptor
from kvmhost.memory import Region


def descriptor(folder: Path) -> Closing:
    return Descriptor(os.open(folder, os.O_RDONLY))


def region(folder: Path) -> Region:
    return Region(0, 4096)


@pytest.mark.parametrize("make", [descriptor, region], ids=lambda make: make.__name__)
def test_interrupted_close_is_not_repeated(
    make: Callable[[Path], Closing | Region], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, closed = make(tmp_path), []

    def close(fd: int) -> None:
        closed.append(fd)
        raise KeyboardInterrupt  # as Python does on return, after SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", close)
        with pytest.raises(KeyboardInterrupt):
            owner.close()
        owner.close()
    assert len(closed) == 1
    os.close(closed[0])
