"""Figures of others for the phases, with their sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["REFERENCES", "Reference"]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Times of one run of the kernel's selftest.

    :param taken_s: by phase, where they were given
    """

    name: str
    source: str
    taken_s: Mapping[str, float]


_SOURCE = (
    "mmu_stress_test, 128 GiB and 48 vCPUs, patches of 2024 "
    '("KVM: selftests: Add phases for mprotect() to max_guest_memory_test")'
)

#: By how a fault is handled. The patches gave ro for both ways, and the rest once.
REFERENCES: dict[str, tuple[Reference, ...]] = {
    "stop": (
        Reference(
            "x86, 2024",
            _SOURCE,
            {"run1": 6.9, "reset": 0.0002, "run2": 0.035, "ro": 6.1, "rw": 7.7},
        ),
        Reference("arm64, 2024", _SOURCE, {"run1": 14.0, "ro": 50.9, "rw": 14.7}),
    ),
    "skip": (
        Reference(
            "x86, 2024",
            _SOURCE,
            {"run1": 6.9, "reset": 0.0002, "run2": 0.035, "ro": 14.6, "rw": 7.7},
        ),
        Reference("arm64, 2024", _SOURCE, {"run1": 14.0, "ro": 81.1, "rw": 14.7}),
    ),
}
