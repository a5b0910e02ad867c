"""Pictures by suffix: each kind draws, and a new kind is one module and one entry."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.reclaim.draw import registry
from kvmhost.reclaim.draw.heatmapdata import RecordView
from kvmhost.tools.young import heatmap as command

LISTS = [[1, 2, 3], [3, 4], [200]]
FIRST_BYTES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!DOCTYPE html>"}


@pytest.mark.parametrize("suffix", registry.PICTURES)
def test_every_kind_draws_a_record(suffix, make_record, tmp_path):
    registry.PICTURES[suffix].check_available()
    out = tmp_path / f"x{suffix.upper()}"
    view = RecordView(make_record(LISTS))
    line = registry.draw_record(view, out, n_bins=8, max_bytes=1 << 20)
    assert line.startswith("3 windows")
    assert out.read_bytes().lower().startswith(FIRST_BYTES[suffix].lower())


def test_another_suffix_is_refused(make_record, tmp_path):
    with pytest.raises(LayoutError, match=r"must end in \.png or"):
        registry.draw_record(RecordView(make_record(LISTS)), tmp_path / "x.txt")


def test_plots_need_matplotlib_and_the_page_does_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    registry.kind_of(Path("x.html")).check_available()
    with pytest.raises(CapabilityError, match="matplotlib"):
        registry.kind_of(Path("x.png")).check_available()


def test_the_command_draws_a_new_kind_from_one_module_and_one_entry(
    make_record, monkeypatch, tmp_path, capsys
):
    def draw(view, path, n_bins):
        path.write_text(f"{view.n_windows} {n_bins}")
        return "drawn as text"

    module = types.ModuleType("kvmhost.reclaim.draw.text")
    module.draw = draw
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kind = registry.PictureKind("plain text", "text:draw", takes=("n_bins",))
    monkeypatch.setitem(registry.PICTURES, ".txt", kind)
    out = tmp_path / "x.txt"
    assert command.main([str(make_record(LISTS).path), "-o", str(out), "--bins", "7"]) == 0
    assert out.read_text() == "3 7"
    assert capsys.readouterr().out == f"{out}: drawn as text\n"
    assert ".txt" in command.parser().format_help()
