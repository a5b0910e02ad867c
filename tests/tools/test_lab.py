"""``kvmhost lab``, with another program in the place of QEMU, of apt, and of the mirror."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_qemu
import pytest
from devicetrees import REG, node, tree
from waiting import DEADLINE_S, until

from kvmhost.errors import LabError
from kvmhost.lab import cache, running
from kvmhost.lab.devicetree import AddedProperty, add_property
from kvmhost.lab.hosts import HOSTS, find_host
from kvmhost.lab.initrd import Job, recipe
from kvmhost.lab.pins import pinned
from kvmhost.lab.running import HostReady, JobEnded, RunningHost
from kvmhost.lab.scratch import remove_abandoned

HOST = "amd64-6.12"
Environment = dict[str, str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs, cache and temporary folder of the test; the last is empty at the end."""
    for name in ("bin", "cache", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_HOST", "ok")
    program(tmp_path / "bin" / "qemu-system-x86_64", Path(fake_qemu.__file__).read_text())
    yield tmp_path
    assert list((tmp_path / "tmp").iterdir()) == []
    log = tmp_path / "log"
    if log.exists():
        until(lambda: not Path(f"/proc/{json.loads(log.read_text())[0]}").exists(), "QEMU's end")


def program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cached(place: Path) -> Path:
    """A kernel in the cache."""
    return fill_cache()


def fill_cache() -> Path:
    folder = cache.entry_folder(pinned(HOST), recipe(find_host(HOST)))
    with cache.filled_entry(folder) as partial:
        (partial / "kernel").write_bytes(b"kernel")
        (partial / "initrd").write_bytes(b"initrd")
    return folder


def lab(*words: str) -> list[str]:
    return [sys.executable, "-m", "kvmhost", "lab", *words]


def run(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(lab(*words), capture_output=True, timeout=DEADLINE_S, check=False)


def test_output_and_status_are_passed_on(cached: Path, place: Path) -> None:
    done = run("run", HOST, "--", "some", "command")
    assert done.returncode == 0
    assert done.stdout == b"to output \xff\n" + bytes(300_000)
    assert done.stderr == b"to error\n"
    log = json.loads((place / "log").read_text())
    assert "-nodefaults" in log
    assert "max,avx2=off" in log


@pytest.mark.parametrize(
    ("does", "status", "message"),
    [
        ("fail", 7, "to error\n"),
        ("panic", 125, r"lab host amd64-6.12: ended without .* command: kvmhost-lab: mount -t 9p"),
        ("crash", 125, r"lab host amd64-6.12: qemu-system-x86_64: ended by SIGSEGV"),
        ("refuse", 125, r"qemu-system-x86_64: status 1: qemu: unsupported machine type"),
        ("hang", 124, r"not done after 1 s: the last thing that it said"),
        ("mute", 124, r"not done after 1 s: nothing on its console"),
    ],
)
def test_what_a_host_does(
    does: str, status: int, message: str, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOST", does)
    limit = ("--timeout", "1") if status == 124 else ()
    done = run("run", *limit, HOST, "--", "command")
    assert done.returncode == status
    text = done.stderr.decode()
    assert re.search(message, text)
    assert len(text.splitlines()) == 1


def test_a_host_that_does_not_power_off_is_ended(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOST", "stay")
    monkeypatch.setattr(running, "_POWER_OFF_S", 0.1)
    job = Job(["command"], Path("/"), {})
    with RunningHost(find_host(HOST), job, mem_bytes=1 << 20) as host:
        events = list(host.events(DEADLINE_S))
        assert events[0] == HostReady()
        assert events[-1] == JobEnded(0)
        until(lambda: not host.is_on, "the host is ended")


def test_a_device_tree_is_complete_before_the_machine_starts(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = AddedProperty(4096, "cpu@", "sizes", (12, 16))
    host = dataclasses.replace(find_host(HOST), added_property=added)
    before = tree(node("cpu@0", REG))
    monkeypatch.setenv("FAKE_TREE", before.hex())
    job = Job(["command"], Path("/"), {})
    with RunningHost(host, job, mem_bytes=1 << 20) as running_host:
        assert list(running_host.events(DEADLINE_S))[-1] == JobEnded(0)
        wanted = add_property(before, added)
        with running_host.ram.open("rb") as ram:
            ram.seek(4096)
            assert ram.read(len(wanted)) == wanted
    monkeypatch.setenv("FAKE_HOST", "refuse")
    with pytest.raises(LabError, match="status 1: qemu: unsupported machine type"):
        RunningHost(host, job, mem_bytes=1 << 20)


@pytest.mark.parametrize("does", ["hang", "mute"])
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_ends_the_host(
    does: str, number: int, status: int, cached: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOST", does)
    with subprocess.Popen(lab("run", HOST, "--", "command"), stderr=subprocess.PIPE) as process:
        until(lambda: (place / "log").exists() and (place / "log").read_text(), "the host's start")
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == status
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_host_dies_with_its_killed_parent(
    cached: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOST", "hang")
    with subprocess.Popen(lab("run", HOST, "--", "command")) as process:
        until(lambda: (place / "log").exists() and (place / "log").read_text(), "the host's start")
        process.kill()
    pid = json.loads((place / "log").read_text())[0]
    until(lambda: not Path(f"/proc/{pid}").exists(), "the host's end")
    (left,) = (place / "tmp").iterdir()  # a killed process removes nothing
    other = place / "tmp" / "kvmhost-lab-work-other"
    other.mkdir()
    fd = os.open(other, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        monkeypatch.setenv("FAKE_HOST", "ok")
        assert run("run", HOST, "--", "command").returncode == 0
        assert not left.exists(), "the next one does"
        assert other.exists(), "its owner lives"
    finally:
        os.close(fd)
    remove_abandoned()
    assert not other.exists()


def test_a_link_is_no_abandoned_folder(place: Path) -> None:
    target = place / "mine"
    target.mkdir()
    link = place / "tmp" / "kvmhost-lab-work-link"
    link.symlink_to(target)
    remove_abandoned()
    assert target.exists()
    link.unlink()


def test_a_folder_is_kept(cached: Path, place: Path) -> None:
    keep = place / "kept"
    assert run("run", "--mem", "1M", "--keep", str(keep), HOST, "--", "command").returncode == 0
    assert sorted(p.name for p in keep.iterdir()) == ["initrd", "qemu.log", "ram"]
    assert (keep / "ram").stat().st_size == 1 << 20
    again = run("run", "--keep", str(keep), HOST, "--", "command")
    assert again.returncode == 2
    assert again.stderr.decode() == f"kvmhost lab run: {keep}: File exists\n"


def test_the_initial_file_system_has_the_command(cached: Path, place: Path) -> None:
    keep = place / "kept"
    run("run", "--keep", str(keep), HOST, "--", "echo", "a b", "$HOME")
    raw = (keep / "initrd").read_bytes()
    assert raw.startswith(b"initrd")
    assert b"exec echo 'a b' '$HOME'\n" in raw
    assert f"cd {Path.cwd()} ".encode() in raw


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["run", "amd64-6.2", "--", "x"], 2, "unknown host 'amd64-6.2', did you mean 'amd64-6.12'"),
        (["run", HOST], 2, "no command: write it after --"),
        (["run", HOST, "x"], 2, "unrecognized arguments: x"),
        (["run", "--mem", "0", HOST, "--", "x"], 2, "a guest needs memory"),
        (["run", HOST, "--", "x"], 126, f"run: kvmhost lab fetch {HOST}"),
        (["shell", HOST], 2, "standard input is no terminal"),
        (["fetch"], 2, "name hosts, or write --all"),
        (["fetch", "nothing"], 2, "unknown host 'nothing'"),
    ],
)
def test_bad_input_is_one_line(words: list[str], status: int, message: str, place: Path) -> None:
    done = subprocess.run(
        lab(*words), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == status
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_qemu(cached: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "bin" / "qemu-system-x86_64").unlink()
    monkeypatch.setenv("PATH", str(place / "bin"))
    done = run("run", HOST, "--", "x")
    assert done.returncode == 126
    assert b"needs qemu-system-x86_64" in done.stderr
    assert done.stderr.endswith(b"run: apt-get install qemu-system-x86\n")


@pytest.mark.parametrize("damage", ["kernel", "initrd", "sums.json"])
def test_a_damaged_cache_is_refused(damage: str, cached: Path) -> None:
    (cached / damage).write_bytes(b"[")
    done = run("run", HOST, "--", "x")
    assert done.returncode == 126
    assert f"{cached / damage}".encode() in done.stderr
    (cached / damage).unlink()
    assert b"is missing" in run("run", HOST, "--", "x").stderr


# -- fetching --------------------------------------------------------------------------

APT = """
import os, re, sys, time
from pathlib import Path
words = sys.argv[1:]
does = os.environ["FAKE_APT"]
name = Path(sys.argv[0]).name
if words[:1] == ["indextargets"]:
    print("http://security.invalid/ x-security"); print("http://mirror.invalid/debian/ bookworm")
elif "update" in words:
    options = dict(re.findall(r"-o(\\S+?)=(\\S*)", " ".join(words)))
    text = next(Path(options["Dir::Etc::SourceParts"]).iterdir()).read_text()
    assert "http://mirror.invalid/debian/" in text and "security" not in text, text
    Path(os.environ["FAKE_LOG"] + ".apt").write_text(text)
    if does == "offline":
        sys.exit("E: Failed to fetch http://mirror.invalid/ Could not resolve 'mirror.invalid'")
    if does == "hang":
        time.sleep(3600)
elif "download" in words:
    if does == "gone":
        sys.exit(f"E: Version '1' for '{words[-1].partition('=')[0]}' was not found")
    Path(words[-1].partition("=")[0] + "_1_amd64.deb").write_bytes(b"not what is pinned")
"""


@pytest.fixture
def apt(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put other programs in the place of apt's; say what they do."""
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        program(place / "bin" / name, APT)
    keyring = place / "keyring.gpg"
    keyring.touch()
    return lambda does: monkeypatch.setenv("FAKE_APT", does)


@pytest.mark.skipif(
    not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists(),
    reason="no Debian keyring; apt-get install debian-archive-keyring",
)
@pytest.mark.parametrize(
    ("does", "status", "message"),
    [
        ("offline", 126, "Failed to fetch http://mirror.invalid/ Could not resolve"),
        ("gone", 126, "take what the mirror has now: kvmhost lab fetch --latest"),
        ("other", 1, "SHA-256"),
    ],
)
def test_fetching_fails_in_one_line(
    does: str, status: int, message: str, apt: Callable[[str], None], place: Path
) -> None:
    apt(does)
    done = run("fetch", HOST)
    assert done.returncode == status
    errors = [line for line in done.stderr.decode().splitlines() if "kvmhost lab fetch:" in line]
    assert len(errors) == 1
    assert message in errors[0]
    assert not [p for p in (place / "cache").rglob("*") if p.is_file()]


@pytest.mark.skipif(
    not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists(),
    reason="no Debian keyring; apt-get install debian-archive-keyring",
)
def test_fetching_is_interrupted(apt: Callable[[str], None], place: Path) -> None:
    apt("hang")
    with subprocess.Popen(lab("fetch", HOST), stderr=subprocess.DEVNULL) as process:
        until((place / "log.apt").exists, "apt's start")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130
    assert not [p for p in (place / "cache").rglob("*") if p.is_file()]


def test_fetching_without_apt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place / "bin"))
    done = run("fetch", HOST)
    assert done.returncode == 126
    assert b"found no apt-get" in done.stderr


def test_list_tells_what_is_cached(cached: Path) -> None:
    rows = json.loads(run("list", "--json").stdout)["hosts"]
    assert [row["name"] for row in rows] == list(HOSTS)
    assert [row["name"] for row in rows if row["cached"]] == [HOST]
    assert {row["qemu_version"] for row in rows if row["architecture"] == "amd64"} == {"7.2.22"}
    text = run("list").stdout.decode()
    assert re.search(rf"^{HOST} +{re.escape(pinned(HOST).version)} +cached ", text, re.MULTILINE)
