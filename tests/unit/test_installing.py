"""The remedy for a missing extra works from where the installation came."""

from __future__ import annotations

import email
import sys
from importlib import metadata
from pathlib import Path

import pytest

from kvmhost import installing


def test_from_a_checkout_it_installs_the_checkout() -> None:
    root = Path(installing.__file__).resolve().parents[1]
    expected = f'run: {sys.executable} -m pip install -e "{root}[plot]"'
    assert installing.install_hint("plot") == expected


def test_elsewhere_it_names_what_the_extra_requires(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "kvmhost-1.dist-info"
    folder.mkdir()
    message = email.message.Message()
    message["Metadata-Version"], message["Name"], message["Version"] = "2.1", "kvmhost", "1"
    for line in (
        "numpy<3",
        'matplotlib<4,>=3.8; extra == "plot"',
        "cycler ; python_version > '3' and extra == 'plot'",
        'zarr; extra == "record"',
        'other; extra == "plots"',
    ):
        message["Requires-Dist"] = line
    (folder / "METADATA").write_text(str(message))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(installing, "_ROOT", tmp_path)
    assert metadata.version("kvmhost") == "1"
    expected = f'run: {sys.executable} -m pip install "matplotlib<4,>=3.8" "cycler"'
    assert installing.install_hint("plot") == expected


def test_no_message_names_a_package_of_an_index() -> None:
    root = Path(installing.__file__).resolve().parents[1]
    folders = [root / "kvmhost", *(root / "kvmhost" / n for n in ("tools", "reclaim", "guests"))]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) > 200
    assert [path for path in files if 'install "kvmhost[' in path.read_text()] == []
