"""What all descriptors of KVM share: requests by name, structures in and out.

A method names its request once, as in ``self._get("KVM_GET_REGS", "kvm_regs")``;
number and sizes come from the C compiler. Every request that fails raises
:class:`~kvmhost.errors.IoctlError` with that name, the errno and the arguments;
a closed descriptor is ``EBADF``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Any

from kvmhost._ffi import check, ffi, lib
from kvmhost.closing import Closing
from kvmhost.kvm.caps import Cap
from kvmhost.kvm.structs import Struct

__all__ = ["Attributes", "Capabilities", "Descriptor", "Enabling", "Source", "as_struct"]

#: What fills a structure: the structure, its fields, or a buffer of its size.
Source = Struct | Mapping[str, Any] | bytes | bytearray | memoryview

#: No list of KVM is longer; if a kernel needs more, its E2BIG is raised.
_MAX_ENTRIES = 65536


class Descriptor(Closing):
    """An open descriptor that takes ioctls. Owns it.

    :param fd: the descriptor
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _call(self, request: str, argument: int = 0, **shown: Any) -> int:
        """Make a request that takes a number."""
        number = getattr(lib, request)
        return check(lib.kh_ioctl_int(self.fd, number, argument), request, **shown)

    def _pass(self, request: str, pointer: Any, **shown: Any) -> int:
        """Make a request that takes a pointer: a structure, or cffi data."""
        # SAFETY: the caller's argument keeps the memory alive until the call returns.
        raw = pointer.pointer if isinstance(pointer, Struct) else pointer
        return check(lib.kh_ioctl_ptr(self.fd, getattr(lib, request), raw), request, **shown)

    def _get(self, request: str, ctype: str, **fields: int) -> Struct:
        """Make a request that fills a structure; ``fields`` go in, and into an error."""
        answer = Struct(ctype, **fields)
        self._pass(request, answer, **fields)
        return answer

    def _set(self, request: str, ctype: str, value: Source, **shown: Any) -> int:
        """Make a request that reads a structure."""
        return self._pass(request, as_struct(ctype, value), **shown)

    def _make(self, request: str, ctype: str, **fields: int) -> int:
        """Make a request out of numbers, all of them shown if it fails."""
        return self._pass(request, Struct(ctype, **fields), **fields)

    def _get_table(self, request: str, ctype: str, n_entries: int = 64) -> Struct:
        """Make a request that fills a table, with as many entries as KVM needs.

        KVM returns ``E2BIG`` if the table is too short; some requests return the number
        of entries that they need, others must be repeated with a larger table.
        """
        counter = "n" if ctype == "kvm_reg_list" else "nent" if "cpuid" in ctype else "nmsrs"
        while True:
            table = Struct.table(ctype, n_entries)
            number = getattr(lib, request)
            result = lib.kh_ioctl_ptr(self.fd, number, table.pointer)
            if result != -errno.E2BIG or n_entries >= _MAX_ENTRIES:
                check(result, request, entries=n_entries)
                return table
            told = int(getattr(table.pointer, counter))
            n_entries = told if told > n_entries else 2 * n_entries


class Capabilities(Descriptor):
    """Asking for capabilities, and switching them on."""

    def check_extension(self, cap: Cap | int) -> int:
        """Return KVM's value of a capability; 0 means that it is missing.

        The result for a VM may differ from that for the system: prefer the VM.

        >>> vm.check_extension(Cap.NR_MEMSLOTS)  # doctest: +SKIP
        32764

        Source: KVM_CHECK_EXTENSION.
        """
        return self._call("KVM_CHECK_EXTENSION", int(cap), cap=_cap_name(cap))


class Enabling(Descriptor):
    """Descriptors that take KVM_ENABLE_CAP: VMs and vCPUs."""

    def enable_cap(self, cap: Cap | int, *args: int, flags: int = 0) -> None:
        """Switch a capability on, with up to four arguments.

        >>> vm.enable_cap(Cap.X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_FILTER)  # doctest: +SKIP

        :raises IoctlError: ``EINVAL`` for a capability or an argument that this KVM does
            not support, or that is enabled too late (for some, after the first vCPU)

        Source: KVM_ENABLE_CAP.
        """
        request = Struct("kvm_enable_cap", cap=int(cap), flags=flags, args=list(args))
        shown = {f"arg{i}": value for i, value in enumerate(args)}
        self._pass("KVM_ENABLE_CAP", request, cap=_cap_name(cap), **shown)


class Attributes(Descriptor):
    """Attributes in groups, as devices of the kernel, VMs, vCPUs and the system have them."""

    def has_attr(self, group: int, attr: int) -> bool:
        """Return whether the device has an attribute.

        >>> vcpu.has_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET)  # doctest: +SKIP
        True

        :raises IoctlError: for another answer than yes, or ``ENXIO``, ``EINVAL``,
            ``EPERM`` and ``ENOTTY``, which are a no

        Source: KVM_HAS_DEVICE_ATTR.
        """
        number = lib.KVM_HAS_DEVICE_ATTR
        request = Struct("kvm_device_attr", group=group, attr=attr)
        result = lib.kh_ioctl_ptr(self.fd, number, request.pointer)
        if -result in (errno.ENXIO, errno.EINVAL, errno.EPERM, errno.ENOTTY):
            return False
        check(result, "KVM_HAS_DEVICE_ATTR", group=group, attr=attr)
        return True

    def get_attr(self, group: int, attr: int, n_bytes: int = 8) -> int:
        """Return an attribute as a little-endian number.

        >>> vcpu.get_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET)  # doctest: +SKIP
        18446743936478052326

        :param n_bytes: size of the attribute, as the group defines it
        :raises IoctlError: ``ENXIO`` if there is none

        Source: KVM_GET_DEVICE_ATTR.
        """
        # SAFETY: the buffer lives until the call returns.
        value = ffi.new("uint8_t[]", n_bytes)
        self._pass("KVM_GET_DEVICE_ATTR", _attr(group, attr, value), group=group, attr=attr)
        return int.from_bytes(ffi.buffer(value), "little")

    def set_attr(self, group: int, attr: int, value: int | bytes, n_bytes: int = 8) -> None:
        """Set an attribute from a number (of ``n_bytes``) or from bytes.

        >>> vcpu.set_attr(lib.KVM_VCPU_TSC_CTRL, lib.KVM_VCPU_TSC_OFFSET, 0)  # doctest: +SKIP

        :raises IoctlError: ``ENXIO`` if there is none, ``EINVAL`` for a bad value

        Source: KVM_SET_DEVICE_ATTR.
        """
        data = value.to_bytes(n_bytes, "little") if isinstance(value, int) else value
        # SAFETY: the buffer lives until the call returns.
        buffer = ffi.new("uint8_t[]", data)
        self._pass("KVM_SET_DEVICE_ATTR", _attr(group, attr, buffer), group=group, attr=attr)


def as_struct(ctype: str, value: Source) -> Struct:
    """Return ``value`` as a structure of that type.

    :raises TypeError: for a structure of another type
    """
    if isinstance(value, Struct):
        if value.ctype != ctype:
            raise TypeError(f"need a struct {ctype}, not a struct {value.ctype}")
        return value
    if isinstance(value, Mapping):
        return Struct.from_dict(ctype, value)
    return Struct.from_bytes(ctype, value)


def _attr(group: int, attr: int, buffer: Any) -> Struct:
    address = int(ffi.cast("uintptr_t", buffer))
    return Struct("kvm_device_attr", group=group, attr=attr, addr=address)


def _cap_name(cap: Cap | int) -> str:
    try:
        return Cap(cap).name
    except ValueError:
        return str(int(cap))
