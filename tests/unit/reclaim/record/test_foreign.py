"""A record that another user made, or can change, is not appended to; nor is one with links."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from young_model import SECOND, Window, write

from kvmhost.errors import LayoutError
from kvmhost.reclaim.record.writer import RecordWriter

pytest.importorskip("zstandard")
OTHER = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    windows = [
        Window(4096, frozenset({1, t}), None, t * SECOND, (t + 1) * SECOND) for t in range(1, 9)
    ]
    write(tmp_path / "r.young", 0, windows).close()
    return tmp_path / "r.young"


def test_a_record_is_for_its_user_alone(path: Path) -> None:
    for part in [path, *path.rglob("*")]:
        assert stat.S_IMODE(part.stat().st_mode) == (0o700 if part.is_dir() else 0o600), part


@pytest.mark.parametrize("part", ["tail.log", ".zmetadata", "young/0.0", ".lock", "young"])
def test_a_link_in_a_record_is_not_written_through(path: Path, tmp_path: Path, part: str) -> None:
    """As an archive that somebody unpacks may have it."""
    there, target = path / part, tmp_path / "target"
    assert there.exists(), sorted(str(p.relative_to(path)) for p in path.rglob("*"))
    there.rename(target)
    there.symlink_to(target)
    before = {p: p.read_bytes() for p in [target, *target.rglob("*")] if p.is_file()}
    with pytest.raises(LayoutError, match=r"not a (regular file|directory)"):
        RecordWriter.resume(path)
    assert {p: p.read_bytes() for p in [target, *target.rglob("*")] if p.is_file()} == before
    assert there.is_symlink()


def test_a_link_to_a_record_is_not_followed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(LayoutError, match="not a directory"):
        RecordWriter.resume(tmp_path / "link")


@pytest.mark.requires_root
@pytest.mark.parametrize("part", ["", "tail.log", "young"])
def test_a_part_of_another_user_is_refused(path: Path, part: str) -> None:
    os.chown(path / part, OTHER, OTHER)
    with pytest.raises(LayoutError, match="belongs to uid 65534"):
        RecordWriter.resume(path)


@pytest.mark.parametrize("part", ["", "tail.log", "young"])
def test_a_part_that_others_can_write_is_refused(path: Path, part: str) -> None:
    (path / part).chmod(0o777)
    with pytest.raises(LayoutError, match="others can write to it"):
        RecordWriter.resume(path)


def test_its_own_record_is_gone_on_with(path: Path) -> None:
    with RecordWriter.resume(path) as writer:
        assert writer.n_windows == 8
