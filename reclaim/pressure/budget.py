"""The resident budget of a VM: when to evict, and how many pages.

There are three levels, highest first. The **budget** is a hard limit, which the VM
enforces in its fault handler. Above the **high** mark the daemon evicts in the
background, down to the **low** mark. Between two passes a guest can therefore grow by
budget minus low before one of its faults must wait for an eviction.
"""

from __future__ import annotations

import dataclasses

from kvmhost.errors import LayoutError
from kvmhost.units import PAGE_BYTES

__all__ = ["DEFAULT_HIGH", "DEFAULT_LOW", "Budget"]

#: Default marks as shares of the budget.
DEFAULT_HIGH, DEFAULT_LOW = 0.95, 0.85


@dataclasses.dataclass(frozen=True)
class Budget:
    """Resident memory that one VM may have.

    :param max_bytes: the hard limit
    :param high_bytes: usage above which the daemon evicts
    :param low_bytes: usage down to which the daemon evicts
    :raises LayoutError: unless 0 < low <= high <= max, and max is at least one page
    """

    max_bytes: int
    high_bytes: int
    low_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < PAGE_BYTES:
            raise LayoutError(f"budget of {self.max_bytes} bytes: less than a page")
        if not 0 < self.low_bytes <= self.high_bytes <= self.max_bytes:
            raise LayoutError(
                f"budget of {self.max_bytes} bytes with marks high {self.high_bytes} and "
                f"low {self.low_bytes}: need 0 < low <= high <= budget"
            )

    @classmethod
    def of(
        cls, max_bytes: int, high_bytes: int | None = None, low_bytes: int | None = None
    ) -> Budget:
        """Make a budget; marks that are not given are the default shares of it, kept in order.

        :raises LayoutError: as the class
        """
        high = int(max_bytes * DEFAULT_HIGH) if high_bytes is None else high_bytes
        low = min(int(max_bytes * DEFAULT_LOW), high) if low_bytes is None else low_bytes
        return cls(max_bytes, high, low)

    def excess_pages(self, resident_pages: int) -> int:
        """Return the number of pages to evict now; 0 up to the high mark."""
        if resident_pages * PAGE_BYTES <= self.high_bytes:
            return 0
        return resident_pages - self.low_bytes // PAGE_BYTES
