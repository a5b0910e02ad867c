"""One fuzz target per boundary: bytes in; an exception that a target does not expect is a bug.

:data:`TARGETS` is run by ``test_targets.py`` (in every test run, with bounded numbers of
examples) and by ``fuzz.py`` (for as long as one likes). :data:`SEEDS` has inputs from
which both make others.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from kvmhost.boot.image import Image
from kvmhost.boot.loaders import _load, detect
from kvmhost.boot.pcboot import BootRequest, Module
from kvmhost.control import schema
from kvmhost.devices.clock import Clock
from kvmhost.devices.fwcfg import FwCfg
from kvmhost.devices.serial import Serial
from kvmhost.errors import ImageError, LayoutError
from kvmhost.machine import snapfile
from kvmhost.memory.dma import GuestDma
from kvmhost.memory.guest import GuestMemory
from kvmhost.memory.pclayout import PcLayout
from kvmhost.reclaim.errors import ConfigError, RecordError
from kvmhost.reclaim.exchange import damon as damon_format
from kvmhost.reclaim.exchange import dirty as dirty_format
from kvmhost.reclaim.exchange import text as text_format
from kvmhost.reclaim.policy import lru_gen_text
from kvmhost.reclaim.record import meta as record_meta
from kvmhost.reclaim.record.journal import JournalEntry, JournalReader, JournalWriter
from kvmhost.reclaim.settings.config import load
from kvmhost.units import Bytes, Mark, Seconds, Share
from kvmhost.vm.names import LOADERS

__all__ = ["SEEDS", "TARGETS"]

#: One folder a process, removed with it.
_FOLDER = tempfile.TemporaryDirectory(prefix="kvmhost-fuzz-")
FILE = Path(_FOLDER.name) / "input"

LAYOUT = PcLayout(4 << 20)
MEMORY = GuestMemory.of_size(LAYOUT.mem_bytes)
NAMES = LOADERS[1:]


def loaders(data: bytes) -> None:
    """First byte: the loader; the rest is the file."""
    if not data:
        return
    chosen = data[0] % (len(NAMES) + 1)
    with contextlib.suppress(ImageError):
        try:
            name = NAMES[chosen] if chosen < len(NAMES) else detect("x", data[1:])
            image = _load("x", data[1:], name)
        except (struct.error, ValueError, IndexError, OverflowError):
            return  # load_image() turns these into ImageError; from here on they are bugs.
        if isinstance(image, Image):
            image.load(MEMORY, 4 << 20)
        else:
            request = BootRequest(LAYOUT, "x y", (Module("m", "a", b"123"),))
            image.plan(request).load(MEMORY, LAYOUT)


def serial(data: bytes) -> None:
    """Pairs of bytes: register and direction, value."""
    port = Serial()
    room = 4096  # More would wait for a reader, and there is none.
    for at in range(0, len(data) - 1, 2):
        where, value = data[at], data[at + 1]
        if where & 0x40 and room >= 16:
            room -= port.receive(bytes([value] * (where & 15)))
        elif where & 0x80:
            port.write_register(where & 7, value)
        else:
            assert 0 <= port.read(where & 7) <= 0xFF
    state = port.save()
    port.load(state)
    assert port.save() == state


def fwcfg(data: bytes) -> None:
    """Six bytes a step: offset, size and direction, value; the tail is a DMA descriptor."""
    device = FwCfg({5: b"\1\0"}, {"opt/a": b"abc"}, GuestDma(MEMORY, MEMORY.punch))
    MEMORY[0x100:0x110] = data[-16:].ljust(16, b"\0")
    for at in range(0, len(data) - 5, 6):
        offset, kind, value = struct.unpack_from("<BBI", data, at)
        size = (1, 2, 4, 8)[kind & 3]
        if kind & 0x80:
            device.write(offset % 12, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= device.read(offset % 12, size) < 1 << 8 * size
    device.load(device.save())


def clock(data: bytes) -> None:
    """Pairs of bytes: offset and direction, value."""
    device = Clock(LAYOUT, 1, now=lambda: 1_700_000_000.5)
    for at in range(0, len(data) - 1, 2):
        if data[at] & 0x80:
            device.write(data[at] & 1, 1, data[at + 1])
        else:
            assert 0 <= device.read(data[at] & 1, 1) <= 0xFF
    device.load(device.save())


def record(data: bytes) -> None:
    """The metadata of a record."""
    with contextlib.suppress(RecordError):
        record_meta.decode_meta(data, FILE)


def journal(data: bytes) -> None:
    """The tail of a record; every entry that it finds is read."""
    FILE.write_bytes(data)
    with contextlib.suppress(RecordError), JournalReader(FILE) as reader:
        for window in range(reader.first_window, min(reader.end_window, reader.first_window + 16)):
            with contextlib.suppress(RecordError):
                reader.histograms(reader.entry(window))


def _imports(read: Callable[[Path], object]) -> Callable[[bytes], None]:
    def target(data: bytes) -> None:
        FILE.write_bytes(data)
        with contextlib.suppress(RecordError, LayoutError):
            for number, window in enumerate(read(FILE).windows):  # type: ignore[attr-defined]
                assert window.bitmap.words.size == -(-window.bitmap.n_pages // 64)
                if number == 3:
                    break

    return target


def dirty(data: bytes) -> None:
    """An index of dirty bitmaps; one bitmap lies beside it."""
    folder = Path(_FOLDER.name) / "dirty"
    folder.mkdir(exist_ok=True)
    (folder / "a.bin").write_bytes(b"\x01" + bytes(7))
    (folder / dirty_format.INDEX_FILE).write_bytes(data)
    with contextlib.suppress(RecordError):
        for number, _ in enumerate(dirty_format.read(folder).windows):
            if number == 3:
                break


def config(data: bytes) -> None:
    """A configuration of reclaimd."""
    FILE.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load(FILE)


_REQUESTS = (
    schema.EvictQuery,
    schema.GfnList,
    schema.HarvestQuery,
    schema.LeaseRequest,
    schema.LimitRequest,
    schema.PauseQuery,
    schema.RestoreRequest,
    schema.SnapshotRequest,
)


def api(data: bytes) -> None:
    """First byte: the kind of request; the rest is its body, and its query."""
    if not data:
        return
    kind, body = _REQUESTS[data[0] % len(_REQUESTS)], data[1:]
    with contextlib.suppress(schema.SchemaError):
        schema.decode(body, kind)
    words = body.decode("utf-8", "replace").split("&")
    query = dict(word.partition("=")[::2] for word in words)
    with contextlib.suppress(schema.SchemaError):
        schema.decode_query(query, kind)


def units(data: bytes) -> None:
    """An amount of each kind, which reads back as the same."""
    given = data.decode("utf-8", "replace")
    for kind in (Bytes, Seconds, Share, Mark):
        with contextlib.suppress(ValueError):
            amount = kind.parse(given)
            assert kind.parse(str(amount)) == amount


def lru_gen(data: bytes) -> None:
    """Commands of lru_gen's debug file."""
    with contextlib.suppress(LayoutError):
        lru_gen_text.parse(data.decode("utf-8", "replace"))


def snapshot(data: bytes) -> None:
    """The head and the state of a snapshot, with checksums made right."""
    state = data[44:]
    head = bytearray(data[:44].ljust(44, b"\0"))
    if not (head[0] & 1):
        head = bytearray(snapfile.pack_head(state, data[24] if len(data) > 24 else 0, b""))
    FILE.write_bytes(bytes(head) + state)
    fd = os.open(FILE, os.O_RDONLY)
    try:
        with contextlib.suppress(ImageError, LayoutError):
            snapfile.read_state("x", fd)
    finally:
        os.close(fd)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "api": api,
    "clock": clock,
    "config": config,
    "damon": _imports(damon_format.read),
    "dirty": dirty,
    "fwcfg": fwcfg,
    "journal": journal,
    "loaders": loaders,
    "lru_gen": lru_gen,
    "record": record,
    "serial": serial,
    "snapshot": snapshot,
    "text": _imports(text_format.read),
    "units": units,
}


def _elf() -> bytes:
    head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x200000, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    phdr = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x200000, 0x200000, 176, 4096, 4096)
    multiboot = struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    return b"\x7fELF\x02\x01\x01" + bytes(9) + head + phdr + multiboot.ljust(56, b"\0")


def _meta() -> record_meta.RecordMeta:
    session = record_meta.RecordSession(0, "guestpt", "npt", 10**9)
    layout = record_meta.MemslotLayout(0, [record_meta.Memslot(0, 0, 4096)])
    return record_meta.RecordMeta(1, 0, 4096, 4096, 4096, 0, 0, "vm", [session], [layout])


def _journal() -> bytes:
    entry = JournalEntry([0, 1, 1, 64, 0, 0, 0, 0], [], [], b"")
    JournalWriter(FILE, 0, [(entry, 64), (entry, 64)]).close()
    return FILE.read_bytes()


_REGION = {"start": "0", "end": "8192", "nr_accesses": {"samples": 1}}
_DAMON = msgspec.json.encode(
    [{"snapshots": [{"start_time": "1", "end_time": 2.5, "regions": [_REGION]}], "target_id": 0}]
)
_INDEX = msgspec.json.encode(
    {"gfn_start": 0, "n_pages": 64, "windows": [{"file": "a.bin", "n_pages": 64}]}
)
_CONFIG = b"""[daemon]
vms = ["a*"]
interval = "500ms"
[defaults]
budget = "50%"
[vm."a*"]
policy_options = { min_ttl_ms = 5 }
"""

#: Inputs by target: valid ones, and some that were answered with a traceback once.
SEEDS: dict[str, list[bytes]] = {
    "api": [
        b"\0before=1&n_pages=0x10",
        b'\1{"gfns":[1,2]}',
        b"\2gfn_start=0x10&n_pages=64&rearm=sample&fraction=0.5",
        b'\3{"holder":"a","ttl_s":1.5}',
        b'\4{"resident_max_bytes":4096}',
        b"\5for_s=2",
        b'\6{"gfn":1,"n_pages":3}',
        b'\7{"path":"/tmp/x"}',
        b'\3{"holder":"\xff"}',
        b'\4{"\xff":1}',
    ],
    "config": [_CONFIG, b'[defaults]\nbudget = "1' + b"0" * 400 + b'"', b"a = " + b"[" * 5000],
    "damon": [_DAMON, zlib.compress(_DAMON), b'[{"snapshots":[{"\xff":1}]}]'],
    "dirty": [_INDEX],
    "journal": [_journal()],
    "loaders": [bytes([kind]) + _elf() for kind in range(len(NAMES) + 1)],
    "lru_gen": [b"+ 1 0 3 1 1, - 1 0 2 60 10"],
    "record": [record_meta.encode_meta(_meta())[1]],
    "snapshot": [bytes(44) + b'{"machine":"tiny","mem_bytes":4194304}'],
    "text": [
        b"# kvmhost young ranges: gfn_start=0x0 n_pages=64\nwindow start_ns=1 n_pages=64\n0x1 9\n"
    ],
    "units": [b"96M", b"50ms", b"0.2%", b"1/8"],
}
