"""fw_cfg: named and numbered items that a guest reads through ports or DMA.

Source: docs/specs/fw_cfg.rst of QEMU 7.2. Numbers are little-endian; the file
directory and the DMA descriptor are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from kvmhost.errors import LayoutError
from kvmhost.memory.dma import GuestDma

__all__ = ["FWCFG_PORT", "FwCfg", "check_name"]

FWCFG_PORT = 0x510
FWCFG_PORTS = 12

SIGNATURE, ID, RAM_SIZE, NB_CPUS, MAX_CPUS, FILE_DIR = 0, 1, 3, 5, 0xF, 0x19
FIRST_FILE, MAX_FILES = 0x20, 0x1000
_ID_TRADITIONAL, _ID_DMA = 1, 2
_DMA_SIGNATURE = int.from_bytes(b"QEMU CFG", "big")
_ERROR, _READ, _SKIP, _SELECT, _WRITE = 1, 2, 4, 8, 16
_MAX_NAME = 55


class FwCfg:
    """The device; offset 0 selects, 1 reads a byte, 4 to 11 are the DMA address.

    :param items: contents by key
    :param files: contents by name
    :param memory: guest memory for DMA; None: no DMA
    """

    def __init__(
        self,
        items: Mapping[int, bytes],
        files: Mapping[str, bytes] | None = None,
        memory: GuestDma | None = None,
    ) -> None:
        self._memory = memory
        known = _ID_TRADITIONAL | (_ID_DMA if memory else 0)
        self._items = {SIGNATURE: b"QEMU", ID: known.to_bytes(4, "little")} | dict(items)
        entries = b""
        for key, (name, data) in enumerate(sorted((files or {}).items()), FIRST_FILE):
            check_name(name)
            self._items[key] = data
            entries += struct.pack(">IHH56s", len(data), key, 0, name.encode())
        count = len(files or {})
        if count > MAX_FILES:
            raise LayoutError(f"{count} fw_cfg files, at most {MAX_FILES}")
        self._items[FILE_DIR] = count.to_bytes(4, "big") + entries
        self._key = self._at = self._dma_high = 0

    def read(self, offset: int, size: int) -> int:
        """Return the next byte of the item (port 0x511), or the DMA signature."""
        if offset == 1 and size == 1:
            return self._take(1)[0]
        if 4 <= offset < 12 and self._memory:
            raw = _DMA_SIGNATURE.to_bytes(8, "big")[offset - 4 :]
            return int.from_bytes(raw[:size].ljust(size, b"\0"), "little")
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item (port 0x510), or start a DMA transfer (0x518)."""
        if offset == 0 and size == 2:
            self._select(value)
        elif offset == 4 and size == 4:
            self._dma_high = int.from_bytes(value.to_bytes(4, "little"), "big")
        elif offset == 8 and size == 4 and self._memory:
            low = int.from_bytes(value.to_bytes(4, "little"), "big")
            self._transfer(self._memory, self._dma_high << 32 | low)
            self._dma_high = 0

    def save(self) -> dict[str, Any]:
        """Return the registers."""
        return {"key": self._key, "at": self._at, "dma_high": self._dma_high}

    def load(self, state: Mapping[str, Any]) -> None:
        """Set the registers from :meth:`save`."""
        self._key, self._at = int(state["key"]), int(state["at"])
        self._dma_high = int(state["dma_high"])

    def _select(self, key: int) -> None:
        self._key, self._at = key & 0xFFFF, 0

    def _take(self, n_bytes: int) -> bytes:
        item = self._items.get(self._key, b"")
        data = item[self._at : self._at + n_bytes]
        self._at = min(self._at + n_bytes, len(item))
        return data.ljust(n_bytes, b"\0")

    def _transfer(self, memory: GuestDma, gpa: int) -> None:
        try:
            control, n_bytes, address = struct.unpack(">IIQ", memory.read(gpa, 16))
        except LayoutError:
            return  # No descriptor there: the error cannot be reported.
        if control & _SELECT:
            self._select(control >> 16)
        failed = bool(control & _WRITE)
        if control & _READ and n_bytes and not failed:
            failed = not self._copy_out(memory, address, n_bytes)
        elif control & _SKIP:
            self._at = min(self._at + n_bytes, len(self._items.get(self._key, b"")))
        memory.write(gpa, (_ERROR if failed else 0).to_bytes(4, "big"))

    def _copy_out(self, memory: GuestDma, gpa: int, n_bytes: int) -> bool:
        """Copy the rest of the item; pad with zeros, at a cost independent of their number."""
        try:
            memory.check(gpa, n_bytes)
        except LayoutError:
            return False
        item = self._items.get(self._key, b"")
        data = memoryview(item)[self._at : self._at + n_bytes]
        memory.write(gpa, data)
        if n_bytes > len(data):
            memory.zero(gpa + len(data), n_bytes - len(data))
        self._at += len(data)
        return True


def check_name(name: str) -> None:
    """Check a file's name.

    :raises LayoutError: if it is empty, not ASCII, or longer than 55 characters
    """
    if not name or not name.isascii() or not name.isprintable() or len(name) > _MAX_NAME:
        raise LayoutError(f"fw_cfg name {name!r}: need 1 to {_MAX_NAME} printable ASCII characters")
