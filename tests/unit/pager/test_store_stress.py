"""The store's C stress program, as ``make sanitize`` runs it, in a short form."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
from waiting import DEADLINE_S

ROOT = pathlib.Path(__file__).parents[3]
CORE = ROOT / "kvmhost" / "_core"


def build(directory: pathlib.Path, *flags: str) -> pathlib.Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = directory / "store_stress"
    sources = [ROOT / "tests/sanitize/store_stress.c"]
    sources += [CORE / name for name in ("store.c", "slab.c", "codec.c")]
    command = [compiler, "-std=gnu11", "-g", "-pthread", f"-I{CORE}", *flags]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build(tmp_path_factory.mktemp("stress"), "-O2")


@pytest.mark.parametrize("where", ["memory", "file"])
def test_what_comes_back_is_what_went(plain: pathlib.Path, where: str) -> None:
    done = subprocess.run([plain, where, "0.7"], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing_in_the_store(tmp_path: pathlib.Path, sanitizer: str) -> None:
    program = build(tmp_path, "-O1", f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer")
    for where in ("memory", "file"):
        done = subprocess.run([program, where, "20"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
