"""The guest of the demo, its limit and its budget."""

from __future__ import annotations

import dataclasses

from kvmhost.vm.names import EngineName

__all__ = ["GFN_START", "DemoSettings"]

_MIB = 1 << 20
GFN_START = 1024
#: Memory besides guest memory and store: interpreter, page tables, KVM or the emulator. On KVM
#: up to 48 MiB were seen.
_PROCESS_BYTES = {"kvm": 54 * _MIB, "emulated": 70 * _MIB}
#: Size of a compressed page of this guest in the store, relative to a page: about a tenth.
_STORE_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The guest of the demo, in pages and epochs."""

    mem_bytes: int
    hot_bytes: int
    epochs: int
    engine: EngineName
    seed: int = 1

    @property
    def pages(self) -> int:
        """Pages that the guest uses: nearly all of its memory."""
        return (self.mem_bytes * 15 // 16) // 4096 - GFN_START

    @property
    def touched_bytes(self) -> int:
        """Memory that the guest touches during its run."""
        return self.pages * 4096

    @property
    def limit_bytes(self) -> int:
        """Half of the memory that the guest touches."""
        return self.touched_bytes // 2

    @property
    def budget_bytes(self) -> int:
        """Resident guest memory that leaves room below the limit for the store and the process."""
        room = self.limit_bytes - _PROCESS_BYTES[self.engine] - self.touched_bytes * _STORE_SHARE
        return int(room / (1 - _STORE_SHARE)) // 4096 * 4096

    def params(self, epochs: int | None = None) -> dict[str, int]:
        """Parameters of the guest."""
        return {
            "gfn_start": GFN_START,
            "pages": self.pages,
            "hot": self.hot_bytes // 4096,
            "cold": 16,
            "scan_every": 200 if self.engine == "kvm" else 40,
            "scan_epochs": 64 if self.engine == "kvm" else 16,
            "epochs": self.epochs if epochs is None else epochs,
            "seed": self.seed,
        }
