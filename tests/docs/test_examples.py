"""The examples do what they say they do, and so does the Python of the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from doc_pages import ROOT
from young_model import SECOND, Window, write

from kvmhost.lab.fetching import is_cached
from kvmhost.lab.hosts import find_host
from kvmhost.reclaim.policy import registry

EXAMPLES = ROOT / "docs" / "examples"


def promised(text: str) -> str:
    """Return what an example's head says that its last command prints."""
    lines = [line.removeprefix(" *").strip() for line in text.splitlines()]
    start = max(i for i, line in enumerate(lines) if line.startswith("$ python"))
    end = next(i for i in range(start, len(lines)) if lines[i] in ("", '"""'))
    return "\n".join(lines[start + 1 : end]) + "\n"


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True)


@pytest.mark.requires_kvm
def test_the_first_program() -> None:
    path = EXAMPLES / "first_program.py"
    assert set(re.findall(r"^from (kvmhost\S*)", path.read_text(), re.M)) == {
        "kvmhost.exits",
        "kvmhost.kvm",
    }
    done = run(sys.executable, path)
    assert (done.stdout, done.returncode) == (promised(path.read_text()), 0), done.stderr


@pytest.mark.requires_kvm
def test_the_own_device() -> None:
    path = EXAMPLES / "own_device.py"
    done = run(sys.executable, path)
    assert (done.stdout, done.returncode) == (promised(path.read_text()), 0), done.stderr


def test_the_own_guest(tmp_path: Path) -> None:
    image = tmp_path / "own_guest.elf"
    kvmhost = (sys.executable, "-m", "kvmhost")
    done = run(*kvmhost, "guests", "build", EXAMPLES / "own_guest.c", "-o", image)
    assert done.returncode == 0, done.stderr
    assert "n=4  the last number that is added" in run(*kvmhost, "guests", image).stdout
    done = run(*kvmhost, "run", image, "--param", "n=10")
    assert (done.stdout, done.returncode) == ("sum 0x37\n", 55), done.stderr
    source = (EXAMPLES / "own_guest.c").read_text()
    assert "sum 0x37" in source
    assert "*     55" in source


def test_the_own_policy_is_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = EXAMPLES / "own_policy"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"][registry.GROUP]
    info = tmp_path / "kvmhost_fifo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = "\n".join(f"{name} = {target}" for name, target in entries.items())
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{lines}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(folder))
    offer = registry.offers()["fifo"]
    assert (offer.works, offer.source) == (True, "kvmhost-fifo 1.0")
    assert registry.create("fifo", 64).name == "fifo"
    sys.modules.pop("kvmhost_fifo", None)


def test_the_own_policy_replays_what_it_says() -> None:
    path = EXAMPLES / "own_policy" / "kvmhost_fifo.py"
    done = run(sys.executable, path)
    assert (done.stdout, done.returncode) == (promised(path.read_text()), 0), done.stderr


def test_the_look_at_a_record(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    lists = [{1, 2, 7}, {1, 3}, {1, 2}, {1}]
    windows = [
        Window(256, frozenset(gfns), None, (i + 1) * SECOND, (i + 2) * SECOND)
        for i, gfns in enumerate(lists)
    ]
    write(tmp_path / "r.young", 0, windows, 256).close()
    done = run(sys.executable, EXAMPLES / "look_at_a_record.py", tmp_path / "r.young")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4 windows of 256 pages; young: 1 to 3",
        "first young pages of the last window: ['0x1']",
        "always young: 1, never young: 252",
        "gfn 0x1: ####",
        "working set of 3 windows: median 3 pages",
    ]


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_aging_of_a_kernel(tmp_path: Path) -> None:
    if not is_cached(find_host("amd64-6.12")):
        pytest.skip("run: kvmhost lab fetch amd64-6.12")
    picture = tmp_path / "aging.png"
    done = run(sys.executable, EXAMPLES / "kernel_aging.py", "amd64-6.12", "-o", picture)
    assert done.returncode == 0, done.stderr
    counts = re.findall(r"^(.*): (\d+) young, (\d+) mapped$", done.stdout, re.M)
    assert [int(young) for _, young, _ in counts] == [512, 512, 0, 0, 0, 512, 0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_example_is_on_the_page_and_here() -> None:
    page, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"`{path.name}" in page
            assert path.name in here


@pytest.mark.requires_kvm
def test_the_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert "assert young.gfns()" in blocks[0]
    done = run(sys.executable, "-W", "error", "-c", blocks[0])
    assert done.returncode == 0, done.stderr
