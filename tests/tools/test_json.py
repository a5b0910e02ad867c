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
    record, out = str(tmp_path / "r"), str(tmp_path / "out")
    words = ("young", "import", str(tmp_path / "gfns.txt"), "--format", "ranges", "-o", record)
    found = parsed(capsys, *words, "--json")
    assert found["file"] == record
    assert found["windows"] == 1
    assert isinstance(found["n_pages"], int)
    found = parsed(capsys, "young", "export", record, "--format", "gfns", "-o", out, "--json")
    assert found == {"file": out, "format": "gfns", "windows": 1, "gfns": 3}
    out += "2"
    found = parsed(capsys, "young", "export", record, "--format", "ranges", "-o", out, "--json")
    assert found == {"file": out, "format": "ranges", "windows": 1}


class _Daemon:
    def __enter__(self) -> _Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show_lru_gen(self, vm: str | None) -> str:
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
