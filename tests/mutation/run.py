"""Runs the tests against mutants of the code, and reports which mutants no test noticed.

    python tests/mutation/run.py [--fraction 1/20] [--shard 1/4] [--seconds 600] [FILE ...]

``targets.toml`` names the files and the tests that cover each, ``survivors.toml`` the
mutants that may live, and why. The work is done in a copy of the tree. Verdicts are appended
to a file as they come (``--results``); a run with the same file goes on where the last one
ended, and decides anew only mutants of files that changed.

========= ====================================================================
killed    a test failed, or took longer than two minutes
timeout   the tests took four times as long as without the mutant
broken    it does not compile, or the tests cannot be collected with it
same      the compiler makes the same code of it
survived  all tests passed
========= ====================================================================

Exits with 1 if a mutant survived that is not in ``survivors.toml``, with 2 if the tests fail
without a mutant.
"""

from __future__ import annotations

import argparse
import collections
import compileall
import contextlib
import dataclasses
import fractions
import functools
import hashlib
import importlib
import json
import os
import py_compile
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, mutants_of

__all__ = ["Report", "listed_survivors", "main", "run", "targets"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: A mutant that loops is stopped after so much time in one test, or after this many times of
#: what its tests need without it.
_TEST_TIMEOUT_S = 120
_TIMES = 4
_LEAST_TIMEOUT_S = 30.0
_CFLAGS = ["-std=gnu11", "-O2", "-w", "-fPIC", "-pthread", "-fvisibility=hidden"]


@dataclasses.dataclass(frozen=True)
class Target:
    """Files, and the tests that are run against mutants of them, in this order."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Survivor:
    """A mutant that may live.

    :param kind: ``equivalent``, ``performance``, ``defence`` or ``untested``
    """

    file: str
    operator: str
    nth: int
    before: str
    after: str
    kind: str
    reason: str

    @property
    def key(self) -> str:
        """As :attr:`mutants.Mutant.key`."""
        return f"{self.file}: {self.operator} {self.nth}: {self.before}"


@dataclasses.dataclass
class Report:
    """Verdicts by key, and what was left out for lack of time."""

    verdicts: dict[str, str]
    unlisted: list[tuple[Mutant, str]]
    n_left: int

    def summary(self) -> str:
        """One line of counts."""
        counts = collections.Counter(self.verdicts.values())
        return ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) + (
            f"; {self.n_left} not run" if self.n_left else ""
        )


def targets() -> list[Target]:
    """Read ``targets.toml``."""
    raw = tomllib.loads((HERE / "targets.toml").read_text())
    return [Target(tuple(row["files"]), tuple(row["tests"])) for row in raw["target"]]


def listed_survivors() -> list[Survivor]:
    """Read ``survivors.toml``."""
    raw = tomllib.loads((HERE / "survivors.toml").read_text())
    return [Survivor(**row) for row in raw["survivor"]]


# -- the copy of the tree ------------------------------------------------------


#: Imported once, before the tests are run in forks of this process.
_PRELOADED = (
    "aiohttp", "cffi", "hypothesis.strategies", "httpx", "lz4.block", "matplotlib.pyplot",
    "msgspec.json", "numpy", "rich.console", "xxhash", "zstandard",
)  # fmt: skip


class Tree:
    """A copy of the tree in which files are changed and tests are run."""

    def __init__(self, root: Path) -> None:
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        self.root = root
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*cache*")
        shutil.copytree(ROOT, root, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        # Bytecode that is valid for a source of this hash: a change within a second counts.
        for folder in ("kvmhost", "reclaim", "tools", "guests"):
            mode = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(root / folder, quiet=2, invalidation_mode=mode)
        sys.dont_write_bytecode = True
        self._environment = os.environ | {
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(root / "hypothesis"),
        }
        self._core: Core | None = None

    def run_tests(self, tests: tuple[str, ...], timeout_s: float) -> str:
        """Return ``passed``, ``killed``, ``broken`` or ``timeout``.

        In a fork of this process, in which what the tests import is in memory, except the
        package itself.
        """
        child = os.fork()
        if child == 0:
            try:
                os._exit(self._run_pytest(tests))
            finally:
                os._exit(70)
        with _pidfd(child) as fd:
            ended = select.select([fd], [], [], timeout_s)[0]
        # Also what a test started and a mutant kept from ending.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not ended:
            return "timeout"
        # 1: a test failed; below 0: a signal ended the interpreter.
        return {0: "passed", 1: "killed"}.get(status, "killed" if status < 0 else "broken")

    def _run_pytest(self, tests: tuple[str, ...]) -> int:
        os.setsid()
        os.chdir(self.root)
        os.environ.update(self._environment)
        sys.path[:0] = [str(self.root)]
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        options = ["-q", "-x", "--tb=no", "-m", "not slow", "-p", "no:cacheprovider"]
        # The method that works while a loop in C holds the main thread.
        options += ["-p", "pytest_timeout", "--timeout", str(_TEST_TIMEOUT_S)]
        options += ["--timeout-method", "thread"]
        return int(pytest.main([*options, *tests]))

    @contextlib.contextmanager
    def changed(self, file: str, text: str) -> Iterator[str | None]:
        """Put a mutant into the tree; yields the verdict if there is one without tests."""
        path = self.root / file
        before = path.read_text()
        path.write_text(text)
        try:
            if file.endswith(".c"):
                if self._core is None:
                    path.write_text(before)
                    self._core = Core(self.root)
                    path.write_text(text)
                yield self._core.build(path)
            else:
                yield _syntax(text, file)
        finally:
            path.write_text(before)
            if file.endswith(".c") and self._core is not None:
                self._core.restore(path)


@contextlib.contextmanager
def _pidfd(process: int) -> Iterator[int]:
    fd = os.pidfd_open(process)
    try:
        yield fd
    finally:
        os.close(fd)


def _syntax(text: str, file: str) -> str | None:
    try:
        compile(text, file, "exec")
    except SyntaxError:
        return "broken"
    return None


class Core:
    """The C core, of which one file at a time is compiled anew."""

    def __init__(self, root: Path) -> None:
        self._core = root / "kvmhost" / "_core"
        self._objects = root / "objects"
        self._objects.mkdir()
        generated = self._objects / "_native.c"
        code = "import sys, kvmhost._core.build as build; build.make_ffi().emit_c_code(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, str(generated)], cwd=root, check=True)
        for source in [generated, *sorted(self._core.glob("*.c"))]:
            if not self._compile(source, self._objects / f"{source.stem}.o"):
                raise RuntimeError(f"{source.name} does not compile")
        self._original = {p.name: p.read_bytes() for p in self._objects.glob("*.o")}
        self._link()

    def build(self, source: Path) -> str | None:
        """Compile a changed file and link; return a verdict if no test is needed."""
        target = self._objects / f"{source.stem}.o"
        if not self._compile(source, target):
            return "broken"
        if target.read_bytes() == self._original[target.name]:
            return "same"
        return None if self._link() else "broken"

    def restore(self, source: Path) -> None:
        """Put the object of the original file back."""
        name = f"{source.stem}.o"
        (self._objects / name).write_bytes(self._original[name])

    def _compile(self, source: Path, target: Path) -> bool:
        include = ["-I", str(self._core), "-I", sysconfig.get_path("include")]
        include += ["-include", str(HERE / "plain.h")]
        command = ["cc", *_CFLAGS, *include, "-c", str(source), "-o", str(target)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0

    def _link(self) -> bool:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        library = self._core / f"_native{suffix}"
        # The old one may be mapped by a process that is still ending.
        library.unlink(missing_ok=True)
        objects = sorted(map(str, self._objects.glob("*.o")))
        command = ["cc", "-shared", "-pthread", *objects, "-o", str(library)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


# -- running -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which mutants to run.

    :param fraction: of all mutants, chosen by ``seed``; the same ones after edits elsewhere
    :param shard: ``(k, n)``: the k-th of n parts, from 1
    :param seconds: start no other mutant after this time; None: no limit
    """

    fraction: float = 1.0
    seed: int = 1
    shard: tuple[int, int] = (1, 1)
    seconds: float | None = None
    files: tuple[str, ...] = ()
    skip_listed: bool = False


class _Results:
    """Verdicts in a file of JSON lines.

    One holds as long as the mutated file is the same; of a survivor, also its tests.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[tuple[str, str], tuple[str, str]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self._known[row["key"], row["code"]] = row["verdict"], row["tests"]

    def get(self, mutant: Mutant, code: str, tests: str) -> str | None:
        verdict, known_tests = self._known.get((mutant.key, code), (None, ""))
        return None if verdict == "survived" and tests != known_tests else verdict

    def add(self, mutant: Mutant, code: str, tests: str, verdict: str) -> None:
        if self._path is not None:
            row = {"key": mutant.key, "code": code, "tests": tests, "verdict": verdict}
            with self._path.open("a") as out:
                out.write(json.dumps(row) + "\n")


@functools.cache
def _digest(*names: str) -> str:
    """Of files, and of the Python files below folders."""
    known = hashlib.sha256()
    for name in names:
        path = ROOT / name.partition("::")[0]
        for part in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            known.update(part.read_bytes())
    return known.hexdigest()[:16]


def _chosen(choice: Choice) -> Iterator[tuple[Mutant, Target]]:
    """Yield the chosen mutants in the order of their rank."""
    listed = {survivor.key for survivor in listed_survivors()} if choice.skip_listed else set()
    found = []
    for target in targets():
        for file in target.files:
            if choice.files and file not in choice.files:
                continue
            for mutant in mutants_of(file, (ROOT / file).read_text()):
                rank = mutant.rank(choice.seed)
                part = int(rank * (1 << 40)) % choice.shard[1] + 1
                if rank < choice.fraction and part == choice.shard[0] and mutant.key not in listed:
                    found.append((rank, mutant, target))
    found.sort(key=lambda row: row[0])
    for _, mutant, target in found:
        yield mutant, target


def run(
    choice: Choice, results: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Run the chosen mutants and return their verdicts.

    :raises RuntimeError: if the tests of a target fail without a mutant
    """
    known, report = _Results(results), Report({}, [], 0)
    allowed = {survivor.key for survivor in listed_survivors()}
    end = None if choice.seconds is None else time.monotonic() + choice.seconds
    baseline: dict[tuple[str, ...], float] = {}
    with tempfile.TemporaryDirectory(prefix="kvmhost-mutation-") as place:
        tree: Tree | None = None
        for mutant, target in _chosen(choice):
            text = (ROOT / mutant.file).read_text()
            digests = _digest(mutant.file), _digest(*target.tests)
            verdict = known.get(mutant, *digests)
            if verdict is None:
                if end is not None and time.monotonic() > end:
                    report.n_left += 1
                    continue
                tree = tree or Tree(Path(place))
                if target.tests not in baseline:
                    baseline[target.tests] = _time_without_mutant(tree, target)
                timeout_s = max(_LEAST_TIMEOUT_S, _TIMES * baseline[target.tests])
                since = time.monotonic()
                verdict = _judge(tree, mutant, target, timeout_s)
                took_s = time.monotonic() - since
                known.add(mutant, *digests, verdict)
                say(f"{verdict:8} {took_s:5.1f} s  {mutant.key}  =>  {mutant.after(text)}")
            report.verdicts[mutant.key] = verdict
            if verdict == "survived" and mutant.key not in allowed:
                report.unlisted.append((mutant, mutant.after(text)))
    return report


def _time_without_mutant(tree: Tree, target: Target) -> float:
    since = time.monotonic()
    verdict = tree.run_tests(target.tests, 1800)
    if verdict != "passed":
        raise RuntimeError(f"without a mutant: {verdict}: {' '.join(target.tests)}")
    return time.monotonic() - since


def _judge(tree: Tree, mutant: Mutant, target: Target, timeout_s: float) -> str:
    with tree.changed(mutant.file, mutant.make()) as verdict:
        if verdict is None:
            verdict = tree.run_tests(target.tests, timeout_s)
    return "survived" if verdict == "passed" else verdict


# -- the command ---------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args: Any = _parser().parse_args(argv)
    choice = Choice(
        float(args.fraction),
        args.seed,
        args.shard,
        args.seconds,
        tuple(args.files),
        args.skip_listed,
    )
    try:
        report = run(choice, args.results, lambda text: print(text, flush=True))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(report.summary())
    for mutant, after in report.unlisted:
        print(f"\n[[survivor]]\nfile = {_toml(mutant.file)}\noperator = {_toml(mutant.operator)}")
        print(f"nth = {mutant.nth}\nbefore = {_toml(mutant.before)}\nafter = {_toml(after)}")
        print('kind = ""\nreason = ""')
    return 1 if report.unlisted else 0


def _toml(text: str) -> str:
    """A TOML string; JSON's escapes are TOML's."""
    return f"'{text}'" if "'" not in text else json.dumps(text, ensure_ascii=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="only these files")
    parser.add_argument("--fraction", type=fractions.Fraction, default=fractions.Fraction(1))
    parser.add_argument("--seed", type=int, default=1, help="chooses the fraction (1)")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="K/N")
    parser.add_argument("--seconds", type=float, help="start no other mutant after this time")
    parser.add_argument("--results", type=Path, help="file of verdicts, to go on with")
    parser.add_argument("--skip-listed", action="store_true", help="without known survivors")
    return parser


def _shard(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    found = int(number), int(total)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: need K/N with K from 1 to N")
    return found


if __name__ == "__main__":
    sys.exit(main())
