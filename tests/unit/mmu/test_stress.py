"""The C stress program, as ``make sanitize`` runs it, in a short form."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[3]
FORMATS = ["npt", "ept", "stage2", "stage2-sw", "radix", "radix-64k", "npt-fast", "stage2-fast"]


def build(directory, *flags):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    core = ROOT / "kvmhost" / "_core"
    program = directory / "mmu_stress"
    sources = [ROOT / "tests/sanitize/mmu_stress.c", *core.glob("mmu_*.c"), *core.glob("soft*.c")]
    command = [compiler, "-std=gnu11", "-g", "-pthread", f"-I{core}", *flags]
    command += [*map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(tmp_path_factory.mktemp("stress"), "-O2")


@pytest.mark.parametrize("table_format", FORMATS)
def test_accessed_bits_balance(plain, table_format):
    """Whatever harvests, faults, unmaps, splits and zaps do to each other, no bit is lost."""
    done = subprocess.run(
        [plain, table_format, "1"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers_find_nothing(tmp_path, sanitizer):
    program = build(tmp_path, "-O1", f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer")
    for table_format in FORMATS:
        done = subprocess.run(
            [program, table_format, "20"], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
