"""Nothing that others wrote moves the cursor, changes the title, or forges a line.

Each source of such text (a record, a file name, an image, a lease holder, a VM's answer, a
log line) holds an escape sequence, C1 controls, a bidirectional override and newlines.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from young_model import SECOND, Window

from kvmhost import errors
from kvmhost.printable import printable, printable_lines
from kvmhost.reclaim.errors import ConfigError, KernelFileError, RecordError
from kvmhost.tools.ending import guard
from kvmhost.tools.main import main
from kvmhost.tools.progress import show_table
from kvmhost.tools.terminal import PrintableStream, log_to_stderr, printable_streams, unfiltered

FORGED = "kvmhost: all is well"
HOSTILE = f"x\x1b[2J\x1b]0;title\x07\x9b31m\x85\u202egnp.exe\u2028\x7f\r\n{FORGED}\n"


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    def check() -> str:
        out, err = capsys.readouterr()
        harmless(out + err)
        return out + err

    return check


def harmless(text: str) -> None:
    """Fail if a terminal would obey a part of the text, or it has the forged line."""
    bad = {c for c in text if not c.isprintable()} - {"\n", "\t"}
    assert not bad, text
    assert not any(line.startswith(FORGED) for line in text.splitlines()), text
    assert FORGED in text, "the source was not shown at all"


# -- the function and the stream ------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain [red] 日本 é 😀", "plain [red] 日本 é 😀"),
        ("a\x1b[31mb", r"a\u001b[31mb"),
        ("a\x9bb\x85c\x7f", r"a\u009bb\u0085c\u007f"),
        ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
        ("a\nb\rc\td\u2028e", r"a\nb\rc\td\u2028e"),
        ("\udc80", r"\udc80"),
        ("\U000e0001", r"\udb40\udc01"),
        ("", ""),
    ],
)
def test_printable(text: str, wanted: str) -> None:
    assert printable(text) == wanted
    assert printable(text).isprintable()


def test_lines_and_tabs_stay_where_they_are_meant() -> None:
    assert printable_lines("a\n\tb\r\x1b\n") == "a\n\tb\\r\\u001b\n"


def test_a_stream_filters_and_leaves_the_rest_to_the_other_one() -> None:
    stream = io.StringIO()
    filtered = PrintableStream(stream)
    print("a\x1b[31m", "b", file=filtered)
    filtered.writelines(["\x9b\n"])
    assert stream.getvalue() == "a\\u001b[31m b\n\\u009b\n"
    assert filtered.getvalue() == stream.getvalue()
    assert unfiltered(filtered) is stream
    assert unfiltered(stream) is stream


def test_the_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr, sys.excepthook
    with printable_streams(), printable_streams():
        assert isinstance(sys.stdout, PrintableStream)
        assert not isinstance(unfiltered(sys.stdout), PrintableStream)
    assert (sys.stdout, sys.stderr, sys.excepthook) == before


# -- errors -----------------------------------------------------------------------------------

ERRORS: dict[str, Exception] = {
    "file name": errors.HostError(HOSTILE, 2),
    "layout": errors.LayoutError(HOSTILE),
    "image field": errors.ImageError("f", HOSTILE, HOSTILE, 7),
    "answer of a VM": errors.ControlError(500, HOSTILE),
    "name": errors.NameInUseError(HOSTILE, 7),
    "capability": errors.CapabilityError(HOSTILE, "x", "y", "z"),
    "record": RecordError(HOSTILE, "chunk", HOSTILE),
    "configuration": ConfigError(HOSTILE, 1, HOSTILE, HOSTILE),
    "kernel file": KernelFileError(HOSTILE, 2, HOSTILE),
    "system": FileNotFoundError(2, "no", HOSTILE),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_printable_line(name: str, shown: Callable[[], str]) -> None:
    def fail() -> int:
        raise ERRORS[name]

    assert guard("kvmhost run", fail) != 0
    (line,) = shown().splitlines()
    assert line.startswith("kvmhost run: ")


def test_a_compilers_messages_keep_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "guest.c"
    source.write_text("int main(void) { return \x1b[2J; }\nnonsense\n")
    assert main(["guests", "build", str(source)]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) > 2
    assert not {c for c in text if not c.isprintable()} - {"\n", "\t"}


def test_a_traceback_is_printable() -> None:
    code = (
        "from kvmhost.tools.ending import guard\n"
        "def fail(): raise RuntimeError(chr(27) + '[2J' + chr(0x202e))\n"
        "guard('x', fail)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RuntimeError: \\u001b[2J\\u202e" in done.stderr
    assert "\x1b" not in done.stderr


# -- records and file names ---------------------------------------------------------------


@pytest.fixture
def record(tmp_path: Path) -> Path:
    pytest.importorskip("zstandard")
    from kvmhost.reclaim.record.meta import RecordSession
    from kvmhost.reclaim.record.writer import RecordWriter

    path = tmp_path / "r.young"
    session = RecordSession(0, HOSTILE, HOSTILE, facts={HOSTILE: HOSTILE, "vm": HOSTILE})
    with RecordWriter.create(path, 4096, name=HOSTILE, session=session) as writer:
        for t in range(1, 9):
            window = Window(4096, frozenset({1, 2, t}), None, t * SECOND, (t + 1) * SECOND)
            bitmap = window.bitmap(0)
            source = dataclasses.replace(bitmap.provenance, tracker=HOSTILE, table_format=HOSTILE)
            writer.append(dataclasses.replace(bitmap, provenance=source))
    return path


@pytest.mark.parametrize("words", [["stat"], ["stat", "--json"]])
def test_the_texts_of_a_record(record: Path, words: list[str], shown: Callable[[], str]) -> None:
    assert main(["young", words[0], str(record), *words[1:]]) == 0
    shown()


def test_a_heatmap_of_a_record(record: Path, shown: Callable[[], str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["young", "heatmap", str(record), "-o", str(record.with_suffix(".png"))]) == 0
    shown()


@pytest.mark.parametrize("command", ["stat", "wss", "ages", "hot", "page"])
def test_a_missing_record_with_a_hostile_name(
    tmp_path: Path, command: str, shown: Callable[[], str]
) -> None:
    name = str(tmp_path / HOSTILE.replace("/", ""))
    assert main(["young", command, name, *(["1"] if command == "page" else [])]) != 0
    shown()


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--serial", "null", f"./{HOSTILE}"],
        ["run", "--serial", "null", "hello", "--name", HOSTILE],
        ["snapshot", HOSTILE, "file"],
        ["guests", f"./{HOSTILE}"],
        ["drain", HOSTILE],
        ["young", "export", "--format", HOSTILE, "file", "-o", "x"],
        [HOSTILE],
    ],
)
def test_hostile_arguments(words: list[str], shown: Callable[[], str]) -> None:
    assert main(words) != 0
    shown()


# -- log lines ----------------------------------------------------------------------------


def test_a_log_line_is_one_line(shown: Callable[[], str]) -> None:
    log = logging.getLogger("kvmhost.test-of-lines")
    before = logging.getLogger("kvmhost").handlers
    try:
        log_to_stderr("reclaimd: %(message)s", "kvmhost")
        log.warning("%s takes over from %s", HOSTILE, "x")
    finally:
        logging.getLogger("kvmhost").handlers = before
    (line,) = shown().splitlines()
    assert line.startswith("reclaimd: x")


# -- tables -----------------------------------------------------------------------------------


def test_a_table_of_facts(shown: Callable[[], str]) -> None:
    show_table("facts", [("name", HOSTILE)])
    shown()
