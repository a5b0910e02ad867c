"""Other programs read the arrays of a record: zarr-python, xarray, Dask and zarrita.js."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from waiting import DEADLINE_S
from young_model import SECOND, Window, write

from kvmhost.reclaim.record import frames
from kvmhost.reclaim.record.reader import YoungRecord

pytest.importorskip("zstandard")

NODE = Path(__file__).with_name("node")
N_PAGES, N_WINDOWS = 5000, 100
YOUNG = [frozenset(range(w, N_PAGES, w + 1)) for w in range(N_WINDOWS)]
COARSE = [frozenset({w, N_PAGES - 1} & YOUNG[w]) if w % 9 == 0 else None for w in range(N_WINDOWS)]
BITS = np.array([[page in gfns for gfns in YOUNG] for page in range(N_PAGES)])
COARSE_BITS = np.array([[page in (gfns or ()) for gfns in COARSE] for page in range(N_PAGES)])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record whose bits are in two chunks of pages and two blocks of windows."""
    found = tmp_path_factory.mktemp("readers") / "r.young"
    windows = [
        Window(N_PAGES, YOUNG[w], COARSE[w], w * SECOND, (w + 1) * SECOND) for w in range(N_WINDOWS)
    ]
    write(found, 0, windows, n_pages=4000).close()
    assert sorted(p.name for p in (found / "young").glob("*.*") if p.name[0] != ".") == [
        "0.0", "0.1", "1.0", "1.1",
    ]  # fmt: skip
    return found


def unpacked(packed: np.ndarray, attributes: dict[str, str]) -> np.ndarray:
    """Unpack bits as the attributes of the array say."""
    assert attributes["packed_dimension"] == "window"
    return np.unpackbits(packed, axis=1, bitorder=attributes["bit_order"])[:, :N_WINDOWS]


@pytest.mark.parametrize("consolidated", [True, False])
def test_zarr_python(path: Path, consolidated: bool) -> None:
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="r", use_consolidated=consolidated)
    for name, bits in (("young", BITS), ("coarse", COARSE_BITS), ("resident", 0 * BITS)):
        assert np.array_equal(unpacked(group[name][:], dict(group[name].attrs)), bits)
    with YoungRecord.open(path) as record:
        assert group["n_young"][:].tolist() == [len(gfns) for gfns in YOUNG]
        assert group["end_ns"][:].tolist() == record.column("end_ns").tolist()
        for level in (9, 12, 15, 18):
            assert np.array_equal(group[f"sum{level}"][:], record.sums(level))
        for name in ("ages", "reuse"):
            assert np.array_equal(group[name][:], record.histogram(name))


def test_no_array_needs_a_filter(path: Path) -> None:
    metadata = json.loads((path / ".zmetadata").read_text())["metadata"]
    arrays = {name: value for name, value in metadata.items() if name.endswith("/.zarray")}
    assert len(arrays) == 35
    for name, array in arrays.items():
        assert array["filters"] is None, name
        assert array["compressor"]["id"] == "zstd", name
        assert array["dtype"] in ("|u1", "<u2", "<u4", "<i8"), name


def test_xarray(path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    data = xarray.open_zarr(str(path), mask_and_scale=False, chunks=None)
    assert data.young.dims == ("gfn", "window_byte")
    assert data.young.dtype == np.uint8
    assert np.array_equal(unpacked(data.young.values, data.young.attrs), BITS)
    assert data.n_young.values.tolist() == BITS.sum(axis=0).tolist()


def test_dask(path: Path) -> None:
    array = pytest.importorskip("dask.array")
    packed = array.from_zarr(str(path / "young"))
    bits = packed.map_blocks(
        np.unpackbits, axis=1, chunks=(packed.chunks[0], tuple(8 * n for n in packed.chunks[1]))
    )
    assert bits.npartitions == 4
    assert bits[:, :N_WINDOWS].sum(axis=0).compute().tolist() == BITS.sum(axis=0).tolist()


@pytest.mark.parametrize("has_dask", [True, False])
def test_booleans_of_a_dataset(path: Path, has_dask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever part is asked for, with chunks of Dask and without."""
    xarray = pytest.importorskip("xarray")
    if has_dask:
        pytest.importorskip("dask")
    else:
        opened = xarray.open_zarr
        monkeypatch.setattr(
            xarray, "open_zarr", lambda *args, **options: opened(*args, chunks=None, **options)
        )
    with YoungRecord.open(path) as record:
        data = frames.to_dataset(record)
    assert (data.young.chunks is not None) == has_dask
    assert data.young.dtype == bool
    assert data.young.shape == data.coarse.shape == BITS.shape
    assert np.array_equal(data.coarse.values, COARSE_BITS)
    windows = np.array([0, 7, 8, 63, 64, 99])
    for where in (
        (slice(None), slice(None)),
        (slice(4090, 4100), slice(60, 70)),
        (slice(None, None, 7), slice(99, 3, -11)),
        (slice(0, 10), slice(5, 5)),
        (4999, slice(None)),
        (slice(None), 9),
        (17, 17),
        (slice(None), windows),
        (np.array([5, 1, 4999]), slice(None)),
    ):
        found = data.young.isel(gfn=where[0], window=where[1])
        assert np.array_equal(found.values, BITS[where]), where


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script with zarrita.js installed beside it."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: nodejs npm)")
    place = tmp_path_factory.mktemp("node")
    for name in ("package.json", "package-lock.json", "read.mjs"):
        shutil.copy(NODE / name, place)
    done = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=place, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"needs zarrita.js: npm ci in {NODE} must work: {done.stderr.strip()[-300:]}")
    return place


def test_zarrita(path: Path, node: Path) -> None:
    done = subprocess.run(
        ["node", str(node / "read.mjs"), str(path), "4099", "9"],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    consolidated, plain = json.loads(done.stdout)
    assert consolidated == plain
    assert plain["young"]["windows"] == np.flatnonzero(BITS[4099]).tolist()
    assert plain["young"]["pages"] == sorted(YOUNG[9])
    assert plain["coarse"]["pages"] == sorted(COARSE[9] or ()) != []
    assert plain["meta"]["version"] == 2
    assert plain["n_young"]["values"] == BITS.sum(axis=0).tolist()
    with YoungRecord.open(path) as record:
        for name, wanted in (
            ("end_ns", record.column("end_ns")),
            ("ages", record.histogram("ages")),
            ("sum9", record.sums(9)),
        ):
            assert plain[name]["shape"] == list(wanted.shape)
            assert plain[name]["values"] == wanted.reshape(-1).tolist()
