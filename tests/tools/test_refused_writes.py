"""Every command that writes, where it cannot: one line, a documented code, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmhost.errors import HostError
from kvmhost.files import TEMPORARY, check_target, new_directory, replacing, write_file

pytest.importorskip("zstandard")

#: What is run on a record, by name; ``OUT`` is what is written.
WRITERS = {
    "export damon": "young export r.young --format damon -o OUT",
    "export damon-json": "young export r.young --format damon-json -o OUT",
    "export dirty": "young export r.young --format dirty -o OUT",
    "export ranges": "young export r.young --format ranges -o OUT",
    "export gfns": "young export r.young --format gfns -o OUT",
    "import": "young import r.txt --format ranges -o OUT",
    "heatmap png": "young heatmap r.young -o OUT.png",
    "heatmap html": "young heatmap r.young -o OUT.html",
}
#: These refuse anything that is there, also a directory, in words of their own.
NEW_ONLY = ("export", "import")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a record whose every form is larger than the limits below."""
    folder = tmp_path_factory.mktemp("writers")
    # Irregular: no form of it is a short run.
    plain = folder / "gfns.txt"
    plain.write_text("\n".join(str(gfn * 3 + gfn % 2) for gfn in range(60_000)) + "\n")
    run(folder, "young import gfns.txt --format ranges -o r.young", check=True)
    (folder / "r.txt").write_bytes(plain.read_bytes())
    return folder


def run(folder: Path, command: str, *, prefix: str = "", check: bool = False):
    """Run a command in a folder, through a shell that may set limits first."""
    script = f'{prefix} "$PYTHON" -m kvmhost {command}'
    return subprocess.run(
        ["sh", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=check,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert done.returncode == code, done.stderr
    assert len(said) == 1, done.stderr
    assert text in said[0]
    assert "Errno" not in said[0]
    assert done.stdout == ""


def command_for(name: str, out: Path) -> str:
    if "heatmap" in name:
        pytest.importorskip("matplotlib")
    return WRITERS[name].replace("OUT", str(out))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_size_limit(name: str, home: Path, tmp_path: Path) -> None:
    done = run(home, command_for(name, tmp_path / "out"), prefix="ulimit -f 1;")
    refused(done, 1, "File too large; raise the limit on file size (ulimit -f)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.requires_root
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name: str, home: Path, tmp_path: Path) -> None:
    # In a mount namespace of its own: the file system is gone with the shell.
    words = command_for(name, tmp_path / "out")
    script = (
        f"mount -t tmpfs -o size=4k none {tmp_path} || exit 77; "
        f'"$PYTHON" -m kvmhost {words}; code=$?; ls -A {tmp_path} >&3; exit $code'
    )
    listing = home / "listing"
    done = run_script(home, f"exec unshare -m sh -c '{script}' 3>{listing}")
    if done.returncode == 77:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr}")
    refused(done, 1, "No space left on device")
    assert listing.read_text() == ""


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_directory(name: str, home: Path, tmp_path: Path) -> None:
    done = run(home, command_for(name, tmp_path / "none" / "out"))
    refused(done, 2, "No such file or directory")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_place_of_the_directory(name: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    done = run(home, command_for(name, tmp_path / "file" / "out"))
    refused(done, 2, "Not a directory")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_place(name: str, home: Path) -> None:
    refused(run(home, command_for(name, Path("/proc/out"))), 2, "/proc/out")


@pytest.mark.parametrize("name", WRITERS)
def test_a_directory_in_place_of_the_file(name: str, home: Path, tmp_path: Path) -> None:
    for suffix in ("", ".png", ".html"):
        (tmp_path / f"out{suffix}").mkdir()
    done = run(home, command_for(name, tmp_path / "out"))
    refused(done, 2, "there already" if name.startswith(NEW_ONLY) else "Is a directory")
    assert len(list(tmp_path.iterdir())) == 3
    assert not any(list(folder.iterdir()) for folder in tmp_path.iterdir())


# -- the one place ----------------------------------------------------------------------


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def broken() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_replaced_file_keeps_its_mode_and_a_link_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "f", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to("f")
    write_file(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_device_is_written_and_not_replaced() -> None:
    with pytest.raises(HostError, match="/dev/full: No space left on device"):
        write_file(Path("/dev/full"), b"x")
    assert Path("/dev/full").is_char_device()


def test_a_target_is_checked_and_nothing_is_left(tmp_path: Path) -> None:
    check_target(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_new_directory_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken() -> None:
        with new_directory(tmp_path / "d") as partial:
            assert partial.name.startswith(TEMPORARY)
            (partial / "a").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert list(tmp_path.iterdir()) == []
    with new_directory(tmp_path / "d") as partial:
        (partial / "a").write_text("x")
    assert (tmp_path / "d" / "a").read_text() == "x"
    with pytest.raises(HostError, match="File exists"), new_directory(tmp_path / "d"):
        pass
