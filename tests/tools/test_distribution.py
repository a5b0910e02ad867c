"""What is installed: one importable name, with types, documents and guests; built from an sdist.

The fast test runs setuptools' ``build_py`` only. The slow ones build an sdist, a wheel
out of it, and use the wheel in an environment of its own, outside of the tree.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """\
from kvmhost.errors import KvmHostError
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.reclaim.policy.registry import create
from kvmhost.tools.main import main

def boot(name: str) -> int:
    try:
        with Machine(image_path(name), mem_bytes=64 << 20) as machine:
            machine.start()
            reveal_type(machine.wait(10.0))
            return machine.wait(10.0)
    except KvmHostError:
        return main(["doctor"])

reveal_type(create("age", 1024).counters())
"""

SETUP = "import sys; from setuptools import setup; sys.argv = ['setup.py', *sys.argv[1:]]; setup()"


def run(*words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked(folder: Path) -> Path:
    """Copy what git has of the tree; of an unpacked sdist, all of it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
    )
    names = listed.stdout if listed.returncode == 0 else b"."
    packed = subprocess.run(
        ["tar", "c", "--null", "--exclude=.venv", "-T", "-"],
        cwd=ROOT,
        input=names,
        check=True,
        capture_output=True,
    )
    folder.mkdir()
    subprocess.run(["tar", "x"], cwd=folder, input=packed.stdout, check=True)
    return folder


def check_names(names: set[str]) -> None:
    """Check the files of an installation, by their paths from site-packages."""
    assert {name.split("/")[0] for name in names} == {"kvmhost"}
    for wanted in (
        "py.typed",
        "__main__.py",
        "tools/main.py",
        "reclaim/daemon.py",
        "reclaim/draw/html/page.js",
        "guests/build.py",
        "guests/x86_64/guest.h",
        "guests/x86_64/guest.ld",
        "guests/x86_64/hello.c",
        "_core/_native.pyi",
        "docs/architecture.md",
        "docs/examples/own_policy/kvmhost_fifo.py",
    ):
        assert f"kvmhost/{wanted}" in names
    modules = {
        f"kvmhost/{path.relative_to(source)}"
        for source in (ROOT / "kvmhost",)
        for linked in ("", "guests", "reclaim", "tools")
        for path in (source / linked).rglob("*.py")
    }
    assert modules - {name for name in names if name.endswith(".py")} == set()
    assert not [name for name in names if "__pycache__" in name]


def test_build_py_takes_every_module_and_only_our_name(tmp_path: Path) -> None:
    tree = tracked(tmp_path / "tree")
    run(sys.executable, "-c", SETUP, "-q", "build_py", "--build-lib", tmp_path / "lib", cwd=tree)
    library = tmp_path / "lib"
    check_names({str(p.relative_to(library)) for p in library.rglob("*") if p.is_file()})


@dataclasses.dataclass(frozen=True)
class Built:
    """A wheel, the sdist that it was built from, and an environment that has it."""

    wheel: Path
    sdist: Path
    venv: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("distribution")
    tree = tracked(folder / "tree")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--sdist", "-o", folder, tree, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(*build, "--wheel", "-o", folder, unpacked, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return Built(wheel, sdist, _environment(folder / "venv", wheel))


def _environment(venv: Path, *words: str | Path) -> Path:
    """Make an environment with a package of ours; what it needs comes from the tests' own."""
    run(sys.executable, "-m", "venv", venv, cwd=venv.parent)
    pip = (venv / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check")
    (site,) = venv.glob("lib/python*/site-packages")
    needs = [path for path in sys.path if path.endswith("site-packages")]
    run(*pip, "install", "--no-deps", "--no-build-isolation", *words, cwd=venv.parent,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(needs)})  # fmt: skip
    # Behind the environment's own packages, and without the paths of an editable install.
    (site / "needs.pth").write_text("\n".join(needs) + "\n")
    return venv


def outside(built: Built, *words: str, cwd: Path) -> str:
    """Run a command of the environment with nothing of the tree on its path."""
    return run(built.venv / "bin" / words[0], *words[1:], cwd=cwd, env={"PATH": "/usr/bin:/bin"})


@pytest.mark.slow
def test_the_wheel_installs_one_name(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    check_names({name for name in names if ".dist-info/" not in name})
    assert {name for name in names if name.endswith("guests/x86_64/hello.elf")}
    (site,) = built.venv.glob("lib/python*/site-packages")
    before = {"needs.pth", "pip", "setuptools", "pkg_resources", "_distutils_hack"}
    installed = {
        path.name
        for path in site.iterdir()
        if path.name not in before
        and not path.name.startswith(("pip-", "setuptools-", "distutils-"))
    }
    assert installed == {"kvmhost", "-".join(built.wheel.name.split("-")[:2]) + ".dist-info"}


@pytest.mark.slow
def test_the_sdist_has_documents_examples_and_tests(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked_tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    documents = {f"kvmhost/docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    documents |= {name.removeprefix("kvmhost/") for name in documents}
    assert tracked_tests | documents | {"CHANGELOG.md", "LICENSE", "Makefile"} <= names


@pytest.mark.slow
def test_the_wheel_runs_a_guest_outside_of_the_tree(built: Built, tmp_path: Path) -> None:
    assert "hello from vCPU" in outside(built, "kvmhost", "run", "hello", cwd=tmp_path)
    where = outside(built, "python", "-c", "import kvmhost; print(kvmhost.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(built.venv)


@pytest.fixture(scope="module")
def unpacked(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist as a packager has it: unpacked, without links, built in place."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built.sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    assert not [path for path in tree.rglob("*") if path.is_symlink()]
    run(sys.executable, "-c", SETUP, "-q", "build_ext", "--inplace", cwd=tree)
    return tree


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("tests", ["tests/style", "tests/unit"])
def test_an_unpacked_sdist_passes_its_tests(unpacked: Path, tests: str) -> None:
    env = os.environ | {"PYTHONPATH": str(unpacked)}
    command = (sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider")
    where = "import kvmhost; print(kvmhost.__file__)"
    assert str(unpacked) in run(sys.executable, "-c", where, cwd=unpacked, env=env)
    assert " passed" in run(*command, tests, cwd=unpacked, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_a_program_of_a_user_is_checked_strictly(
    built: Built, tmp_path: Path, editable: bool
) -> None:
    venv = built.venv
    if editable:
        venv = _environment(tmp_path / "venv", "-e", tracked(tmp_path / "tree"))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    mypy = run(
        sys.executable, "-m", "mypy", "--strict", "--python-executable", venv / "bin" / "python",
        "--cache-dir", tmp_path / "cache", "--config-file", "/dev/null", program, cwd=tmp_path,
    )  # fmt: skip
    assert "Success: no issues found" in mypy
    assert 'Revealed type is "int"' in mypy.replace("builtins.", "")
