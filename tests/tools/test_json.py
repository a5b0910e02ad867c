"""``--json`` of commands that write files or show text: one object, units in the keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmhost.tools import lru_gen
from kvmhost.tools.main import main

pytest.importorskip("zstandard")


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(words) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_import_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gfns.txt").write_text("1\n2\n5\n")
    record, out = str(tmp_path / "r"), str(tmp_path / "out")
    words = ("young", "import", str(tmp_path / "gfns.txt"), "--format", "ranges", "-o", record)
    found = asked(capsys, *words, "--json")
    assert found["file"] == record
    assert found["windows"] == 1
    assert isinstance(found["n_pages"], int)
    found = asked(capsys, "young", "export", record, "--format", "gfns", "-o", out, "--json")
    assert found == {"file": out, "format": "gfns", "windows": 1, "gfns": 3}
    out += "2"
    found = asked(capsys, "young", "export", record, "--format", "ranges", "-o", out, "--json")
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
    assert asked(capsys, "lru_gen", "show", "--json")["vms"] == [
        {"number": 1, "vm": "a", "generations": generations},
        {"number": 2, "vm": "b", "generations": []},
    ]
    assert asked(capsys, "lru_gen", "run", "- a 0 7", "--json") == {"evicted_pages": 12}


@pytest.mark.parametrize("command", ["snapshot", "young record", "page", "drain", "guests"])
def test_help_offers_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out
