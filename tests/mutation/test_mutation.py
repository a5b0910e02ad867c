"""The mutation run: its parts, and a sample of it in ``make test-slow``."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import mutants
import pytest
import run as mutation

#: How many mutants of each file ``make test-slow`` runs, and which: others each week.
SAMPLE = os.environ.get("KVMHOST_MUTATION_SAMPLE", "3")
SEED = os.environ.get("KVMHOST_MUTATION_SEED", str(mutation.weekly_seed(time.time())))
SECONDS = os.environ.get("KVMHOST_MUTATION_SECONDS", "6000")

C = """\
/* if (a < b) in a comment */
#include <x.h>
static int f(struct a *p, int n)
{
    int i = n - 1;

    if (p->x < n && i == 3)
        return -1;
    __atomic_fetch_add(&p->count, 1, __ATOMIC_RELAXED);
    p->y = call(i,
            n);
    call("a < b", n);
    return 0;
}
"""

PYTHON = """\
from x import y

def f(a: int | None, n):
    b: dict[str, int | float] = {}
    if a < n and not b:
        self.count += 1
        call(n)
    return a + 1
"""


def changes(file: str, text: str) -> set[tuple[str, str, str]]:
    return {(m.operator, m.before, m.after(text)) for m in mutants.mutants_of(file, text)}


def test_mutants_of_c() -> None:
    found = changes("a.c", C)
    condition = "if (p->x < n && i == 3)"
    assert {
        ("relational", condition, "if (p->x <= n && i == 3)"),
        ("relational", condition, "if (p->x < n && i != 3)"),
        ("logical", condition, "if (p->x < n || i == 3)"),
        ("negate", condition, "if (!(p->x < n && i == 3))"),
        ("number", condition, "if (p->x < n && i == 4)"),
        ("arithmetic", "int i = n - 1;", "int i = n + 1;"),
        ("remove", 'call("a < b", n);', ";"),
        ("remove", "p->y = call(i,", ";"),
        ("number", "return 0;", "return 1;"),
    } <= found
    atomic = [after for operator, _, after in found if operator == "plain"]
    assert atomic == ["plain_fetch_add(&p->count, 1, __ATOMIC_RELAXED);"]
    assert not [row for row in found if "comment" in row[1] or "include" in row[1]]
    # A declaration and a return are no statements to remove.
    removed = {before for operator, before, _ in found if operator == "remove"}
    assert not removed & {"int i = n - 1;", "return 0;", "return -1;"}


def test_mutants_of_python() -> None:
    found = changes("a.py", PYTHON)
    condition = "if a < n and not b:"
    assert {
        ("ReplaceComparisonOperator_Lt_LtE", condition, "if a <= n and not b:"),
        ("ReplaceAndWithOr", condition, "if a < n or not b:"),
        ("remove", "self.count += 1", "pass"),
        ("remove", "call(n)", "pass"),
        ("ReplaceBinaryOperator_Add_Sub", "return a + 1", "return a - 1"),
    } <= found
    assert not [row for row in found if "BitOr" in row[0] or row[1].startswith(("def", "from"))]


def test_a_mutant_is_the_same_after_edits_elsewhere() -> None:
    for file, text in (("a.c", C), ("a.py", PYTHON)):
        before = mutants.mutants_of(file, text)
        after = mutants.mutants_of(file, "\n\n" + text)
        assert [m.key for m in before] == [m.key for m in after]
        assert [m.rank(1) for m in before] == [m.rank(1) for m in after]
        assert len({m.key for m in before}) == len(before)


def test_targets_and_their_tests_exist() -> None:
    for target in mutation.targets():
        assert target.tests
        for name in (*target.files, *target.tests):
            assert (mutation.ROOT / name.partition("::")[0]).exists(), name
    files = [file for target in mutation.targets() for file in target.files]
    assert len(set(files)) == len(files)


def test_listed_survivors_are_mutants_of_the_code_as_it_is() -> None:
    """What a survivor's line became is not listed any more; each has its reason."""
    by_file = collections.defaultdict(list)
    for survivor in mutation.listed_survivors():
        by_file[survivor.file].append(survivor)
    known = {file for target in mutation.targets() for file in target.files}
    assert set(by_file) <= known
    for file, survivors in by_file.items():
        text = (mutation.ROOT / file).read_text()
        found = {mutant.key: mutant for mutant in mutants.mutants_of(file, text)}
        for survivor in survivors:
            assert survivor.key in found, f"not in the code: {survivor.key}"
            assert found[survivor.key].after(text) == survivor.after
            assert survivor.kind in ("equivalent", "performance", "defence", "untested")
            assert survivor.reason


def test_the_page_lists_the_survivors() -> None:
    page = (mutation.ROOT / "docs" / "testing.md").read_text()
    table = page.partition("| file | the line of the mutant | kind | reason |")[2]
    rows = table.partition("\n\n")[0].splitlines()[2:]
    assert sorted(rows) == sorted(
        f"| `{s.file}` | `{s.after.replace('|', chr(92) + '|')}` | {s.kind} | {s.reason} |"
        for s in mutation.listed_survivors()
    )


def run_in(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a small tree that has a copy of it."""
    command = [sys.executable, str(tree / "tests/mutation/run.py"), "--all", *words]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A package of one function, a test of half of it, and the mutation run."""
    here = Path(mutation.__file__).parent
    place = tmp_path / "tests" / "mutation"
    place.mkdir(parents=True)
    for name in ("run.py", "tree.py", "cover.py", "patched.py", "mutants.py", "plain.h"):
        (place / name).write_text((here / name).read_text())
    (place / "targets.toml").write_text(
        '[[target]]\nfiles = ["part.py"]\ntests = ["tests/test_part.py"]\n'
    )
    (place / "survivors.toml").write_text("survivor = []\n")
    (tmp_path / "part.py").write_text(
        "def larger(a, b):\n    return a > b\n\n\ndef smaller(a, b):\n    return a < b\n"
    )
    (tmp_path / "tests" / "test_part.py").write_text(
        "from part import larger, smaller\n\n\ndef test_larger():\n"
        "    assert larger(2, 1)\n    assert not larger(1, 1)\n    assert smaller(1, 2)\n"
    )
    return tmp_path


def test_a_mutant_that_no_test_notices_fails_the_run(small_tree: Path) -> None:
    results = small_tree / "results"
    done = run_in(small_tree, "--results", str(results))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 killed, 1 survived" in done.stdout
    listed = done.stdout[done.stdout.index("[[survivor]]") :]
    assert "before = 'return a < b'\nafter = 'return a <= b'\n" in listed
    # With a reason in the list it may live. Nothing is run again that is known.
    reason = listed.replace('kind = ""', 'kind = "defence"').replace(
        'reason = ""', 'reason = "nobody asks for equals"'
    )
    (small_tree / "tests/mutation/survivors.toml").write_text(reason)
    again = run_in(small_tree, "--results", str(results))
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout == "all mutants\n1 killed, 1 survived\n"
    # A test that notices it: the verdict was one about the tests as they were.
    test = small_tree / "tests" / "test_part.py"
    test.write_text(test.read_text() + "    assert not smaller(1, 1)\n")
    better = run_in(small_tree, "--results", str(results))
    assert "2 killed" in better.stdout


def test_tests_that_fail_without_a_mutant_are_an_error(small_tree: Path) -> None:
    (small_tree / "tests" / "test_part.py").write_text("def test_it():\n    assert False\n")
    done = run_in(small_tree)
    assert done.returncode == 2
    assert "without a mutant: killed: tests/test_part.py" in done.stderr


@pytest.mark.slow
@pytest.mark.requires_kvm
@pytest.mark.requires_uffd
@pytest.mark.timeout(20_000)
def test_no_new_survivor_in_the_sample() -> None:
    command = [sys.executable, str(mutation.HERE / "run.py"), "--sample", SAMPLE, "--seed", SEED]
    done = subprocess.run([*command, "--seconds", SECONDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "killed" in done.stdout
