"""``kvmhost guests`` shows what the images and their sources say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from json_page import checked

from kvmhost.guests import image_names
from kvmhost.tools import guests as guests_cmd
from kvmhost.tools.main import main


def test_list_names_every_guest_and_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main([]) == 0
    shown = capsys.readouterr().out
    assert "hello: print a line" in shown
    assert "gfn_start=1024" in shown
    for name in image_names():
        assert f"\n{name}: " in f"\n{shown}"


def test_one_guest_with_its_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main(["hello"]) == 0
    shown = capsys.readouterr().out
    assert "Ports out: serial, exit." in shown
    assert "hotcold" not in shown


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert guests_cmd.main(["--json"]) == 0
    (found,) = checked("guests", capsys.readouterr().out)
    assert [guest["name"] for guest in found["guests"]] == image_names()
    assert guests_cmd.main(["hello", "--json"]) == 0
    (found,) = checked("guests", capsys.readouterr().out)
    (guest,) = found["guests"]
    assert guest["params"] == [{"name": "status", "default": 0, "unit": "", "help": "exit status"}]


def test_unknown_guest_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guests", "helo"]) == 2
    shown = capsys.readouterr().err
    assert "unknown guest 'helo', did you mean 'hello'? (there are: " in shown
    assert shown.count("\n") == 1


SOURCE = """\
/* mine: exit with a status. */
#include "guest.h"

PARAM("status=7;exit status");

u64 guest_main(u64 vcpu, struct params *params)
{
	return vcpu + params->args[0];
}
"""


def test_build_compiles_a_guest_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "mine.c"
    source.write_text(SOURCE)
    assert main(["guests", "build", str(source)]) == 0
    image = tmp_path / "mine.elf"
    assert capsys.readouterr().out == f"{image}: kvmhost run {image}\n"
    assert main(["guests", str(image)]) == 0
    shown = capsys.readouterr().out
    assert "mine: exit with a status." in shown
    assert "status=7  exit status" in shown
    source.unlink()
    assert main(["guests", str(image), "--json"]) == 0
    (found,) = checked("guests", capsys.readouterr().out)
    (guest,) = found["guests"]
    assert guest["params"] == [{"name": "status", "default": 7, "unit": "", "help": "exit status"}]
    assert guest["contract"] == ""


@pytest.mark.requires_kvm
def test_what_was_built_runs(tmp_path: Path) -> None:
    source, image = tmp_path / "mine.c", tmp_path / "other"
    source.write_text(SOURCE)
    assert main(["guests", "build", str(source), "-o", str(image)]) == 0
    done = subprocess.run([sys.executable, "-m", "kvmhost", "run", str(image)])
    assert done.returncode == 7


def test_a_link_of_another_user_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a link of another user")
    source, victim, link = tmp_path / "mine.c", tmp_path / "victim", tmp_path / "mine.elf"
    source.write_text(SOURCE)
    victim.write_text("kept")
    link.symlink_to(victim)
    os.lchown(link, 65534, 65534)
    assert main(["guests", "build", str(source)]) == 2
    shown = capsys.readouterr()
    assert "mine.elf" in shown.err
    assert shown.err.count("\n") == 1
    assert victim.read_text() == "kept"
    assert link.is_symlink()


def test_a_failed_build_keeps_the_image(tmp_path: Path) -> None:
    source, image = tmp_path / "mine.c", tmp_path / "mine.elf"
    source.write_text("this is no C")
    image.write_text("kept")
    assert main(["guests", "build", str(source)]) == 2
    assert image.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.c", "mine.elf"]


def test_what_cannot_be_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mine.c"
    assert main(["guests", "build", str(source)]) == 2
    assert "no such file" in capsys.readouterr().err
    source.write_text("this is no C")
    assert main(["guests", "build", str(source)]) == 2
    assert "error:" in capsys.readouterr().err
    assert main(["guests", "build", str(source), "-o", str(source)]) == 2
    assert source.read_text() == "this is no C"
    monkeypatch.setenv("KVMHOST_GUEST_CC", "no-such-compiler")
    assert main(["guests", "build", str(source)]) == 126
    assert "no-such-compiler" in capsys.readouterr().err
    assert not (tmp_path / "mine.elf").exists()


def test_a_file_that_is_no_image_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.elf"
    path.write_text("no image")
    assert main(["guests", str(path)]) == 2
    assert "text.elf" in capsys.readouterr().err
