"""KVM state as the kernel's own structures in bytes, for boards and snapshots.

Who only carries state from one VM to another needs no field of it. The size of a
structure is part of its request number, except for those that end in an array.
"""

from __future__ import annotations

import struct

from kvmhost._ffi import check, ffi, lib

__all__ = ["get_msrs", "get_state", "msr_indices", "request_bytes", "set_msrs", "set_state"]

_MSR_BYTES = 16


def request_bytes(request: str) -> int:
    """Return the size of a request's structure. Source: asm-generic/ioctl.h."""
    return int(getattr(lib, request)) >> 16 & 0x3FFF


def get_state(fd: int, request: str, head: bytes = b"") -> bytes:
    """Return the structure that a request fills.

    :param head: what its first bytes have to say, for example a chip's number
    :raises IoctlError: if KVM refuses
    """
    buffer = bytearray(head.ljust(request_bytes(request), b"\0"))
    # SAFETY: the view keeps buffer alive until the call returns; its size is KVM's own.
    view = ffi.from_buffer(buffer, require_writable=True)
    check(lib.kh_ioctl_ptr(fd, getattr(lib, request), view), request)
    ffi.release(view)
    return bytes(buffer)


def set_state(fd: int, request: str, data: bytes) -> None:
    """Give KVM a structure; one that is too short ends in zeros.

    :raises IoctlError: if KVM refuses
    """
    buffer = data.ljust(request_bytes(request), b"\0")
    # SAFETY: as above; KVM only reads it.
    check(lib.kh_ioctl_ptr(fd, getattr(lib, request), ffi.from_buffer(buffer)), request)


def msr_indices(kvm_fd: int) -> list[int]:
    """Return which MSRs this KVM saves and restores. Source: KVM_GET_MSR_INDEX_LIST."""
    room = 1024
    buffer = bytearray(struct.pack("<I", room).ljust(4 + 4 * room, b"\0"))
    view = ffi.from_buffer(buffer, require_writable=True)
    check(lib.kh_ioctl_ptr(kvm_fd, lib.KVM_GET_MSR_INDEX_LIST, view), "KVM_GET_MSR_INDEX_LIST")
    ffi.release(view)
    (count,) = struct.unpack_from("<I", buffer)
    return list(struct.unpack_from(f"<{count}I", buffer, 4))


def get_msrs(fd: int, indices: list[int]) -> dict[int, int]:
    """Read MSRs; those that this vCPU does not have are left out."""
    found: dict[int, int] = {}
    left = list(indices)
    while left:
        head = struct.pack("<II", len(left), 0)
        buffer = bytearray(head + b"".join(struct.pack("<IIQ", i, 0, 0) for i in left))
        view = ffi.from_buffer(buffer, require_writable=True)
        done = check(lib.kh_ioctl_ptr(fd, lib.KVM_GET_MSRS, view), "KVM_GET_MSRS")
        ffi.release(view)
        for i in range(done):
            index, _, value = struct.unpack_from("<IIQ", buffer, 8 + _MSR_BYTES * i)
            found[index] = value
        # KVM stops at the first that it refuses.
        left = left[done + 1 :]
    return found


def set_msrs(fd: int, values: dict[int, int]) -> list[int]:
    """Write MSRs; return those that KVM refuses."""
    refused = []
    left = list(values.items())
    while left:
        head = struct.pack("<II", len(left), 0)
        buffer = head + b"".join(struct.pack("<IIQ", i, 0, value) for i, value in left)
        done = check(
            lib.kh_ioctl_ptr(fd, lib.KVM_SET_MSRS, ffi.from_buffer(buffer)), "KVM_SET_MSRS"
        )
        if done < len(left):
            refused.append(left[done][0])
        left = left[done + 1 :]
    return refused
