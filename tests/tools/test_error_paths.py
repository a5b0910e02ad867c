"""Every command's way to fail: usage on standard error with 2, a missing capability 126.

The commands come from the parser tree, so that a new one is tested without being named here.
"""

from __future__ import annotations

import argparse
import http.server
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from waiting import DEADLINE_S

from kvmhost.control.schema import ErrorInfo, ErrorReply
from kvmhost.tools.main import main
from kvmhost.tools.tree import commands


def leaves() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield each command that does something, with its parser."""

    def below(
        words: tuple[str, ...], parser: argparse.ArgumentParser
    ) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
        children = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in children:
            for name, child in action.choices.items():
                yield from below((*words, name), child)
        if not children:
            yield words, parser

    for command in commands():
        if command.words[0] not in GROUPS or len(command.words) > 1:
            yield from below(command.words, command.parser())


GROUPS = [
    c.words[0] for c in commands() if len(c.words) == 1 and c.children and c.words[0] != "guests"
]
ALL = list(leaves())
NAMES = [" ".join(words) for words, _ in ALL]

#: What a positional argument of a kind can be, for a test that is about something else.
GIVEN = {
    "VM": "novm",
    "GFN": "1025",
    "SIZE": "64M",
    "FILE": "/nonexistent/file",
    "FILE.c": "/nonexistent/guest.c",
    "HOST": "nohost",
    "COMMAND": "run",
    "ADDR": "0x1000",
    "FILE|VM": "novm",
}
#: Options without which a command does not parse.
NEEDED = {
    "reclaimd": ["--budget", "1M"],
    "young record": ["-o", "/nonexistent/out"],
    "young heatmap": ["-o", "/nonexistent/out.png"],
    "young export": ["-o", "/nonexistent/out", "--format", "gfns"],
    "young import": ["-o", "/nonexistent/out", "--format", "gfns"],
    "young whatif": ["--budget", "64M"],
}

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must fail with one line on standard error; return the line."""

    def run(*words: str, code: int = 2) -> str:
        assert main(list(words)) == code, capsys.readouterr()
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err
        assert shown.err.startswith("kvmhost"), shown.err
        return shown.err

    return run


def positionals(parser: argparse.ArgumentParser) -> list[str]:
    """Return words for the arguments that a command requires."""
    found = []
    for action in parser._actions:
        if not action.option_strings and action.nargs not in ("?", "*"):
            found.append(GIVEN[str(action.metavar or action.dest)])
    return found


@pytest.mark.parametrize(("words", "parser"), ALL, ids=NAMES)
def test_an_unknown_option_is_usage(
    words: tuple[str, ...], parser: argparse.ArgumentParser, refused: Refused
) -> None:
    line = refused(*words, *positionals(parser), "--no-such-option-here")
    assert line.startswith(f"kvmhost {words[0]}"), line
    assert "--no-such-option-here" in line or "required" in line


@pytest.mark.parametrize(
    ("words", "parser"),
    [(words, parser) for words, parser in ALL if positionals(parser)],
    ids=[name for name, (_, parser) in zip(NAMES, ALL, strict=True) if positionals(parser)],
)
def test_a_missing_argument_is_usage(
    words: tuple[str, ...], parser: argparse.ArgumentParser, refused: Refused
) -> None:
    line = refused(*words)
    assert line.startswith(f"kvmhost {' '.join(words)}: "), line


def _bad_values() -> Iterator[tuple[tuple[str, ...], str, str]]:
    bad = {
        "TIME": ("0", "5M", "-1s"),
        "SIZE": ("12Q", "1.5"),
        "SHARE": ("12.5", "half"),
        "SIZE|SHARE": ("150%", "some"),
        "N": ("x", "1.5"),
        "PAGES": ("-1",),
        "A:B": ("7",),
    }
    for words, parser in ALL:
        for action in parser._actions:
            form = str(action.metavar or "").removesuffix(",...")
            for value in bad.get(form, ()) if action.option_strings else ():
                # The interval of 0 is refused where the whole configuration is checked.
                # young hot checks its three numbers together.
                if (words, value) not in ((("reclaimd",), "0"), (("young", "hot"), "-1")):
                    yield words, action.option_strings[-1], value


@pytest.mark.parametrize(("words", "option", "value"), list(_bad_values()))
def test_a_bad_value_names_the_option_and_the_text(
    words: tuple[str, ...], option: str, value: str, refused: Refused
) -> None:
    line = refused(*words, *positionals(dict(ALL)[words]), f"{option}={value}")
    assert option in line
    assert repr(value) in line


@pytest.mark.parametrize("words", [words for words, _ in ALL if words[0] != "lab"])
@pytest.mark.parametrize("option", ["--mem", "--resident-max", "--hot"])
def test_an_empty_size_is_usage(words: tuple[str, ...], option: str, refused: Refused) -> None:
    parser = dict(ALL)[words]
    if option not in parser._option_string_actions:
        return
    if option == "--resident-max":
        assert "less than a page" in refused(*words, option, "1")
    else:
        assert option in refused(*words, option, "0")


@pytest.mark.parametrize("words", [words for words, _ in ALL] + [(name,) for name in GROUPS])
def test_help_of_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", *words]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: kvmhost {' '.join(words)} "), shown.out[:200]
    assert shown.err == ""


@pytest.mark.parametrize("words", [(), *((name,) for name in GROUPS)])
def test_without_a_name_the_usage_is_an_error(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: kvmhost")


@pytest.mark.parametrize("name", GROUPS)
def test_an_unknown_name_is_usage(name: str, refused: Refused) -> None:
    assert "unknown" in refused(name, "nosuchname")
    assert "unknown" in refused("help", name, "nosuchname")


def test_help_of_an_unknown_command_is_usage(refused: Refused) -> None:
    assert "unknown command 'nosuch'" in refused("help", "nosuch")


class _Missing(http.server.BaseHTTPRequestHandler):
    """Answers each request with 501, as a VM does whose host lacks what is asked for."""

    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        n_bytes = int(self.headers.get("Content-Length", 0))
        self.rfile.read(n_bytes)
        error = ErrorInfo(501, "something needs a feature, found nothing: get a newer kernel")
        body = msgspec.json.encode(ErrorReply(error))
        self.send_response(501)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A VM ``novm`` and a daemon ``lacking`` that answer 501."""
    monkeypatch.setenv("KVMHOST_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    servers = [
        _Server(str(tmp_path / name), _Missing) for name in ("novm.sock", "_reclaimd.lacking.sock")
    ]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    yield
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


def _of_vms() -> Iterator[tuple[str, ...]]:
    for words, parser in ALL:
        forms = [a.metavar for a in parser._actions if not a.option_strings]
        if "VM" in forms or "FILE|VM" in forms:
            yield words


@pytest.mark.parametrize("words", list(_of_vms()), ids=" ".join)
def test_a_capability_that_the_host_of_a_vm_lacks(
    words: tuple[str, ...], lacking: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = " ".join(words)
    if name == "young watch":
        pytest.skip("needs a terminal before it asks; tests/tools/test_watch.py has it")
    needed = [word.replace("/nonexistent", str(tmp_path)) for word in NEEDED.get(name, [])]
    given = [
        word.replace("/nonexistent", str(tmp_path))
        for word in positionals(dict(ALL)[words]) or ["novm"]
    ]
    assert main([*words, *given, *needed]) == 126
    shown = capsys.readouterr()
    assert "a feature" in shown.err
    assert "get a newer kernel" in shown.err


@pytest.mark.parametrize("words", [("lru_gen", "show"), ("lru_gen", "run", "+ novm 0 1")])
def test_a_capability_that_the_host_of_a_daemon_lacks(
    words: tuple[str, ...], lacking: None, refused: Refused
) -> None:
    assert "a feature" in refused(*words, "--daemon", "lacking", code=126)


def test_the_installed_command_has_the_same_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmhost", "run", "hello", "--mem", "0"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvmhost run: argument --mem: '0': ")
