"""Machines for tiny guests: 64-bit mode at privilege level 3, page tables from the VMM.

>>> from kvmhost.machine import Machine
>>> from kvmhost.guests import image_path
>>> with Machine(image_path("hello"), mem_bytes=4 << 20) as machine:  # doctest: +SKIP
...     machine.start()
...     machine.wait(timeout_s=5)
...     machine.console_text()
0
'hello from vCPU 0x0 of 0x1\\n'
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from kvmhost import engine as engines
from kvmhost.boot.image import Image, read_image
from kvmhost.boot.longmode import entry_state
from kvmhost.boot.params import resolve_params
from kvmhost.boot.tiny import load_tiny
from kvmhost.devices.bus import DEBUG_EXIT_PORT, DOORBELL_PORT, EXIT_PORT, FREE_PORT
from kvmhost.devices.freelist import FreeList
from kvmhost.engine.base import Vcpu
from kvmhost.errors import LayoutError
from kvmhost.exits import IoOut
from kvmhost.machine.base import BaseMachine
from kvmhost.machine.parts import MachineParts
from kvmhost.machine.runner import Step
from kvmhost.memory.layout import MAX_TINY_VCPUS, TinyLayout
from kvmhost.vm.names import EngineName

__all__ = ["DEFAULT_MEM_BYTES", "Machine"]

DEFAULT_MEM_BYTES = 64 << 20


class Machine(BaseMachine):
    """One VM with a tiny guest.

    :param image: path of an image, or a parsed one
    :param mem_bytes: guest memory, a multiple of 4 KiB
    :param engine: ``auto``, ``kvm`` or ``emulated``
    :param params: values for the image's parameters, numbers or text such as ``64M``
    :param common: as for :class:`~kvmhost.machine.base.BaseMachine`
    :raises ImageError: if the image cannot be used
    :raises LayoutError: if sizes, counts or parameters do not fit
    :raises CapabilityError: if the engine does not run on this host
    """

    kind: ClassVar[str] = "tiny"

    def __init__(
        self,
        image: Path | str | Image,
        *,
        mem_bytes: int = DEFAULT_MEM_BYTES,
        n_vcpus: int = 1,
        engine: EngineName = "auto",
        params: Mapping[str, int | str] | None = None,
        **common: Any,
    ) -> None:
        self._tiny_image = image if isinstance(image, Image) else read_image(Path(image))
        self._tiny_layout = TinyLayout(mem_bytes)
        resolved = resolve_params(self._tiny_image, params or {})
        if not 1 <= n_vcpus <= MAX_TINY_VCPUS:
            raise LayoutError(f"{n_vcpus} vCPUs: a tiny guest takes 1 to {MAX_TINY_VCPUS}")
        super().__init__(
            self._tiny_image,
            self._tiny_layout,
            engines.choose(engine),
            n_vcpus=n_vcpus,
            params=resolved,
            **common,
        )

    @property
    def tables_gpa(self) -> int:
        """Root of the page tables that the VMM laid out and the guest keeps."""
        return self._tiny_layout.tables_gpa

    def snapshot_parts(self) -> MachineParts:
        """Return its kind: it has no devices of its own."""
        return MachineParts("tiny")

    def assemble(self) -> list[Vcpu]:
        """Load the image and lay out parameters, task state segment and page tables."""
        image, layout = self._tiny_image, self._tiny_layout
        self.bus.add_doorbell()
        self.bus.add_port(
            FREE_PORT, 4, FreeList(self.memory, self.paging.drop, self.paging.fault_in)
        )
        load_tiny(self.memory, layout, image, self.n_vcpus, self.params)
        self.engine.attach(self.memory, self.bus)
        return [
            self.engine.create_vcpu(index, entry_state(layout, image.entry, index))
            for index in range(self.n_vcpus)
        ]

    def handle_port_write(self, vcpu: Vcpu, vm_exit: IoOut) -> Step:
        """End a vCPU or the machine, stop at a doorbell, or pass the write to the bus."""
        if vm_exit.port == EXIT_PORT:
            self.report_status(vcpu, vm_exit.value)
            return Step.END
        if vm_exit.port == DEBUG_EXIT_PORT:
            self.report_status(vcpu, vm_exit.value << 1 | 1)
            return Step.END_ALL
        if vm_exit.port == DOORBELL_PORT:
            return Step.HOLD
        return super().handle_port_write(vcpu, vm_exit)
