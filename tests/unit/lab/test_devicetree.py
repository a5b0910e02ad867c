"""A property is added to a flattened device tree, and QEMU's monitor starts the machine."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

import pytest
from devicetrees import REG, node, prop, tree, word

from kvmhost.errors import ImageError, LabError
from kvmhost.lab.devicetree import AddedProperty, add_property, patch_device_tree
from kvmhost.lab.hosts import HOSTS
from kvmhost.lab.monitor import Monitor

ADDED = AddedProperty(0x1000, "cpu@", "sizes", (0xC, 0xA000_0010))


def read(raw: bytes) -> dict[str, dict[str, bytes]]:
    """Return the properties of each path, read by this module alone."""
    magic, total, at, at_strings, at_reserved, *_, n_strings, n_struct = struct.unpack_from(
        ">10I", raw
    )
    assert (magic, total) == (0xD00DFEED, len(raw))
    assert struct.unpack_from(">4Q", raw, at_reserved) == (0x2000, 0x1000, 0, 0)
    strings, end = raw[at_strings : at_strings + n_strings], at + n_struct
    path: list[str] = []
    found: dict[str, dict[str, bytes]] = {}
    while at < end:
        (token,) = struct.unpack_from(">I", raw, at)
        at += 4
        if token == 1:
            stop = raw.index(b"\0", at)
            path.append(raw[at:stop].decode())
            found["/".join(path)] = {}
            at = stop + 4 & ~3
        elif token == 2:
            path.pop()
        elif token == 3:
            n, at_name = struct.unpack_from(">2I", raw, at)
            name = strings[at_name : strings.index(b"\0", at_name)].decode()
            found["/".join(path)][name] = raw[at + 8 : at + 8 + n]
            at = at + 8 + n + 3 & ~3
    assert path == []
    return found


@pytest.mark.parametrize("gap", [0, 16])
def test_each_node_of_that_name_gets_the_property(gap: int) -> None:
    nodes = [
        node("memory@0", REG),
        node("cpus", node("cpu@0", REG, node("cache", REG)), node("cpu@10", REG), node("other")),
    ]
    reg, sizes = b"\0\0\0\1\0", word(*ADDED.cells)
    assert read(add_property(tree(*nodes, gap=gap), ADDED)) == {
        "": {},
        "/memory@0": {"reg": reg},
        "/cpus": {},
        "/cpus/cpu@0": {"sizes": sizes, "reg": reg},
        "/cpus/cpu@0/cache": {"reg": reg},
        "/cpus/cpu@10": {"sizes": sizes, "reg": reg},
        "/cpus/other": {},
    }


def test_a_node_that_has_the_property_keeps_its_own() -> None:
    own = prop(4, b"mine")
    found = read(add_property(tree(node("cpu@0", REG, own), node("cpu@1", REG)), ADDED))
    assert found["/cpu@0"] == {"reg": b"\0\0\0\1\0", "sizes": b"mine"}
    assert found["/cpu@1"]["sizes"] == word(*ADDED.cells)


@pytest.mark.skipif(
    shutil.which("dtc") is None, reason="no dtc; apt-get install device-tree-compiler"
)
def test_the_device_tree_compiler_reads_the_result() -> None:
    raw = add_property(tree(node("cpu@0", REG)), ADDED)
    text = subprocess.run(["dtc", "-I", "dtb"], input=raw, capture_output=True, check=True).stdout
    assert b"sizes = <0x0c 0xa0000010>;" in text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header makes no sense"),
        (bytes(4096), "header makes no sense"),
        (tree(node("cpu@0"))[:-1], "header makes no sense"),
        (tree(node("memory@0", REG)), "no node cpu@"),
        (tree(word(77)), "no structure block at byte"),
        (tree(node("cpu@0", prop(999, b""))), "no structure block at byte"),
        (tree(word(3, 0x7FFF_FFFF, 0)), "no structure block at byte"),
    ],
)
def test_what_is_no_device_tree_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        add_property(raw, ADDED)


def test_the_tree_is_changed_where_it_lies(tmp_path: Path) -> None:
    ram, raw = tmp_path / "ram", tree(node("cpu@0", REG))
    ram.write_bytes(bytes(0x1000) + raw + bytes(0x1000))
    patch_device_tree(ram, 0x1000, ADDED)
    written = ram.read_bytes()
    changed = add_property(raw, ADDED)
    assert written[0x1000 : 0x1000 + len(changed)] == changed
    with pytest.raises(ImageError, match="header makes no sense"):
        patch_device_tree(ram, 0, ADDED)
    assert ram.read_bytes() == written


def test_hosts_add_what_fits_in_their_memory() -> None:
    added = [host.added_property for host in HOSTS.values() if host.added_property]
    assert [value.pa for value in added] == [0x0100_0000]
    shifts = [cell & 0xFF for cell in added[0].cells]
    assert shifts == [12, 16, 21, 30]


def monitor_says(*lines: bytes) -> list[dict[str, str]]:
    """Start a machine by a monitor that answers so; return what it was told."""
    ours, theirs = socket.socketpair()
    told: list[dict[str, str]] = []

    def serve() -> None:
        with theirs, theirs.makefile("rwb") as file:
            for line in lines:
                file.write(line + b"\n")
                file.flush()
                if b"QMP" in line or b"return" in line:
                    told.extend(json.loads(question) for question in [file.readline()] if question)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours, contextlib.closing(Monitor(ours, "h")) as monitor:
            monitor.wait_until_ready()
            monitor.start()
    finally:
        thread.join()
    return told


GREETING = b'{"QMP": {"version": {}}}'
EVENT = b'{"event": "RESUME"}'
DONE = b'{"return": {}}'


def test_a_machine_is_started() -> None:
    told = monitor_says(GREETING, DONE, EVENT, DONE)
    assert told == [{"execute": "qmp_capabilities"}, {"execute": "cont"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "monitor has ended"),
        ((b"hello",), "monitor has ended"),
        ((DONE,), "does not greet"),
        ((GREETING, b'{"error": {"desc": "no"}}'), "QEMU refuses qmp_capabilities: .*no"),
        ((GREETING, DONE, b'{"error": {"desc": "no"}}'), "QEMU refuses cont"),
    ],
)
def test_a_monitor_that_does_not(lines: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(LabError, match=message):
        monitor_says(*lines)


def test_a_monitor_that_does_not_answer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.01)
        with (
            contextlib.closing(Monitor(ours, "h")) as monitor,
            pytest.raises(LabError, match="does not answer"),
        ):
            monitor.wait_until_ready()
