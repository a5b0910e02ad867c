"""Guest memory: memfd regions, each mapped twice, and their layout."""

from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["PAGE_BYTES", "PAGE_SHIFT", "GuestMemory", "Region"]
