"""Hostile snapshots: right checksums over wrong contents. Refused, cheaply, and nothing left.

Structure-aware: a valid file is taken apart, one part is changed, checksums and sizes are put
right, so that what is behind them is reached. ``FUZZ_EXAMPLES=20000`` goes on for longer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from kvmhost.boot.loaders import load_image
from kvmhost.errors import ImageError, KvmHostError
from kvmhost.guests import image_path
from kvmhost.machine import BaseMachine, Machine
from kvmhost.machine.chunks import chunk_ranges, crc32c
from kvmhost.machine.pc import PcMachine, PcOptions
from kvmhost.machine.restore import restore_machine
from kvmhost.machine.snapfile import HEAD, TABLE_ENTRY, memory_offset, pack_head
from kvmhost.machine.snapshot import save_machine
from kvmhost.memory.layout import TinyLayout

pytestmark = pytest.mark.requires_kvm

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "80"))
PAGE = 4096

Parts = tuple[dict[str, Any], bytes, bytes]


def take_apart(raw: bytes) -> Parts:
    """Return state, memory and table of a file."""
    _, _, _, n_bytes, n_pages, *_ = HEAD.unpack_from(raw)
    first = memory_offset(n_bytes)
    end = first + n_pages * PAGE
    return json.loads(raw[HEAD.size : HEAD.size + n_bytes]), raw[first:end], raw[end:]


def put_together(path: Path, text: bytes, memory: bytes, table: bytes) -> Path:
    """Write a file of which all checksums and sizes are right."""
    head = pack_head(text, len(memory) // PAGE, table) + text
    path.write_bytes(head.ljust(memory_offset(len(text)), b"\0") + memory + table)
    return path


@pytest.fixture(scope="module")
def bases(pc_guest: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    """A tiny guest and a pc, saved."""
    folder = tmp_path_factory.mktemp("bases")
    machines: dict[str, BaseMachine] = {
        "tiny": Machine(image_path("touch"), mem_bytes=4 << 20, engine="kvm", n_vcpus=2),
        "pc": PcMachine(
            load_image(pc_guest("echo.elf")), PcOptions("a b"), mem_bytes=4 << 20, n_vcpus=2
        ),
    }
    found = {}
    for name, machine in machines.items():
        with machine:
            machine.start(paused=True)
            save_machine(machine, folder / name)
        found[name] = take_apart((folder / name).read_bytes())
    return found


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path] * bool(path) + [p for key, item in inner for p in leaves(item, (*path, key))]


NUMBERS = (-1, 0, 1, 2, 255, 256, 1 << 31, (1 << 63) - 1, 1 << 64, 10**30, -(1 << 63))
OTHERS = (None, True, 0.5, "", "x", "AAAA", [], {}, [[[]]], {"0x10": 1, "0xc0000080": 1 << 63})


def change_state(rng: random.Random, state: dict[str, Any]) -> None:
    """Put something odd in one place; half of the time in a number's place, by a number."""
    *way, last = rng.choice(leaves(state))
    place: Any = state
    for key in way:
        place = place[key]
    old = place[last]
    if isinstance(place, dict) and rng.random() < 0.2:
        last = rng.choice([last, "x", "0x277", "0"])
    if isinstance(old, str) and old and rng.random() < 0.7:
        at = rng.randrange(len(old))
        place[last] = old[:at] + rng.choice("A/0=\x00\x1b") + old[at + 1 :]
    elif isinstance(old, int) and rng.random() < 0.7:
        place[last] = rng.choice([*NUMBERS, old ^ 1 << rng.randrange(64)])
    else:
        place[last] = rng.choice(NUMBERS + OTHERS)


def changed(rng: random.Random, parts: Parts, path: Path) -> Path:
    """Write a file of which one part is changed, and checksums and sizes are right."""
    state, memory, table = copy.deepcopy(parts)
    what = rng.choice(["state", "state", "state", "table", "memory", "bytes"])
    if what == "state":
        change_state(rng, state)
    elif what == "table":
        at = rng.randrange(len(table))
        table = table[:at] + rng.randbytes(1) + table[at + 1 :]
    elif what == "memory":
        memory = memory[: rng.randrange(len(memory) // PAGE + 1) * PAGE]
        memory += bytes(rng.randrange(3) * PAGE)
    put_together(path, json.dumps(state).encode(), memory, table)
    if what == "bytes":
        raw = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(400)] ^= rng.randrange(1, 256)
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", ["tiny", "pc"])
def test_whatever_is_in_it_it_is_refused_or_restored(
    kind: str, bases: dict[str, Parts], tmp_path: Path
) -> None:
    # A file that was restored once brings in what is opened only once.
    state, memory, table = bases[kind]
    put_together(tmp_path / "x", json.dumps(state).encode(), memory, table)
    restore_machine(tmp_path / "x", resident_max_bytes=100 * 4096).close()
    for seed in range(EXAMPLES):
        path = changed(random.Random(seed), bases[kind], tmp_path / "x")
        open_before = n_open()
        try:
            # Some changes are as good as what was there; all else is one of our errors.
            with contextlib.suppress(KvmHostError):
                restore_machine(path).close()
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        assert n_open() == open_before, f"seed {seed}"


def n_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_sparse_file_costs_what_it_is(bases: dict[str, Parts], tmp_path: Path) -> None:
    """1 GiB of holes under right checksums: the first page of zeros is refused."""
    state, _, _ = copy.deepcopy(bases["tiny"])
    state["mem_bytes"] = 1 << 30
    n_chunks = sum(1 for _ in chunk_ranges(list(TinyLayout(1 << 30).regions)))
    table = TABLE_ENTRY.pack(b"\xff" * 32, crc32c(bytes(1 << 20))) * n_chunks
    text = json.dumps(state).encode()
    path = tmp_path / "x.snap"
    with path.open("wb") as file:
        file.write(pack_head(text, n_chunks * 256, table) + text)
        file.seek(memory_offset(len(text)) + (1 << 30))
        file.write(table)
    assert path.stat().st_blocks * 512 < 1 << 20
    before = time.process_time()
    with pytest.raises(ImageError, match="gfn 0x0 is all zero"):
        restore_machine(path)
    # Reading all of it would take about a second of processor time.
    assert time.process_time() - before < 30


@pytest.mark.parametrize("held", [b"\xff" * 32, b"\0" * 31 + b"\x80"])
def test_pages_outside_of_memory(held: bytes, bases: dict[str, Parts], tmp_path: Path) -> None:
    """The last chunk of a region that ends within it."""
    state, memory, _ = copy.deepcopy(bases["tiny"])
    state["mem_bytes"] = (3 << 20) + PAGE
    entries = [TABLE_ENTRY.pack(bytes(32), 0)] * 3 + [TABLE_ENTRY.pack(held, 0)]
    n_pages = int.from_bytes(held, "little").bit_count()
    pages = (memory * (n_pages * PAGE // len(memory) + 1))[: n_pages * PAGE]
    path = put_together(tmp_path / "x", json.dumps(state).encode(), pages, b"".join(entries))
    with pytest.raises(ImageError, match="pages outside of memory"):
        restore_machine(path)


def test_more_msrs_than_a_vcpu_may_have(bases: dict[str, Parts], tmp_path: Path) -> None:
    state, memory, table = copy.deepcopy(bases["pc"])
    state["vcpus"][0]["msrs"] = {f"{index:#x}": 0 for index in range(5000)}
    path = put_together(tmp_path / "x", json.dumps(state).encode(), memory, table)
    with pytest.raises(ImageError) as caught:
        restore_machine(path)
    assert caught.value.field == "state"
