from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kvmhost.control import paths
from kvmhost.control.paths import NameLock
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
