"""Options of a VM's store of evicted pages, without imports that would slow down booting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kvmhost.errors import LayoutError
from kvmhost.vm.names import CODECS, CodecName, check_name

__all__ = ["MAX_MEMORY_WAIT_S", "MAX_PREFETCH_PAGES", "StoreOptions"]

#: ``auto`` is the first available one of the others, in measured order of speed:
#: see docs/pager.md and ``kvmhost bench pager``.
MAX_PREFETCH_PAGES = 64
MAX_MEMORY_WAIT_S = 86_400
#: The store takes memory in chunks of this size.
MIN_LIMIT_BYTES = 32768


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """Options of the pager's store.

    :ivar path: file that holds the evicted pages; None: memory
    :ivar limit_bytes: memory, or bytes of the file, that the store may hold; 0: no limit
    :ivar refuse_incompressible: keep pages that do not compress resident
    :ivar prefetch_pages: maximum number of pages to restore after a touched one, if they
        were evicted together with it; 0: none
    :ivar memory_wait_s: how long a fault waits for memory on the host before the VM ends
    :raises LayoutError: for an unknown codec or a number out of range
    """

    codec: CodecName = "auto"
    path: Path | None = None
    limit_bytes: int = 0
    refuse_incompressible: bool = False
    prefetch_pages: int = 0
    memory_wait_s: float = 60.0

    def __post_init__(self) -> None:
        check_name("codec", self.codec, CODECS, "codec")
        if not 0 <= self.prefetch_pages <= MAX_PREFETCH_PAGES:
            raise LayoutError(f"prefetch of {self.prefetch_pages} pages: 0 to {MAX_PREFETCH_PAGES}")
        if self.limit_bytes and self.limit_bytes < MIN_LIMIT_BYTES:
            raise LayoutError(
                f"store limit of {self.limit_bytes} bytes: 0, or at least {MIN_LIMIT_BYTES}"
            )
        if not 0 < self.memory_wait_s <= MAX_MEMORY_WAIT_S:
            raise LayoutError(
                f"wait for memory of {self.memory_wait_s:g} s: above 0, up to {MAX_MEMORY_WAIT_S}"
            )
