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
import numpy.typing as npt

from kvmhost.files import replacing
from kvmhost.reclaim.draw.heatmapdata import RecordView, Timeline, notes_of, timeline_of
from kvmhost.reclaim.draw.heatmaplayers import PageLayers, layers_of
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
#: Part of the budget that layers of residency and events may take.
_LAYERS_SHARE = 1 / 3
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
            f"down to {finest} pages per cell: finer cells exceed --max-size {max_bytes >> 20}M; "
            "draw a part (--range, --windows) to see them"
        )
    return f"{view.n_windows} windows, {text} ({path.stat().st_size / 2**20:.1f} MiB)"


def write_html(view: RecordView, file: IO[bytes], budget_bytes: int = BUDGET_BYTES) -> Pyramid:
    """Write the page of a view; its tiles are limited to the budget.

    :return: the pyramid in the page
    """
    tiles_bytes = budget_bytes * _BYTES // _LETTERS
    layers = layers_of(view, int(tiles_bytes * _LAYERS_SHARE))
    pyramid = build_pyramid(view, tiles_bytes - layers.n_bytes)
    times = timeline_of(view)
    script, style = _part("page.js"), _part("page.css")
    title = f"{view.record.name or '(no name)'}: pages touched"
    title = "".join(c if c.isprintable() else "?" for c in title)
    values = {
        "TITLE": html.escape(title),
        "STYLE": style,
        "STYLE_HASH": _hash(style),
        "SCRIPT": script,
        "SCRIPT_HASH": _hash(script),
        "META": _json(_meta(view, times, pyramid, layers) | {"budgetBytes": budget_bytes}),
        "TIMES": _times(view, times),
        "CURVES": _packed(np.concatenate(list(layers.curves.values()))),
    }
    # Each half is filled in one pass, so inserted text is never substituted again.
    head, tail = (
        re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], half)
        for half in _part("page.html").split("@TILES@")
    )
    file.write(head.encode())
    for name, each in {"c": pyramid, **layers.pyramids}.items():
        for step in _steps(each):
            for piece in _tiles(name, step):
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


def _steps(pyramid: Pyramid) -> list[PyramidLevel]:
    return [step for steps in pyramid.levels.values() for step in steps]


def _described(name: str, pyramid: Pyramid) -> list[dict[str, Any]]:
    """Return what the page has to know about the steps of a pyramid."""
    return [
        {
            "id": f"{name}{step.level}-{step.step}",
            "level": step.level,
            "step": step.step,
            "bins": step.n_bins,
            "columns": step.n_columns,
            "bits": step.bits,
        }
        for step in _steps(pyramid)
    ]


def _meta(
    view: RecordView, times: Timeline, pyramid: Pyramid, layers: PageLayers
) -> dict[str, Any]:
    record = view.record
    sessions = [s for s in record.metadata.sessions if s.first_window < view.end]
    facts = {"created by": sessions[-1].facts.get("writer", ""), **sessions[-1].facts}
    return {
        "name": record.name,
        "file": record.path.name,
        "facts": {key: value for key, value in facts.items() if value},
        "notes": notes_of(view, bool(layers.pyramids or layers.left_out)),
        "gfnStart": view.gfn_start,
        "nPages": view.n_pages,
        "pageBytes": record.metadata.page_bytes,
        "firstWindow": view.first,
        "nWindows": view.n_windows,
        "intervalS": interval_s(record),
        "tileBins": TILE_BINS,
        "tileColumns": TILE_COLUMNS,
        "steps": _described("c", pyramid),
        "layers": {name: _described(name, each) for name, each in layers.pyramids.items()},
        "layersLeftOut": layers.left_out,
        "curves": list(layers.curves),
        "known": _known(view),
        "parts": [
            [view.parts.position_of(low), record.gfn_start + low, high - low]
            for low, high in view.parts.ranges
        ],
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
        "gaps": [int(at) - view.first for at in times.gaps[:_MOST_MARKS]],
        "sizes": _sizes(view),
    }


def _sizes(view: RecordView) -> list[list[int]]:
    """Return (window, number of pages of the view that were harvested from it on)."""
    pages = view.record.column("n_pages")[view.first : view.end]
    changes = np.flatnonzero(np.diff(pages, prepend=-1))
    return [[int(at), view.parts.position_of(int(pages[at]))] for at in changes]


def _known(view: RecordView) -> list[list[int]]:
    """Return (window, whether residency is known from it on)."""
    known = view.record.has_residency()[view.first : view.end].astype(np.int8)
    return [[int(at), int(known[at])] for at in np.flatnonzero(np.diff(known, prepend=-1))]


def _times(view: RecordView, times: Timeline) -> str:
    wall = view.record.column("wall_ns")[view.first : view.end] / 1e9
    return _packed(np.concatenate([times.starts_s, times.ends_s, wall]))


def _packed(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(shuffled(values.astype("<f8")), 6)).decode()


def _tiles(layer: str, step: PyramidLevel) -> Iterator[bytes]:
    """Yield two elements: the numbers and lengths of the tiles, and the tiles."""
    name = f"{layer}{step.level}-{step.step}"
    packed = {number: base64.b64encode(tile) for number, tile in sorted(step.tiles.items())}
    index = _packed(np.array([*packed, *(len(tile) for tile in packed.values())]))
    yield f'<script type="text/plain" id="i{name}">{index}</script>\n'.encode()
    yield f'<script type="text/plain" id="{name}">'.encode()
    yield from packed.values()
    yield b"</script>\n"
