"""``kvmhost guests`` shows what the images and their sources say."""

from __future__ import annotations

import json

import pytest

from kvmhost.guests import image_names
from kvmhost.tools import guests_cmd


def test_list_names_every_guest_and_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main([]) == 0
    shown = capsys.readouterr().out
    assert "hello: print a line" in shown
    assert "start_gfn=1024" in shown
    for name in image_names():
        assert f"\n{name}: " in f"\n{shown}"


def test_one_guest_with_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main(["hello"]) == 0
    shown = capsys.readouterr().out
    assert "Ports out: serial, exit." in shown
    assert "hotcold" not in shown


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main(["--json"]) == 0
    assert [guest["name"] for guest in json.loads(capsys.readouterr().out)] == image_names()
    assert guests_cmd.main(["hello", "--json"]) == 0
    params = json.loads(capsys.readouterr().out)["params"]
    assert params == [{"name": "status", "default": 0, "help": "exit status"}]


def test_unknown_guest_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main(["nobody"]) == 2
    assert "there are: " in capsys.readouterr().err
