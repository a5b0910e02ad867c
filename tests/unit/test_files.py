"""Files, links and folders of another user are not used; what is made belongs to us alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmhost.devices.console import open_console
from kvmhost.errors import HostError, LayoutError
from kvmhost.files import (
    NamelessFile,
    check_target,
    new_directory,
    open_log,
    own_directory,
    replacing,
    write_file,
)
from kvmhost.ownership import locate, open_folder, open_private_folder
from kvmhost.pager.storefile import StoreFile
from kvmhost.reclaim.account.decisions import Decisions
from kvmhost.reclaim.errors import ConfigError

OTHER = 65534


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder as /tmp is: everybody may make files, and rename only his own."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@pytest.fixture(autouse=True)
def plain_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def give(path: Path) -> Path:
    """Make what is at a path another user's."""
    os.chown(path, OTHER, OTHER, follow_symlinks=False)
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def write(path: Path) -> None:
    write_file(path, b"new", sync=False)


def log(path: Path) -> None:
    os.close(open_log(path, keep=True))


def nameless(path: Path) -> None:
    file = NamelessFile(path)
    try:
        os.write(file.fd, b"new")
        file.commit()
    finally:
        file.close()


def store(path: Path) -> None:
    StoreFile(path).close()


def decisions(path: Path) -> None:
    Decisions(path=str(path)).close()


def directory(path: Path) -> None:
    with new_directory(path):
        pass


USERS: dict[str, Callable[[Path], None]] = {
    "write": write,
    "log": log,
    "nameless": nameless,
    "store": store,
    "decisions": decisions,
    "directory": directory,
    "own directory": own_directory,
    "target": check_target,
}


# -- new files --------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["write", "log", "nameless", "decisions"])
def test_new_files_are_for_this_user_alone(shared: Path, user: str) -> None:
    USERS[user](shared / "f")
    assert mode_of(shared / "f") == 0o600


def test_new_folders_and_store_files_are_for_this_user_alone(shared: Path) -> None:
    with new_directory(shared / "d") as partial:
        assert mode_of(partial) == 0o700
    own_directory(shared / "e")
    assert mode_of(shared / "e") == 0o700
    file = StoreFile(shared / "s")
    assert mode_of(shared / "s") == 0o600
    file.close()


def test_a_temporary_file_is_private_while_it_is_written(shared: Path) -> None:
    with replacing(shared / "f", sync=False) as file:
        file.write(b"x")
        (partial,) = shared.iterdir()
        assert mode_of(partial) == 0o600


# -- links ------------------------------------------------------------------------------


@pytest.mark.requires_root
@pytest.mark.parametrize("user", USERS)
def test_a_link_of_another_user_is_not_followed(shared: Path, tmp_path: Path, user: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (shared / "f").symlink_to(victim)
    give(shared / "f")
    with pytest.raises((LayoutError, HostError, ConfigError)):
        USERS[user](shared / "f")
    assert victim.read_text() == "precious"
    assert (shared / "f").is_symlink()
    assert [entry.name for entry in shared.iterdir()] == ["f"]


@pytest.mark.requires_root
@pytest.mark.parametrize("user", USERS)
def test_a_folder_behind_a_link_of_another_user_is_not_used(
    shared: Path, tmp_path: Path, user: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (shared / "d").symlink_to(target)
    give(shared / "d")
    with pytest.raises((LayoutError, ConfigError), match="symbolic link of uid 65534"):
        USERS[user](shared / "d" / "f")
    assert list(target.iterdir()) == []


@pytest.mark.parametrize("user", ["log", "decisions", "store"])
def test_no_link_is_followed_where_something_is_appended(tmp_path: Path, user: str) -> None:
    (tmp_path / "target").write_text("text")
    (tmp_path / "f").symlink_to("target")
    with pytest.raises((LayoutError, ConfigError), match=r"link|levels"):
        USERS[user](tmp_path / "f")
    assert (tmp_path / "target").read_text() == "text"


def test_own_links_are_followed_where_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "d").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "f").symlink_to("../file")
    write(tmp_path / "d" / "f")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_circle_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(HostError, match="Too many levels"):
        write(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels"):
        open_folder(tmp_path / "a")


def test_paths_lead_where_the_kernel_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "up").symlink_to("a/b/..")
    (tmp_path / "root").symlink_to("/")
    monkeypatch.chdir(tmp_path / "a")
    paths = ["b", "../up", "../root", "..", ".", str(tmp_path), "/", "/proc/self/fd"]
    for path in map(Path, paths):
        fd = open_folder(path)
        assert os.path.samestat(os.fstat(fd), path.stat()), path
        os.close(fd)
    place = locate(Path("b"))
    assert (place.name, place.by_kernel) == ("b", False)
    os.close(place.folder)


def test_an_open_descriptor_is_written_in_place(tmp_path: Path) -> None:
    read, wrote = os.pipe()
    write_file(Path(f"/proc/self/fd/{wrote}"), b"text")
    assert os.read(read, 10) == b"text"
    os.close(read)
    os.close(wrote)


# -- files that were there first --------------------------------------------------------


@pytest.mark.requires_root
def test_a_file_of_another_user_is_replaced_and_its_mode_is_not_kept(shared: Path) -> None:
    path = shared / "f"
    path.write_text("his")
    path.chmod(0o666)
    give(path)
    with path.open("rb") as his:
        write(path)
        assert his.read() == b"his"
    assert (path.read_bytes(), mode_of(path), path.stat().st_uid) == (b"new", 0o600, os.geteuid())


@pytest.mark.requires_root
@pytest.mark.parametrize("user", ["log", "decisions", "store"])
def test_a_file_of_another_user_is_refused(shared: Path, user: str) -> None:
    path = shared / "f"
    path.touch(0o600)
    give(path)
    with pytest.raises((LayoutError, ConfigError), match="belongs to uid 65534"):
        USERS[user](path)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("user", ["log", "decisions", "store"])
@pytest.mark.parametrize("what", ["mode", "links"])
def test_a_file_that_others_can_change_is_refused(tmp_path: Path, user: str, what: str) -> None:
    path = tmp_path / "f"
    path.touch(0o622 if what == "mode" else 0o600)
    if what == "links":
        os.link(path, tmp_path / "other")
    with pytest.raises((LayoutError, ConfigError), match="0622" if what == "mode" else "2 hard"):
        USERS[user](path)
    assert path.exists()


@pytest.mark.requires_root
@pytest.mark.parametrize("user", ["write", "log", "target"])
def test_a_pipe_of_another_user_is_refused(shared: Path, user: str) -> None:
    os.mkfifo(shared / "f", 0o666)
    give(shared / "f")
    with pytest.raises(LayoutError, match="pipe of uid 65534"):
        USERS[user](shared / "f")


@pytest.mark.requires_root
def test_a_directory_of_another_user_is_refused(shared: Path) -> None:
    (shared / "d").mkdir()
    give(shared / "d")
    with pytest.raises(LayoutError, match="belongs to uid 65534"):
        own_directory(shared / "d")


# -- private folders --------------------------------------------------------------------


def test_a_private_folder_is_ours_all_the_way(tmp_path: Path) -> None:
    for folder in (tmp_path / "open", tmp_path / "open" / "run"):
        folder.mkdir(mode=0o755)
    os.close(open_private_folder(tmp_path / "open" / "run"))
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(LayoutError, match=r"write to .*open \(mode 0777\)"):
        open_private_folder(tmp_path / "open" / "run")
    (tmp_path / "open").chmod(0o1777)
    os.close(open_private_folder(tmp_path / "open" / "run"))
    with pytest.raises(LayoutError, match="others can write to it"):
        open_private_folder(tmp_path / "open")


@pytest.mark.requires_root
def test_a_folder_in_that_of_another_user_is_not_private(tmp_path: Path) -> None:
    (tmp_path / "his").mkdir(mode=0o755)
    give(tmp_path / "his")
    with pytest.raises(LayoutError, match="his belongs to uid 65534, who can exchange"):
        open_private_folder(tmp_path / "his" / "run")


# -- the console ------------------------------------------------------------------------


@pytest.mark.requires_root
def test_a_console_file_is_not_another_users(shared: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (shared / "link").symlink_to(victim)
    give(shared / "link")
    (shared / "file").write_text("his")
    give(shared / "file")
    for name, said in (("link", "symbolic link of uid"), ("file", "belongs to uid 65534")):
        with pytest.raises(LayoutError, match=said):
            open_console(f"file:{shared / name}")
    assert (victim.read_text(), (shared / "file").read_text()) == ("precious", "his")
    open_console(f"file:{shared / 'new'}").close()
    assert mode_of(shared / "new") == 0o600
    (shared / "new").write_text("before")
    open_console(f"file:{shared / 'new'}").close()
    assert (shared / "new").read_text() == ""
