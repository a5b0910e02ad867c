"""A VM with a guest of 11 instructions, on which trackers are tried and measured.

The guest touches each of its pages once, in order, rings the doorbell, and begins again.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

from kvmhost import engine as engines
from kvmhost.boot.image import Image, Segment
from kvmhost.boot.longmode import entry_state
from kvmhost.boot.tiny import load_tiny
from kvmhost.devices.bus import DOORBELL_PORT, Bus
from kvmhost.engine.base import Engine, Vcpu
from kvmhost.errors import UnexpectedExit
from kvmhost.exits import IoOut, Kicked
from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.memory.layout import IMAGE_GPA, TinyLayout
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT
from kvmhost.vm.names import EngineName

__all__ = ["GFN_START", "ProbeGuest", "probe_guest"]

#: The first page that the guest touches.
GFN_START = 0x180
#: Holds the pages, and the guest's code and tables.
_MEM_BYTES = 4 << 20
_READ = b"\x8a\x07"  # mov al, [rdi]
_WRITE = b"\xfe\x07"  # inc byte [rdi]


class ProbeGuest:
    """The VM, while it is open. All calls are for the thread that opened it.

    :param tables_gpa: root of the guest's page tables
    """

    def __init__(self, engine: Engine, vcpu: Vcpu, memory: GuestMemory, tables_gpa: int) -> None:
        self.engine, self.vcpu, self.memory, self.tables_gpa = engine, vcpu, memory, tables_gpa

    def touch_all(self) -> None:
        """Let the guest touch each page once.

        :raises UnexpectedExit: if it stops elsewhere than at its doorbell
        """
        while isinstance(vm_exit := self.vcpu.run(), Kicked):
            continue
        if not (isinstance(vm_exit, IoOut) and vm_exit.port == DOORBELL_PORT):
            raise UnexpectedExit(self.vcpu.index, f"calibration: {vm_exit!r}")


@contextlib.contextmanager
def probe_guest(name: EngineName, n_pages: int, *, writes: bool = False) -> Iterator[ProbeGuest]:
    """Open a guest that touches ``n_pages``, at most 512, from :data:`GFN_START` on.

    :param writes: it writes the pages instead of reading them
    :raises CapabilityError: if the engine cannot run here
    """
    layout = TinyLayout(_MEM_BYTES)
    code = _code(n_pages, _WRITE if writes else _READ)
    image = Image("calibration", IMAGE_GPA, (Segment(IMAGE_GPA, code, len(code), 0),), ())
    engine = engines.choose(name)
    try:
        with GuestMemory([Region(0, _MEM_BYTES, "calibration")]) as memory:
            load_tiny(memory, layout, image, 1, {})
            bus = Bus()
            bus.add_doorbell()
            engine.attach(memory, bus)
            vcpu = engine.create_vcpu(0, entry_state(layout, image.entry, 0))
            try:
                vcpu.stop_at_doorbell(True)
                yield ProbeGuest(engine, vcpu, memory, layout.tables_gpa)
            finally:
                vcpu.close()
                # Before memory is unmapped; closing again is harmless.
                engine.close()
    finally:
        engine.close()


def _code(n_pages: int, touch: bytes) -> bytes:
    return b"".join(
        (
            b"\xbf" + struct.pack("<I", GFN_START << PAGE_SHIFT),  # 1: mov  edi, first page
            b"\xb9" + struct.pack("<I", n_pages),  #                    mov  ecx, pages
            touch,  #                                                2: touch [rdi]
            b"\x48\x81\xc7" + struct.pack("<I", PAGE_BYTES),  #         add  rdi, 4096
            b"\xff\xc9",  #                                             dec  ecx
            b"\x75\xf3",  #                                             jnz  2b
            b"\xba" + struct.pack("<I", DOORBELL_PORT),  #              mov  edx, doorbell
            b"\xef",  #                                                 out  dx, eax
            b"\xeb\xe1",  #                                             jmp  1b
        )
    )
