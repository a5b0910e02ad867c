"""Runs the tests against mutants of the code, and reports which mutants no test noticed.

    python tests/mutation/run.py [--all | --sample 3] [--shard 1/4] [--seconds 600] [FILE ...]

``targets.toml`` names the files and the tests that cover each, ``survivors.toml`` the
mutants that may live, and why. The work is done in a copy of the tree. First the tests run as
the code is, once more to find which of them execute which lines; then each mutant meets the
tests that execute its statement, the fastest first, until one fails.

Without ``--all``, a sample of each file is run: the mutants that come first when all are put
in an order that a seed determines. The seed is the number of weeks since 1970, so that every
week tries others; the first line of the output says it, ``--seed`` repeats it.

Verdicts are appended to a file as they come (``--results``); a run with the same file goes on
where the last one ended, and decides anew only mutants of files that changed.

========= ====================================================================
killed    a test failed
timeout   a test took over 20 s and ten times as long as without the mutant
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
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cover import Cover
from mutants import Mutant, mutants_of, statement_spans
from tree import HERE, ROOT, Tree

__all__ = ["Report", "listed_survivors", "main", "run", "table", "targets", "weekly_seed"]

#: A mutant that loops is stopped after so much time in one test.
_LEAST_TIMEOUT_S, _TIMES = 20.0, 10
#: And after this time in all.
_MOST_S = 1800.0
_SAMPLE = 3


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


# -- running -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which mutants to run.

    :param sample: so many of each file, chosen by ``seed``, the same ones after edits
        elsewhere; None: all
    :param shard: ``(k, n)``: the k-th of n parts, from 1
    :param seconds: start no other mutant after this time; None: no limit
    :param skip_listed: leave out those of ``survivors.toml``
    """

    sample: int | None = _SAMPLE
    seed: int = 1
    shard: tuple[int, int] = (1, 1)
    seconds: float | None = None
    files: tuple[str, ...] = ()
    skip_listed: bool = False


def weekly_seed(now_s: float) -> int:
    """Return the seed of the week: whole weeks since 1970-01-01."""
    return int(now_s // (7 * 86400))


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
    """Yield the chosen mutants, target by target, in the order of their rank."""
    listed = {survivor.key for survivor in listed_survivors()} if choice.skip_listed else set()
    for target in targets():
        found = []
        for file in target.files:
            if choice.files and file not in choice.files:
                continue
            ranked = sorted(
                (mutant.rank(choice.seed), mutant)
                for mutant in mutants_of(file, (ROOT / file).read_text())
            )
            found += ranked[: choice.sample]
        for rank, mutant in sorted(found):
            part = int(rank * (1 << 40)) % choice.shard[1] + 1
            if part == choice.shard[0] and mutant.key not in listed:
                yield mutant, target


class _Judge:
    """Decides about mutants; makes the copy of the tree and finds lines when first needed."""

    def __init__(self, place: Path, say: Callable[[str], None]) -> None:
        self._place, self._say = place, say
        self._covers: dict[Target, Cover] = {}
        self._n_killed: collections.Counter[str] = collections.Counter()

    def close(self) -> None:
        """End the processes that it keeps."""
        if "_tree" in vars(self):
            self._tree.close()

    @functools.cached_property
    def _tree(self) -> Tree:
        return Tree(self._place)

    def verdict(self, mutant: Mutant, target: Target) -> str:
        """Run the tests that reach a mutant.

        :raises RuntimeError: if tests of the target fail without it
        """
        cover = self._cover(target)
        text = (ROOT / mutant.file).read_text()
        spans = statement_spans(mutant.file, text)
        tests = cover.tests_of(mutant.file, spans.get(mutant.line, (mutant.line, mutant.line)))
        limits = {name: max(_LEAST_TIMEOUT_S, _TIMES * cover.tests[name].seconds) for name in tests}
        with self._tree.changed(mutant.file, mutant.make()) as verdict:
            if verdict is None and tests and mutant.file.endswith(".py"):
                made = mutant.make()
                verdict = self._tree.run_patched(
                    target.tests, mutant.file, made, tests, limits, _MOST_S
                )
            if verdict is None:
                verdict = self._tree.run_tests(tests, limits, _MOST_S) if tests else "passed"
        return "survived" if verdict == "passed" else verdict

    def _cover(self, target: Target) -> Cover:
        if target not in self._covers:
            since = time.monotonic()
            if target.files[0].endswith(".c"):
                _ = self._tree.core
            verdict = self._tree.run_tests(list(target.tests), {}, _MOST_S, keep=True)
            if verdict != "passed":
                raise RuntimeError(f"without a mutant: {verdict}: {' '.join(target.tests)}")
            cover = self._tree.cover(target.files, list(target.tests), _MOST_S)
            if not any(test.lines for test in cover.tests.values()):
                raise RuntimeError(f"no line of {' '.join(target.files)} is executed by a test")
            if failed := cover.failed():
                raise RuntimeError(f"without a mutant, alone: killed: {' '.join(failed)}")
            self._covers[target] = cover
            took_s = time.monotonic() - since
            self._say(f"{len(cover.tests)} tests for {target.files[0]} ...: {took_s:.1f} s")
        return self._covers[target]


def run(
    choice: Choice, results: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> Report:
    """Run the chosen mutants and return their verdicts.

    :raises RuntimeError: if the tests of a target fail without a mutant
    """
    known, report = _Results(results), Report({}, [], 0)
    allowed = {survivor.key for survivor in listed_survivors()}
    end = None if choice.seconds is None else time.monotonic() + choice.seconds
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmhost-mutation-"))
        judge = _Judge(Path(place), say)
        stack.callback(judge.close)
        for mutant, target in _chosen(choice):
            text = (ROOT / mutant.file).read_text()
            digests = _digest(mutant.file), _digest(*target.tests)
            verdict = known.get(mutant, *digests)
            if verdict is None:
                if end is not None and time.monotonic() > end:
                    report.n_left += 1
                    continue
                since = time.monotonic()
                verdict = judge.verdict(mutant, target)
                took_s = time.monotonic() - since
                known.add(mutant, *digests, verdict)
                say(f"{verdict:8} {took_s:5.1f} s  {mutant.key}  =>  {mutant.after(text)}")
            report.verdicts[mutant.key] = verdict
            if verdict == "survived" and mutant.key not in allowed:
                report.unlisted.append((mutant, mutant.after(text)))
    return report


_VERDICTS = ("killed", "timeout", "survived", "same", "broken")


def table(results: Path) -> str:
    """Return a table, in Markdown, of what was decided about the files as they are."""
    known = _Results(results)
    rows, sums = [], [0] * (2 + len(_VERDICTS))
    for target in targets():
        for file in target.files:
            mutants = mutants_of(file, (ROOT / file).read_text())
            digests = _digest(file), _digest(*target.tests)
            found = collections.Counter(known.get(mutant, *digests) for mutant in mutants)
            counts = [len(mutants), len(mutants) - found[None], *(found[v] for v in _VERDICTS)]
            sums = [a + b for a, b in zip(sums, counts, strict=True)]
            rows.append((f"`{file}`", *counts))
    lines = [("file", "mutants", "run", *_VERDICTS), ("---",) + ("---:",) * len(sums)]
    lines += [*rows, ("all", *sums)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# -- the command ---------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args: Any = _parser().parse_args(argv)
    if args.table:
        print(table(args.table))
        return 0
    seed = weekly_seed(time.time()) if args.seed is None else args.seed
    sample = None if args.all else args.sample
    choice = Choice(sample, seed, args.shard, args.seconds, tuple(args.files), args.skip_listed)
    print("all mutants" if sample is None else f"{sample} mutants of each file, --seed {seed}")
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
    parser.add_argument("--all", action="store_true", help="all mutants, no sample")
    parser.add_argument("--sample", type=int, default=_SAMPLE, help="so many of each file (3)")
    parser.add_argument("--seed", type=int, help="chooses the sample (weeks since 1970)")
    parser.add_argument("--shard", type=_shard, default=(1, 1), metavar="K/N")
    parser.add_argument("--seconds", type=float, help="start no other mutant after this time")
    parser.add_argument("--results", type=Path, help="file of verdicts, to go on with")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="only count verdicts")
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
