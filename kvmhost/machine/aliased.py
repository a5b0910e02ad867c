"""A machine whose tiny guest sees one piece of memory in many memslots.

As the memory of a guest can be larger than that of the host this way, KVM's page tables can
be filled for any size: ``kvmhost stress`` does that.

>>> from kvmhost.guests import image_path
>>> from kvmhost.machine.aliased import AliasedMachine
>>> with AliasedMachine(image_path("stress"), span_bytes=1 << 30, piece_bytes=64 << 20) as machine:
...     len(machine.memslots.list())  # doctest: +SKIP
17
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvmhost import engine as engines
from kvmhost.boot.image import read_image
from kvmhost.boot.params import resolve_params
from kvmhost.engine.base import Vcpu
from kvmhost.errors import CapabilityError, LayoutError
from kvmhost.machine.base import BaseMachine
from kvmhost.machine.tiny import Machine
from kvmhost.memory.guest import Region
from kvmhost.memory.layout import HIGH_GPA, MAX_TINY_VCPUS, AliasedLayout
from kvmhost.vm.names import EngineName

__all__ = ["AliasedMachine"]


class AliasedMachine(Machine):
    """One VM with a tiny guest whose memory from 4 GiB on is one piece, many times over.

    The guest's page tables map the span with leaves of 2 MiB. It cannot be saved.

    :ivar piece: the region; its own memslot is the first of the span
    :param span_bytes: what the guest sees, a multiple of the piece
    :param piece_bytes: the piece and each memslot, a multiple of 2 MiB; all of it is allocated
    :param huge: back the piece with huge pages
    :param common: as for :class:`~kvmhost.machine.base.BaseMachine`
    :raises ImageError: if the image cannot be used
    :raises LayoutError: if sizes, counts or parameters do not fit
    :raises CapabilityError: if the engine does not run here, or there are no huge pages
    :raises HostError: if the host has not enough memory for the piece
    """

    def __init__(
        self,
        image: Path | str,
        *,
        span_bytes: int,
        piece_bytes: int,
        n_vcpus: int = 1,
        engine: EngineName = "auto",
        huge: bool = False,
        params: Mapping[str, int] | None = None,
        **common: Any,
    ) -> None:
        if not 1 <= n_vcpus <= MAX_TINY_VCPUS:
            raise LayoutError(f"{n_vcpus} vCPUs: a tiny guest takes 1 to {MAX_TINY_VCPUS}")
        self._tiny_image = read_image(Path(image))
        self._huge = huge
        layout = self._tiny_layout = AliasedLayout.of(piece_bytes, span_bytes)
        resolved = resolve_params(self._tiny_image, params or {})
        chosen = engines.choose(engine)
        BaseMachine.__init__(
            self,
            self._tiny_image,
            layout,
            chosen,
            n_vcpus=n_vcpus,
            params=resolved,
            **common,
        )
        try:
            for i in range(1, layout.n_slots):
                self.memslots.add_alias(HIGH_GPA + i * piece_bytes, piece_bytes, HIGH_GPA)
        except BaseException:
            self.close()
            raise

    @property
    def piece(self) -> Region:
        """The region that all memslots of the span show."""
        return self.memory.regions[1]

    def assemble(self) -> list[Vcpu]:
        """Allocate the piece, then as any tiny guest."""
        if self._huge:
            self.piece.use_huge_pages()
        else:
            self.piece.populate()
        return super().assemble()

    def snapshot(
        self,
        path: str | Path,
        stop: bool = False,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Refuse: a snapshot holds no memslots.

        :raises CapabilityError: always
        """
        raise CapabilityError(
            "snapshot",
            "a machine whose memslots are those of its regions",
            "aliased memory",
            "use a Machine",
        )
