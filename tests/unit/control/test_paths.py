from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kvmhost.control import paths
from kvmhost.control.paths import NameLock
from kvmhost.control.server import SocketServer
from kvmhost.errors import CapabilityError, LayoutError, NameInUseError

HOLDER = """
import sys, time
from kvmhost.control.paths import NameLock, socket_path
lock = NameLock("held")
socket_path("held").touch()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_runtime_dir_is_private(runtime):
    assert paths.runtime_dir() == runtime
    assert runtime.stat().st_mode & 0o777 == 0o700


def test_runtime_dir_that_others_may_write_is_refused(runtime):
    runtime.mkdir()
    runtime.chmod(0o777)
    with pytest.raises(CapabilityError, match=r"777.*KVMHOST_RUNTIME_DIR"):
        paths.runtime_dir()


OTHER = 65534


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_runtime_dir_that_is_no_directory_is_refused(runtime, kind):
    runtime.touch() if kind == "file" else os.mkfifo(runtime)
    with pytest.raises(CapabilityError, match="Not a directory"):
        paths.runtime_dir()


@pytest.mark.requires_root
def test_runtime_dir_of_another_user_is_refused(runtime):
    runtime.mkdir(mode=0o700)
    os.chown(runtime, OTHER, OTHER)
    with pytest.raises(CapabilityError, match="belongs to uid 65534"):
        paths.runtime_dir()


@pytest.mark.requires_root
def test_runtime_dir_behind_a_link_of_another_user_is_refused(runtime, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    runtime.symlink_to(tmp_path / "real")
    assert paths.runtime_dir() == runtime
    os.chown(runtime, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(CapabilityError, match="symbolic link of uid 65534"):
        paths.runtime_dir()


@pytest.mark.requires_root
def test_nothing_is_made_in_the_runtime_directory_of_another_user(monkeypatch, tmp_path):
    """XDG_RUNTIME_DIR survives ``su``: its owner could exchange what root makes there."""
    monkeypatch.delenv(paths.RUNTIME_DIR_ENV)
    base = tmp_path / "user"
    base.mkdir(mode=0o700)
    os.chown(base, OTHER, OTHER)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with pytest.raises(CapabilityError, match=r"user belongs to uid 65534, who can exchange"):
        NameLock("a")
    assert list(base.iterdir()) == []


@pytest.mark.requires_root
def test_a_name_made_first_in_tmp_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv(paths.RUNTIME_DIR_ENV)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    tmp_path.chmod(0o1777)
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    link = tmp_path / f"kvmhost-{os.geteuid()}"
    link.symlink_to(victim)
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(CapabilityError, match="symbolic link of uid 65534"):
        NameLock("a")
    assert list(victim.iterdir()) == []


def test_nothing_outside_is_removed_when_the_directory_is_exchanged(runtime, tmp_path):
    """Lock and socket go with the directory that was opened, not with its path."""
    lock = NameLock("a")
    server = SocketServer(paths.socket_path("a"), lock, pytest.fail)
    with server:
        assert paths.socket_path("a").stat().st_mode & 0o777 == 0o600
        victim = tmp_path / "victim"
        victim.mkdir()
        for name in ("a.sock", "a.lock"):
            (victim / name).write_text("precious")
        runtime.rename(tmp_path / "moved")
        runtime.symlink_to(victim)
    assert sorted(file.read_text() for file in victim.iterdir()) == ["precious"] * 2
    assert list((tmp_path / "moved").iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "links", "mode"])
def test_a_lock_file_that_is_not_ours_alone_is_refused(runtime, tmp_path, kind):
    paths.runtime_dir()
    (tmp_path / "target").write_text("text")
    if kind == "link":
        (runtime / "a.lock").symlink_to(tmp_path / "target")
    elif kind == "links":
        os.link(tmp_path / "target", runtime / "a.lock")
    else:
        (runtime / "a.lock").touch()
        (runtime / "a.lock").chmod(0o666)
    with pytest.raises((LayoutError, OSError), match=r"links|mode 0666|levels"):
        NameLock("a")
    assert (tmp_path / "target").read_text() == "text"


def test_runtime_dir_without_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(paths.RUNTIME_DIR_ENV)
    base = tmp_path / "user"
    base.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    assert paths.runtime_dir() == base / "kvmhost"


def test_runtime_dir_falls_back_where_the_parent_is_missing(monkeypatch, tmp_path):
    monkeypatch.delenv(paths.RUNTIME_DIR_ENV)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert paths.runtime_dir() == tmp_path / f"kvmhost-{os.geteuid()}"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a\n", "a\0", "x" * 65, "ä", "a b"])
def test_bad_names(name):
    with pytest.raises(LayoutError, match="name"):
        paths.check_name(name)


@pytest.mark.parametrize("name", ["a", "vm-1", "A_b.c", "x" * 64])
def test_good_names(name):
    assert paths.check_name(name) == name


def test_a_long_path_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(paths.RUNTIME_DIR_ENV, str(tmp_path / ("d" * 90)))
    with pytest.raises(LayoutError, match="longer than 107"):
        paths.socket_path("x" * 64)


def test_names_and_paths_of_sockets(runtime):
    assert paths.to_socket_path("a") == runtime / "a.sock"
    assert str(paths.to_socket_path("./a")) == "a"
    assert str(paths.to_socket_path("/x/y.sock")) == "/x/y.sock"


def test_lock_excludes_and_tells_who(holder):
    with pytest.raises(NameInUseError, match=rf"'held' runs already .process {holder.pid}"):
        NameLock("held")
    assert paths.running_names() == ["held"]


def test_lock_of_a_killed_process_is_free(holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert paths.running_names() == []
    with NameLock("held") as lock:
        assert lock.held
        assert paths.running_names() == ["held"]
    assert not lock.path.exists()


def test_lock_twice_in_one_process():
    with NameLock("a"), pytest.raises(NameInUseError):
        NameLock("a")
    with NameLock("a") as lock:
        assert lock.held


def test_release_leaves_a_successors_file_alone(runtime):
    first = NameLock("a")
    first.path.unlink()
    with NameLock("a") as second:
        first.release()
        assert second.path.exists()
