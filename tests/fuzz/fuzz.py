"""Coverage-guided fuzzing by hand: ``python tests/fuzz/fuzz.py loaders -max_total_time=600``.

Targets are ``loaders``, ``serial``, ``fwcfg`` and ``clock``. Needs atheris (PyPI), which
is no dependency of the tests: the ordinary run has its hypothesis tests instead. What
comes after the target goes to libFuzzer, a corpus directory first for example.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvmhost.boot", "kvmhost.devices"]):
    from kvmhost.boot.image import Image
    from kvmhost.boot.loaders import LOADERS, _load, detect
    from kvmhost.boot.pcboot import BootRequest, Module
    from kvmhost.devices.clock import Clock
    from kvmhost.devices.fwcfg import FwCfg
    from kvmhost.devices.serial import Serial
    from kvmhost.errors import ImageError
    from kvmhost.memory.dma import GuestDma
    from kvmhost.memory.guest import GuestMemory
    from kvmhost.memory.pclayout import PcLayout

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


TARGETS: dict[str, Callable[[bytes], None]] = {
    "loaders": loaders,
    "serial": serial,
    "fwcfg": fwcfg,
    "clock": clock,
}


def seeds(folder: Path) -> None:
    """Write the multiboot guests as a first corpus for the loaders."""
    from kvmhost.guests.build import compile_pc_guest, pc_sources

    for source in pc_sources():
        for suffix in ("elf", "flat"):
            if source.suffix == ".c" or suffix == "elf":
                image = compile_pc_guest(source, folder / f"{source.stem}.{suffix}")
                image.write_bytes(bytes([len(NAMES)]) + image.read_bytes())


def main() -> None:
    """Fuzz one target."""
    target = sys.argv[1]
    arguments = [sys.argv[0], *sys.argv[2:]]
    with tempfile.TemporaryDirectory() as folder:
        if target == "loaders":
            seeds(Path(folder))
            arguments.append(folder)
        atheris.Setup(arguments, TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
