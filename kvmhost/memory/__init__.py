"""Guest memory: memfd regions mapped twice, and where things lie in them."""

from kvmhost.memory.guest import GuestMemory, Region
from kvmhost.units import PAGE_BYTES, PAGE_SHIFT

__all__ = ["PAGE_BYTES", "PAGE_SHIFT", "GuestMemory", "Region"]
