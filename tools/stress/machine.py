"""The machine of ``kvmhost stress``: how many of its pages each phase touches."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.guests import image_path
from kvmhost.machine.aliased import AliasedMachine
from kvmhost.memory.layout import HIGH_GPA, MAX_TINY_VCPUS, PARAMS_GPA
from kvmhost.units import PAGE_BYTES, size_text
from kvmhost.vm.names import EngineName

__all__ = ["MARKER", "PROBED", "Sizes", "StressMachine"]

#: What the guest stores in the pass that has to fault (guests/x86_64/stress.c).
MARKER = 0x6B766D737472736B
#: What a read of a deleted memslot returns here.
PROBED = 0x5A5A_A5A5_0F0F_F0F0

_ARGS_GPA = PARAMS_GPA + 0x40
#: Pages that the phase unmap writes at most, about.
_UNMAP_PAGES = 1 << 16
#: Length of the guest's store.
_STORE_BYTES = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run.

    :param span_bytes: all that the guest sees
    :param slot_bytes: of one memslot, and of the piece behind all of them
    :param huge: back the piece with huge pages
    :raises LayoutError: if they do not fit
    """

    span_bytes: int
    slot_bytes: int
    n_vcpus: int
    huge: bool = False

    def __post_init__(self) -> None:
        if self.n_vcpus > MAX_TINY_VCPUS:
            raise LayoutError(f"--vcpus {self.n_vcpus}: a tiny guest takes 1 to {MAX_TINY_VCPUS}")
        for option, n_bytes in (("--slot-size", self.slot_bytes), ("--mem", self.span_bytes)):
            if n_bytes <= 0 or n_bytes % (2 << 20):
                raise LayoutError(f"{option} {size_text(n_bytes)}: need a multiple of 2M")
        if self.span_bytes % self.slot_bytes:
            raise LayoutError(
                f"--mem {size_text(self.span_bytes)}: need a multiple of --slot-size "
                f"{size_text(self.slot_bytes)}"
            )

    @property
    def n_slots(self) -> int:
        """Memslots of the span."""
        return self.span_bytes // self.slot_bytes

    @property
    def unmapped_bytes(self) -> int:
        """The half of the piece that is unmapped."""
        return self.slot_bytes // 2 // PAGE_BYTES * PAGE_BYTES

    def part(self, vcpu: int) -> tuple[int, int]:
        """Return ``[start, end)`` of a vCPU, from the start of the span."""
        n_bytes = self.span_bytes // self.n_vcpus // PAGE_BYTES * PAGE_BYTES
        return vcpu * n_bytes, (vcpu + 1) * n_bytes

    @property
    def stride(self) -> int:
        """In the phase unmap every n-th page is written, so that its faults stay few."""
        return max(1, self.span_bytes // PAGE_BYTES // _UNMAP_PAGES)

    def n_pages(
        self, vcpu: int, every_other: int = False, unmapped: int = False, stride: int = 1
    ) -> int:
        """Count the pages of a vCPU.

        :param every_other: only those in memslots with even numbers
        :param unmapped: only those in the first half of the piece
        :param stride: only every n-th one, from the first on
        """
        start, end = self.part(vcpu)
        size = self.unmapped_bytes if unmapped else self.slot_bytes
        step = stride * PAGE_BYTES
        total = 0
        for first in range(0, self.span_bytes, self.slot_bytes):
            low, high = max(start, first) - start, min(end, first + size) - start
            if low < high and not (every_other and first // self.slot_bytes % 2):
                total += -(-high // step) - -(-low // step)
        return total


class StressMachine(AliasedMachine):
    """The machine with the guest ``stress``.

    :param stop: whether each vCPU waits at its first fault, instead of skipping the store
    :raises CapabilityError: if KVM lacks memslots or addresses for the size
    """

    def __init__(self, sizes: Sizes, *, engine: EngineName, stop: bool) -> None:
        self.sizes, self.stops = sizes, stop
        self.n_probes = 0
        self.probe_gpa = HIGH_GPA + sizes.slot_bytes if sizes.n_slots > 1 else 0
        _check_address_bits(HIGH_GPA + sizes.span_bytes, engine)
        params = {
            "start": HIGH_GPA,
            "bytes": sizes.span_bytes,
            "slot_bytes": sizes.slot_bytes,
            "stop": int(stop),
            "probe": self.probe_gpa,
            "stride": sizes.stride,
        }
        super().__init__(
            image_path("stress"),
            span_bytes=sizes.span_bytes,
            piece_bytes=sizes.slot_bytes,
            n_vcpus=sizes.n_vcpus,
            engine=engine,
            huge=sizes.huge,
            params=params,
            name="stress",
        )
        self.waits_in_memory_faults = stop
        if self.probe_gpa:
            # Memory goes before a device: it is seen once the memslot is deleted.
            self.bus.add_mmio(self.probe_gpa, 8, self)

    def read(self, offset: int, size: int) -> int:
        """Answer a read where the deleted memslot was."""
        self.n_probes += 1
        return PROBED >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignore a write where the deleted memslot was."""

    def set_argument(self, name: str, value: int) -> None:
        """Set a parameter of the running guest."""
        gpa = _ARGS_GPA + 8 * list(self.params).index(name)
        self.memory[gpa : gpa + 8] = value.to_bytes(8, "little")

    def skip_stores(self, skip: bool = True) -> None:
        """Skip each store that faults from now on, or none."""
        for vcpu in self.vcpus:
            vcpu.skip_faults(self.result(0).word, _STORE_BYTES if skip else 0)

    def faults(self) -> list[int]:
        """Return the faults so far, by vCPU."""
        return [vcpu.faults for vcpu in self.vcpus]


def _check_address_bits(end: int, engine: EngineName) -> None:
    """Refuse gpas that the processor does not have.

    :raises CapabilityError: names how many bits it has
    """
    bits = _address_bits() if engine != "emulated" else 48
    if end > 1 << bits:
        raise CapabilityError(
            f"guest memory up to {end:#x}",
            f"{(end - 1).bit_length()} bits of physical address",
            f"{bits}",
            "use a smaller --mem",
        )


def _address_bits() -> int:
    """Return the bits of a physical address, from /proc/cpuinfo; 46 if it does not say."""
    try:
        with Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("address sizes"):
                    return int(line.split(":")[1].split()[0])
    except (OSError, ValueError, IndexError):
        pass
    return 46 if os.uname().machine == "x86_64" else 40
