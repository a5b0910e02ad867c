"""Where reclaimd writes: lines, JSON lines, a file, and the table of a terminal."""

from __future__ import annotations

import io
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from json_page import checked
from rich.console import Console
from terminals import Terminal
from waiting import until

from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.control.server import ControlServer
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.reclaim.account.events import Dropped, Notice, PassReport
from kvmhost.reclaim.errors import ConfigError
from kvmhost.reclaim.settings.options import DaemonOptions
from kvmhost.tools.reclaimlog import EventLog, VmTable, open_event_log


def report(vm: str, number: int = 1, **changed: Any) -> PassReport:
    values: dict[str, Any] = {
        "resident_bytes": 3 << 20, "young_pages": 1234, "generations": [(0, 5), (1, 7)],
        "wanted_pages": 20, "outcomes": {"done": 20}, "forced_pages": 0, "refaulted_pages": 3,
        "harvest_ns_per_page": 10.0, "duration_ms": 1.5, "busy_ms": 1.0, "why": "budget",
        "loss": 0.021, "stale_s": 8.0,
    }  # fmt: skip
    return PassReport(vm, number, **(values | changed))


def drawn(table: VmTable, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table.drawn(width))
    return [line.strip() for line in stream.getvalue().splitlines() if line.strip()]


def test_the_table_has_a_row_a_vm_and_sums_up() -> None:
    table = VmTable()
    assert "waiting for the first pass ..." in drawn(table, 150)
    for number in (1, 2):
        table.tell(report("b", number))
    table.tell(report("a", outcomes={"done": 9}, dry_run=True))
    titles, _, first, second = drawn(table, 150)
    assert titles.split()[:3] == ["VM", "pass", "resident"]
    assert first.split()[0] == "a"
    assert "9 (dry run)" in first
    assert second.split() == ["b", "2", "3.0", "MiB", "1,234", "0:5", "1:7", "20", "budget", "3",
                              "40", "6", "2.1", "%", "8", "s", "1.5"]  # fmt: skip
    assert table.totals["a"].evicted_pages == 0
    table.tell(Dropped("b", "it ended", failed=False))
    assert [line.split()[0] for line in drawn(table, 150)[2:]] == ["a", "b"]
    assert drawn(table, 150)[-1] == "b dropped: it ended"


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_narrow_terminal_shows_less_and_never_cuts_a_name(width: int) -> None:
    table = VmTable()
    table.tell(report("web-server-17"))
    lines = drawn(table, width)
    assert max(map(len, lines)) <= width
    assert lines[2].startswith("web-server-17  ")
    assert "…" not in "".join(lines)


def test_messages_stay_under_the_table_without_control_characters() -> None:
    table = VmTable()
    for i in range(9):
        table.tell(Notice(f"note {i}\x1b[2J"))
    lines = drawn(table, 100)
    assert [line for line in lines if "note" in line] == [
        f"reclaimd: note {i}\\u001b[2J" for i in range(4, 9)
    ]


def test_a_log_file_has_each_line_with_its_time_and_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for vm in ("a", "b"):
        with open_event_log(DaemonOptions(log_file=str(path))) as log:
            log.tell(report(vm))
            logging.getLogger("reclaim").warning("be\ncareful")
    lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
    assert [text.split(":")[0] for _, text in lines] == ["a pass 1", "reclaimd", "b pass 1",
                                                         "reclaimd"]  # fmt: skip
    assert lines[1][1] == "reclaimd: be\\ncareful"
    assert all(time[4] == "-" and "T" in time for time, _ in lines)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_file_that_cannot_be_opened_names_the_option(tmp_path: Path) -> None:
    options = DaemonOptions(log_file=str(tmp_path / "no" / "log"))
    with pytest.raises(ConfigError, match=r"daemon\.log_file"), open_event_log(options):
        pass


def test_json_has_one_object_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    with open_event_log(DaemonOptions(json=True)) as log:
        log.tell(report("a", why="cgroup", notes=["limit set"]))
        log.tell(Dropped("b\x1b", "it ended", failed=True))
        log.tell(Notice("reloaded"))
        log.message("warning", "x")
        log.message("error", "y")
    events = checked("reclaimd", capsys.readouterr().out)
    shown = [(one["event"], one["vm"], one["text"], one["level"], one["failed"]) for one in events]
    assert shown == [
        ("pass", "a", report("a", why="cgroup", notes=["limit set"]).line(), "", False),
        ("dropped", "b\x1b", "b\x1b dropped: it ended", "", True),
        ("notice", "", "reclaimd: reloaded", "", False),
        ("log", "", "x", "warning", False),
        ("log", "", "y", "error", True),
    ]
    first, *others = (one["report"] for one in events)
    assert others == [None] * 4
    assert (first["number"], first["n_young"], first["why"]) == (1, 1234, "cgroup")
    assert (first["generations"], first["outcomes"]) == ([[0, 5], [1, 7]], {"done": 20})
    assert first["notes"] == ["limit set"]


class _Broken(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    log = EventLog(False, _Broken())
    log.tell(report("a"))
    log.tell(Notice("b"))


def test_the_table_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_vm: Callable[..., Machine],
    terminal: Callable[[int, int], Terminal],
) -> None:  # fmt: skip
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path / "run"))
    params = {"pages": 500, "hot": 50, "epochs": 0}
    vm = make_vm(
        image_path("hotcold"), mem_bytes=16 << 20, engine="emulated", params=params, name="vm1"
    )
    server = ControlServer(vm).start()
    try:
        vm.start()
        screen = terminal(150, 15)
        words = [sys.executable, "-m", "kvmhost", "reclaimd", "vm1", "--interval", "100ms",
                 "--dry-run", "--budget", "50%", "--log-file", str(tmp_path / "log")]  # fmt: skip
        runtime = shlex.quote(os.environ[RUNTIME_DIR_ENV])
        screen.type(f"{RUNTIME_DIR_ENV}={runtime} {shlex.join(words)}; echo ended $?")
        screen.keys("Enter")
        screen.shows("daemon socket:")
        until(lambda: any(line.split()[:1] == ["vm1"] for line in screen.screen()), "a row")
        log = tmp_path / "log"
        until(lambda: "vm1 pass 3:" in log.read_text(), "three passes in the log")
        screen.keys("C-c")
        lines = screen.shows("ended 130")
        # The table is drawn in place: one row, however many passes there were.
        assert len([line for line in lines if line.split()[:1] == ["vm1"]]) == 1
    finally:
        server.close()
