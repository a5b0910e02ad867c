"""A heatmap of a record as one HTML file with zoom down to single gfns.

The page contains a pyramid of counts (:mod:`kvmhost.reclaim.draw.heatmaptiles`) and loads
nothing else: its content security policy allows only its own script. Strings of the
record are embedded as JSON without any character that could close the element.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from kvmhost.files import replacing
from kvmhost.reclaim.draw.heatmapdata import RecordView, Timeline, timeline_of
from kvmhost.reclaim.draw.heatmaptiles import (
    TILE_BINS,
    TILE_COLUMNS,
    Pyramid,
    PyramidLevel,
    build_pyramid,
    shuffled,
)
from kvmhost.reclaim.record.clock import interval_s

__all__ = ["BUDGET_BYTES", "draw_record", "write_html"]

#: Default budget of a page.
BUDGET_BYTES = 32 << 20
#: Base64 encodes three bytes in four characters.
_LETTERS, _BYTES = 4, 3
_MOST_MARKS = 2000


def draw_record(view: RecordView, path: Path, max_bytes: int = BUDGET_BYTES) -> str:
    """Write the page of a view to a file; return a line about the page.

    :param max_bytes: budget of the tiles
    :raises HostError: if the file cannot be written
    """
    with replacing(path) as file:
        pyramid = write_html(view, file, max_bytes)
    finest = 1 << min(pyramid.levels)
    text = "down to single gfns"
    if finest > 1:
        text = (
            f"down to {finest} pages per cell: finer cells exceed --max-mib {max_bytes >> 20}; "
            "draw a part (--range, --windows) to see them"
        )
    return f"{view.n_windows} windows, {text} ({path.stat().st_size / 2**20:.1f} MiB)"


def write_html(view: RecordView, file: IO[bytes], budget_bytes: int = BUDGET_BYTES) -> Pyramid:
    """Write the page of a view; its tiles are limited to the budget.

    :return: the pyramid in the page
    """
    pyramid = build_pyramid(view, budget_bytes * _BYTES // _LETTERS)
    times = timeline_of(view)
    steps = [step for steps in pyramid.levels.values() for step in steps]
    script, style = _part("page.js"), _part("page.css")
    title = f"{view.record.name or '(no name)'}: pages touched"
    title = "".join(c if c.isprintable() else "?" for c in title)
    values = {
        "TITLE": html.escape(title),
        "STYLE": style,
        "STYLE_HASH": _hash(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _hash(script),
        "META": _json(_meta(view, times, pyramid, budget_bytes)),
        "TIMES": _times(view, times),
    }
    # Each half is filled in one pass, so inserted text is never substituted again.
    head, tail = (
        re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], half)
        for half in _part("page.html").split("@TILES@")
    )
    file.write(head.encode())
    for step in steps:
        for piece in _tiles(step):
            file.write(piece)
    file.write(tail.encode())
    return pyramid


def _part(name: str) -> str:
    folder = importlib.resources.files("kvmhost.reclaim.draw") / "html"
    return (folder / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(value: Any) -> str:
    """Return JSON whose strings cannot close the surrounding HTML element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _meta(view: RecordView, times: Timeline, pyramid: Pyramid, budget_bytes: int) -> dict[str, Any]:
    record = view.record
    sessions = [s for s in record.metadata.sessions if s.first_window < view.end]
    facts = {"created by": sessions[-1].facts.get("writer", ""), **sessions[-1].facts}
    return {
        "name": record.name,
        "file": record.path.name,
        "facts": {key: value for key, value in facts.items() if value},
        "loss": record.loss,
        "gfnStart": view.gfn_start,
        "nPages": view.n_pages,
        "pageBytes": record.metadata.page_bytes,
        "firstWindow": view.first,
        "nWindows": view.n_windows,
        "intervalS": interval_s(record),
        "tileBins": TILE_BINS,
        "tileColumns": TILE_COLUMNS,
        "steps": [
            {
                "id": f"c{step.level}-{step.step}",
                "level": step.level,
                "step": step.step,
                "bins": step.n_bins,
                "columns": step.n_columns,
                "bits": step.bits,
            }
            for steps in pyramid.levels.values()
            for step in steps
        ],
        "leftOut": pyramid.left_out,
        "budgetBytes": budget_bytes,
        "layouts": [
            [
                max(part.first_window - view.first, 0),
                [[s.slot, s.gfn, s.n_pages, f"{s.hva:#x}" if s.hva else ""] for s in part.memslots],
            ]
            for part in record.metadata.layouts
            if part.first_window < view.end
        ],
        "sessions": [
            [max(s.first_window - view.first, 0), s.tracker, s.table_format] for s in sessions
        ],
        "marks": [[m.window - view.first, m.text] for m in times.marks[:_MOST_MARKS]],
        "sizes": _sizes(view),
    }


def _sizes(view: RecordView) -> list[list[int]]:
    """Return (window, number of pages of the view that were harvested from it on)."""
    pages = view.record.column("n_pages")[view.first : view.end]
    seen = np.clip(pages - view.low, 0, view.n_pages)
    changes = np.flatnonzero(np.diff(seen, prepend=-1))
    return [[int(at), int(seen[at])] for at in changes]


def _times(view: RecordView, times: Timeline) -> str:
    wall = view.record.column("wall_ns")[view.first : view.end] / 1e9
    rows = np.concatenate([times.starts_s, times.ends_s, wall]).astype("<f8")
    return base64.b64encode(zlib.compress(shuffled(rows), 6)).decode()


def _tiles(step: PyramidLevel) -> Iterator[bytes]:
    """Yield two elements: the numbers and lengths of the tiles, and the tiles."""
    name = f"c{step.level}-{step.step}"
    packed = {number: base64.b64encode(tile) for number, tile in sorted(step.tiles.items())}
    index = np.array([*packed, *(len(tile) for tile in packed.values())], dtype="<f8")
    letters = base64.b64encode(zlib.compress(shuffled(index), 6))
    yield f'<script type="text/plain" id="i{name}">'.encode() + letters + b"</script>\n"
    yield f'<script type="text/plain" id="{name}">'.encode()
    yield from packed.values()
    yield b"</script>\n"
