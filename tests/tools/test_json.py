"""Every command with ``--json`` prints what docs/json.md says, on KVM and with the emulator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from json_page import checked, checked_lines

from kvmhost.control.paths import RUNTIME_DIR_ENV
from kvmhost.control.server import ControlServer
from kvmhost.guests import image_path
from kvmhost.machine import Machine
from kvmhost.tools import lru_gen
from kvmhost.tools.main import main


@pytest.fixture(
    scope="module", params=[pytest.param("kvm", marks=pytest.mark.requires_kvm), "emulated"]
)
def vm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A VM named ``v`` that has run an epoch."""
    directory = tmp_path_factory.mktemp("run")
    params = {"pages": 1000, "hot": 100, "epochs": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUNTIME_DIR_ENV, str(directory))
        with Machine(
            image_path("hotcold"), mem_bytes=16 << 20, engine=request.param, params=params, name="v"
        ) as machine:
            server = ControlServer(machine).start()
            try:
                machine.step_by_doorbell()
                machine.run_epoch()
                yield machine
            finally:
                server.close()


def asked(capsys: pytest.CaptureFixture[str], words: str, code: int = 0) -> list[dict[str, Any]]:
    """Run a command; return the objects that it printed, checked against the page."""
    assert main([*words.split(), "--json"]) == code
    command = " ".join(words.split()[: 2 if words.startswith(("young", "bench")) else 1])
    return checked(command, capsys.readouterr().out)


@pytest.mark.requires_uffd
def test_vm_commands(vm: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (limit,) = asked(capsys, "limit v 2M")
    assert limit["resident_max_bytes"] == 2 << 20
    assert limit["evicted_pages"] > 0
    (drain,) = asked(capsys, "drain v")
    assert drain == {"restored_pages": limit["evicted_pages"], "lost_pages": 0, "left_pages": 0}
    if vm.engine.name == "emulated":
        return  # Only KVM's vCPUs can be saved.
    (saved,) = asked(capsys, f"snapshot v {tmp_path}/saved")
    assert not saved["stopped"]
    assert saved["memory_bytes"] > 1000 * 4096


@pytest.mark.parametrize(
    ("words", "code", "kind", "message"),
    [
        ("drain nosuch", 1, "", "nosuch"),
        ("limit v 12Q", 2, "", "12Q"),
        ("guests nosuch", 2, "ImageError", "nosuch"),
        ("young stat /nonexistent/record", 2, "", "/nonexistent/record"),
    ],
)
def test_an_error_is_an_object_too(
    words: str, code: int, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--json"]) == code
    shown = capsys.readouterr()
    (found,) = checked_lines("Errors", shown.out)
    error = found["error"]
    assert (error["exit_code"], error["kind"]) == (code, kind)
    assert message in error["message"]
    assert error["message"] in shown.err
    assert shown.err.count("\n") == 1


def test_names_of_any_bytes_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters, which a terminal does not get, and names that are no UTF-8."""
    name = "a\x9b\x1b\udcff\n"
    assert main(["guests", f"{tmp_path}/{name}", "--json"]) == 2
    (found,) = checked_lines("Errors", capsys.readouterr().out)
    assert name in str(found["error"]["arguments"][0])


def parsed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(words) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gfns.txt").write_text("1\n2\n5\n")
    record, out = f"{tmp_path}/r", f"{tmp_path}/out"
    (found,) = asked(capsys, f"young import {tmp_path}/gfns.txt --format ranges -o {record}")
    assert (found["file"], found["n_windows"], found["remark"]) == (record, 1, "")
    (found,) = asked(capsys, f"young export {record} --format gfns -o {out}")
    assert found == {"file": out, "format": "gfns", "n_windows": 1, "n_gfns": 3}
    (found,) = asked(capsys, f"young export {record} --format ranges -o {out}2")
    assert found == {"file": f"{out}2", "format": "ranges", "n_windows": 1, "n_gfns": None}


def test_a_record_without_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures that need a window are null."""
    from kvmhost.reclaim.record.writer import RecordWriter

    record = tmp_path / "r"
    RecordWriter.create(record, 64, name="v").close()
    for words in ("stat", "wss", "ages", "hot", "compare --format npt", "page"):
        name, _, rest = words.partition(" ")
        gfn = " 5" if name == "page" else ""
        asked(capsys, f"young {name} {record}{gfn} {rest}")


def test_young_commands(vm: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = asked(capsys, "young snapshot v --interval 10ms")
    assert found["n_pages"] == vm.memory.gfn_end
    assert sum(n for _, n in found["ranges"]) == found["n_young"]
    (found,) = asked(capsys, f"young record v -o {tmp_path}/r --interval 10ms --count 3")
    assert (found["n_windows"], found["total_windows"]) == (3, 3)
    (found,) = asked(capsys, "young page v 0x400")
    assert found["now"]["page"]["gfn"] == 0x400
    (found,) = asked(capsys, "young gfn 0x400 v --kind gfn")
    assert found["gpa"] == 0x400000
    for words in ("stat --full", "wss", "ages", "hot", "diff"):
        name, _, rest = words.partition(" ")
        other = f" {tmp_path}/r" if name == "diff" else ""
        asked(capsys, f"young {name} {tmp_path}/r{other} {rest}")
    asked(capsys, f"young compare {tmp_path}/r --format npt,stage2")


def test_a_recording_that_fails_is_an_object_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNTIME_DIR_ENV, str(tmp_path))
    assert main(["young", "record", "nobody", "-o", str(tmp_path / "r"), "--json"]) == 1
    (found,) = checked_lines("Errors", capsys.readouterr().out)
    assert found["error"]["message"].startswith(f"{tmp_path}/r: ")


class _Daemon:
    def __enter__(self) -> _Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def lru_gen_enabled(self, vm: str, value: str | None) -> str:
        return "0x000b\n"

    def show_lru_gen(self, vm: str | None, *, full: bool) -> str:
        return (
            "memcg     1 a\n node     0\n"
            "          7       1500         300          0\n"
            "          8          2          40          0\n"
            "memcg     2 b\n node     0\n"
        )

    def run_lru_gen(self, text: str) -> int:
        return 12


def test_lru_gen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_gen, "_daemon", lambda name, vm: _Daemon())
    generations = [
        {"seq": 7, "age_ms": 1500, "anon_pages": 300, "file_pages": 0},
        {"seq": 8, "age_ms": 2, "anon_pages": 40, "file_pages": 0},
    ]
    assert parsed(capsys, "lru_gen", "show", "--json")["vms"] == [
        {"number": 1, "vm": "a", "generations": generations},
        {"number": 2, "vm": "b", "generations": []},
    ]
    assert parsed(capsys, "lru_gen", "run", "- a 0 7", "--json") == {"evicted_pages": 12}
    assert parsed(capsys, "lru_gen", "enabled", "a", "--json") == {"caps": 11}
