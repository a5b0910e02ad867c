"""Guests that stop after each epoch, and the gfns that it touches: inside a host of the lab.

On amd64 it is the guest ``touch`` in a machine of kvmhost, with a tracker beside if asked. On
arm64 and powerpc a loop of a few instructions (``loop/*.S``) runs on the bare ioctls.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import platform
import struct
from pathlib import Path
from typing import Any, Protocol

from kvmhost._ffi import ffi, lib
from kvmhost.errors import GuestError, HostError

__all__ = ["MOST_PAGES", "EpochGuest", "open_guest"]

_PAGE, _HUGE = 4096, 2 << 20
#: First page that touch touches.
_TOUCH_GFN = 1024
_EPOCH_S = 600.0
#: Guests with more take long to fill their memory in an emulated host.
MOST_PAGES = 1 << 16
#: Guest-physical address of the loop's memory.
_BASES = {"aarch64": 0x4000_0000, "ppc64le": 0}


class EpochGuest(Protocol):
    """A guest that runs one epoch at a time."""

    def run_epoch(self) -> list[int]:
        """Run an epoch and return the 4 KiB gfns that it touched, ascending."""

    def tracker_gfns(self) -> list[int] | None:
        """Return what the tracker beside it saw since the last call; None without one."""

    def close(self) -> None:
        """End the guest."""


def open_guest(options: dict[str, Any]) -> EpochGuest:
    """Return a guest for this host's architecture.

    :param options: ``stride`` in pages, ``write``, ``n_pages``, ``huge`` (memory in huge
        pages), ``image`` (of touch) and ``tracker`` on amd64, ``binary`` (the loop) elsewhere
    """
    if platform.machine() == "x86_64":
        return TouchGuest(options)
    return LoopGuest(options)


class TouchGuest:
    """``touch`` in a machine of kvmhost, on KVM."""

    def __init__(self, options: dict[str, Any]) -> None:
        # Imported here: the core of another architecture has no vCPUs.
        from kvmhost.machine import Machine

        first, n_pages, stride = _TOUCH_GFN, options["n_pages"], options["stride"]
        params = {"gfn_start": first, "pages": n_pages, "stride": stride, "epochs": 0}
        params["write"] = int(options["write"])
        mem_bytes = (2 * first + n_pages) * _PAGE
        self._machine = Machine(options["image"], mem_bytes=mem_bytes, params=params, engine="kvm")
        self._range, self._gfns = (first, n_pages), list(range(first, first + n_pages, stride))
        self._machine.step_by_doorbell()
        self._tracker: str | None = options.get("tracker")
        self.run_epoch()
        if self._tracker:
            self._machine.harvest(*self._range, tracker=self._tracker, rearm="all")

    def run_epoch(self) -> list[int]:
        """Run an epoch and return the gfns that it touched, ascending."""
        if not self._machine.run_epoch(_EPOCH_S):
            raise GuestError("touch ended")
        return self._gfns

    def tracker_gfns(self) -> list[int] | None:
        """Return what the tracker saw since the last call; None without one."""
        if not self._tracker:
            return None
        found = self._machine.harvest(*self._range, tracker=self._tracker, rearm="all")
        return [int(gfn) for gfn in found.young.gfns()]

    def close(self) -> None:
        """End the guest."""
        self._machine.close()


class LoopGuest:
    """A loop over a range, on the bare ioctls.

    :raises HostError: if KVM refuses something
    """

    _CODE, _PARAMS, _DATA = 0x1_0000, 0x2_0000, 4 << 20

    def __init__(self, options: dict[str, Any]) -> None:
        self._machine = platform.machine()
        self._base = _BASES[self._machine]
        self._stack = contextlib.ExitStack()
        self._options = options
        self._bytes = -(-(self._DATA + options["n_pages"] * _PAGE) // _HUGE) * _HUGE
        self._address = self._map(options["huge"])
        self._put(self._CODE, Path(options["binary"]).read_bytes())
        self._kvm = self._open()
        self._vm = self._own(self._ioctl(self._kvm, lib.KVM_CREATE_VM, 0))
        self._add_memory()
        self._vcpu = self._own(self._ioctl(self._vm, lib.KVM_CREATE_VCPU, 0))
        n_bytes = self._ioctl(self._kvm, lib.KVM_GET_VCPU_MMAP_SIZE, 0)
        self._run = mmap.mmap(self._vcpu, n_bytes)
        self._stack.callback(self._run.close)
        getattr(self, f"_enter_{self._machine}")(self._base + self._CODE, self._base + self._PARAMS)
        self.run_epoch()

    def _map(self, huge: bool) -> int:
        """Map the guest's memory at a multiple of 2 MiB; return its address."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._whole = mmap.mmap(-1, self._bytes + _HUGE, flags)
        self._whole.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        # SAFETY: the view pins the mapping, and this object, which the vCPU's run needs, has it.
        self._view = ffi.from_buffer(self._whole)
        start = int(ffi.cast("uintptr_t", self._view))
        self._skip = -start % _HUGE
        for at in range(0, self._bytes, _PAGE):
            self._put(at, b"\1")
        return start + self._skip

    def _put(self, at: int, data: bytes) -> None:
        at += self._skip
        self._whole[at : at + len(data)] = data

    def _open(self) -> int:
        try:
            return self._own(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            raise HostError("/dev/kvm", error.errno or 0) from error

    def _own(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def _ioctl(self, fd: int, request: int, argument: int | bytes | bytearray) -> int:
        try:
            return fcntl.ioctl(fd, request, argument)  # type: ignore[return-value]
        except OSError as error:
            raise HostError(f"ioctl {request:#x}", error.errno or 0) from error

    def _add_memory(self) -> None:
        slot = struct.pack("IIQQQ", 0, 0, self._base, self._bytes, self._address)
        self._ioctl(self._vm, lib.KVM_SET_USER_MEMORY_REGION, slot)

    def _enter_aarch64(self, pc: int, x0: int) -> None:
        init = bytearray(32)
        self._ioctl(self._vm, lib.KVM_ARM_PREFERRED_TARGET, init)
        self._ioctl(self._vcpu, lib.KVM_ARM_VCPU_INIT, init)
        for offset, value in ((64, pc), (0, x0)):  # of pc and x0 in struct user_pt_regs, / 4
            number = lib.KVM_REG_ARM64 | lib.KVM_REG_SIZE_U64 | lib.KVM_REG_ARM_CORE | offset
            held = ffi.new("uint64_t *", value)
            # SAFETY: the kernel reads the value during this call; `held` lives until it returns.
            address = int(ffi.cast("uintptr_t", held))
            self._ioctl(self._vcpu, lib.KVM_SET_ONE_REG, struct.pack("QQ", number, address))

    def _enter_ppc64le(self, pc: int, r3: int) -> None:
        cap = struct.pack("II4Q64x", lib.KVM_CAP_PPC_PAPR, 0, 0, 0, 0, 0)
        self._ioctl(self._vcpu, lib.KVM_ENABLE_CAP, cap)
        regs = ffi.new("struct kvm_regs *")
        raw = ffi.buffer(regs)
        data = bytearray(raw[:])
        self._ioctl(self._vcpu, lib.KVM_GET_REGS, data)
        raw[:] = bytes(data)
        regs.pc, regs.msr, regs.gpr[3] = pc, 1 << 63 | 1, r3  # 64-bit, little-endian
        self._ioctl(self._vcpu, lib.KVM_SET_REGS, bytes(raw[:]))

    def run_epoch(self) -> list[int]:
        """Run an epoch and return the gfns that it touched, ascending."""
        first, stride = self._base + self._DATA, self._options["stride"] * _PAGE
        end = first + self._options["n_pages"] * _PAGE
        write = int(self._options["write"])
        self._put(self._PARAMS, struct.pack("4Q", first, end, stride, write))
        self._ioctl(self._vcpu, lib.KVM_RUN, 0)
        reason = struct.unpack_from("I", self._run, 8)[0]
        expected = {"aarch64": "KVM_EXIT_MMIO", "ppc64le": "KVM_EXIT_PAPR_HCALL"}[self._machine]
        if reason != getattr(lib, expected):
            raise GuestError(f"the loop stopped with exit reason {reason}, not {expected}")
        return list(range(first // _PAGE, end // _PAGE, self._options["stride"]))

    def tracker_gfns(self) -> list[int] | None:
        """Return None: no tracker runs on these hosts."""
        return None

    def close(self) -> None:
        """End the guest."""
        self._stack.close()
