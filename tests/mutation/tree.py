"""A copy of the tree in which files are changed and tests are run."""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import functools
import importlib
import json
import os
import py_compile
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cover import Cover, Recorder, Selector, Timeouts
from patched import Server, end_children, wait_for

__all__ = ["Core", "Tree"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_CFLAGS = ["-std=gnu11", "-w", "-fPIC", "-pthread", "-fvisibility=hidden"]
#: Status of a process in which a test took too long.
_TIMEOUT = 71
#: A mutant may write no larger file, and no core.
_MOST_BYTES = 16 << 30
#: Imported once, before the tests are run in forks of this process.
_PRELOADED = (
    "_pytest.assertion.rewrite", "aiohttp", "cffi", "hypothesis.strategies", "httpx", "lz4.block",
    "matplotlib.pyplot", "msgspec.json", "numpy", "rich.console", "xxhash", "zstandard",
)  # fmt: skip
_PR_SET_CHILD_SUBREAPER = 36


class Tree:
    """The copy.

    A test runs in a fork of this process, in which what the tests import is in memory, except
    the package itself. What a test started and a mutant kept from ending is ended after it.
    """

    def __init__(self, root: Path) -> None:
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        self.root = root / "tree"
        self._scratch = root / "t"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*cache*")
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=ignored)
        # Bytecode that is valid for a source of this hash: a change within a second counts.
        for folder in ("kvmhost", "reclaim", "tools", "guests"):
            mode = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(self.root / folder, quiet=2, invalidation_mode=mode)
        _adopt_orphans()
        self._server: _Served | None = None
        self._environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(root / "hypothesis"),
        }

    @functools.cached_property
    def core(self) -> Core:
        """The C core of the copy, compiled as needed."""
        return Core(self.root)

    def run_tests(
        self, tests: list[str], limits_s: dict[str, float], timeout_s: float, keep: bool = False
    ) -> str:
        """Return ``passed``, ``killed``, ``broken`` or ``timeout``.

        :param tests: in this order, until one fails
        :param limits_s: how long each may take; one that is not named may take all the time
        :param keep: keep the bytecode of the tests for the next runs
        """
        files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
        # A folder or file as a whole stands for its tests.
        plugins: list[Any] = [Timeouts(limits_s, _TIMEOUT)]
        if limits_s:
            plugins.append(Selector(tests))
        options = ["-x", *(files if limits_s else tests)]
        return self._verdict(self._fork(options, plugins, timeout_s, keep))

    def cover(self, files: tuple[str, ...], tests: list[str], timeout_s: float) -> Cover:
        """Find which tests execute which lines of the files.

        :raises RuntimeError: if the run did not end
        """
        out = self.root / "cover.json"
        with contextlib.ExitStack() as stack:
            library, objects = None, self.root
            if files[0].endswith(".c"):
                library, objects = stack.enter_context(self.core.counted(files))
            plugin = Recorder(self.root, files, out, library, objects)
            status = self._fork(tests, [plugin], timeout_s, False)
        if status is None or not out.exists():
            raise RuntimeError(f"the lines of {' '.join(tests)} were not found: status {status}")
        found = Cover.from_json(out.read_text())
        out.unlink()
        return found

    def run_patched(
        self,
        target: tuple[str, ...],
        file: str,
        after: str,
        tests: list[str],
        limits_s: dict[str, float],
        timeout_s: float,
    ) -> str | None:
        """As :meth:`run_tests`, for a mutant of Python; None if it has to be imported.

        :param target: all tests of which these are some
        """
        if self._server is None or self._server.tests != target:
            if self._server:
                self._server.close()
            self._server = _Served(self, target)
        before = (ROOT / file).read_text()
        status = self._server.ask(
            root=str(self.root),
            file=file,
            before=before,
            after=after,
            tests=tests,
            limits=limits_s,
            timeout=timeout_s,
        )
        return None if status == Server.CANNOT else self._verdict(status)

    def close(self) -> None:
        """End the server, if there is one."""
        if self._server:
            self._server.close()
            self._server = None

    def _verdict(self, status: int | None) -> str:
        if status is None or status == _TIMEOUT:
            return "timeout"
        # 1: a test failed; below 0: a signal ended the interpreter.
        return {0: "passed", 1: "killed"}.get(status, "killed" if status < 0 else "broken")

    def _fork(
        self, options: list[str], plugins: list[Any], timeout_s: float, keep: bool
    ) -> int | None:
        child = os.fork()
        if child == 0:
            try:
                os._exit(self.run_pytest(options, plugins, keep))
            finally:
                os._exit(70)
        status = wait_for(child, timeout_s)
        end_children(frozenset({self._server.pid} if self._server else ()))
        shutil.rmtree(self._scratch, ignore_errors=True)
        return status

    def run_pytest(self, options: list[str], plugins: list[Any], keep: bool) -> int:
        """Run pytest in this process, a fork; return its exit status."""
        os.setsid()
        os.chdir(self.root)
        os.environ.update(self._environment)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_BYTES, _MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/oom_score_adj").write_text("1000")
        sys.path[:0] = [str(self.root)]
        sys.dont_write_bytecode = not keep
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        always = ["-q", "--tb=no", "-m", "not slow", "-p", "no:cacheprovider"]
        always += ["-p", "pytest_timeout", "--timeout", "0", "-o", "faulthandler_timeout=0"]
        always += ["--basetemp", str(self._scratch)]
        return int(pytest.main([*always, *options], plugins=plugins))

    @contextlib.contextmanager
    def changed(self, file: str, text: str) -> Iterator[str | None]:
        """Put a mutant into the tree; yields the verdict if there is one without tests."""
        path = self.root / file
        core = self.core if file.endswith(".c") else None
        before = path.read_text()
        path.write_text(text)
        try:
            yield core.build(path) if core else _compiled(text, before)
        finally:
            path.write_text(before)
            if core:
                core.restore(path)


def _compiled(text: str, before: str) -> str | None:
    try:
        code = compile(text, "file", "exec", optimize=0)
    except SyntaxError:
        return "broken"
    return "same" if code == compile(before, "file", "exec", optimize=0) else None


def _adopt_orphans() -> None:
    """Let orphans of a test come to this process, which ends them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class _Served:
    """A process with a :class:`patched.Server` in it."""

    def __init__(self, tree: Tree, tests: tuple[str, ...]) -> None:
        self.tests = tests
        requests, ask = os.pipe()
        answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ask)
            os.close(answers)
            _adopt_orphans()
            plugin = Server(requests, answer, _TIMEOUT)
            try:
                os._exit(tree.run_pytest(list(tests), [plugin], keep=False))
            finally:
                os._exit(70)
        os.close(requests)
        os.close(answer)
        self._ask, self._answers = os.fdopen(ask, "w"), os.fdopen(answers)

    def ask(self, **request: Any) -> int | None:
        """Return the answer.

        :raises RuntimeError: if the process has ended
        """
        print(json.dumps(request), file=self._ask, flush=True)
        if not (line := self._answers.readline()):
            raise RuntimeError(f"the process with {' '.join(self.tests)} has ended")
        found: int | None = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        self._ask.close()
        self._answers.close()
        os.waitpid(self.pid, 0)


class Core:
    """The C core, of which one file at a time is compiled anew."""

    def __init__(self, root: Path) -> None:
        self._core = root / "kvmhost" / "_core"
        self._objects = root / "objects"
        self._objects.mkdir()
        self.library = self._core / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        generated = self._objects / "_native.c"
        code = "import sys, kvmhost._core.build as build; build.make_ffi().emit_c_code(sys.argv[1])"
        command = [sys.executable, "-c", code, str(generated)]
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        for source in [generated, *sorted(self._core.glob("*.c"))]:
            if not self._compile(source, self._objects / f"{source.stem}.o"):
                raise RuntimeError(f"{source.name} does not compile")
        self._original = {p.name: p.read_bytes() for p in self._objects.glob("*.o")}
        self._link(self._objects)

    def build(self, source: Path) -> str | None:
        """Compile a changed file and link; return a verdict if no test is needed."""
        target = self._objects / f"{source.stem}.o"
        if not self._compile(source, target):
            return "broken"
        if target.read_bytes() == self._original[target.name]:
            return "same"
        return None if self._link(self._objects) else "broken"

    def restore(self, source: Path) -> None:
        """Put the object of the original file back."""
        name = f"{source.stem}.o"
        (self._objects / name).write_bytes(self._original[name])

    @contextlib.contextmanager
    def counted(self, files: tuple[str, ...]) -> Iterator[tuple[Path, Path]]:
        """Put in a library that counts the lines of the files: it, and where it counts."""
        objects = self._objects.with_name("counted")
        shutil.copytree(self._objects, objects)
        for file in files:
            source = self._core / Path(file).name
            count = ["-O0", "--coverage", "-fprofile-update=atomic"]
            if not self._compile(source, objects / f"{source.stem}.o", count):
                raise RuntimeError(f"{source.name} does not compile with --coverage")
        calls = objects / "kh_cover.c"
        calls.write_text(_COVER)
        self._compile(calls, objects / "kh_cover.o")
        if not self._link(objects, "--coverage"):
            raise RuntimeError("the core does not link with --coverage")
        try:
            yield self.library, objects
        finally:
            shutil.rmtree(objects)
            self._link(self._objects)

    def _compile(self, source: Path, target: Path, flags: list[str] | None = None) -> bool:
        include = ["-I", str(self._core), "-I", sysconfig.get_path("include")]
        include += ["-include", str(HERE / "plain.h")]
        command = ["cc", *_CFLAGS, *(flags or ["-O2"]), *include, "-c", str(source)]
        done = subprocess.run([*command, "-o", str(target)], stderr=subprocess.DEVNULL, check=False)
        return done.returncode == 0

    def _link(self, folder: Path, *flags: str) -> bool:
        # The old one may be mapped by a process that is still ending.
        self.library.unlink(missing_ok=True)
        objects = sorted(map(str, folder.glob("*.o")))
        command = ["cc", "-shared", "-pthread", *flags, *objects, "-o", str(self.library)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


_COVER = """\
void __gcov_dump(void);
void __gcov_reset(void);
__attribute__((visibility("default"))) void kh_cover_dump(void) { __gcov_dump(); }
__attribute__((visibility("default"))) void kh_cover_reset(void) { __gcov_reset(); }
"""
