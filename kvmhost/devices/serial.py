"""A 16550 serial port: its host side and its state; the registers are in C."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from kvmhost._ffi import ffi, lib
from kvmhost.errors import HostError

__all__ = ["Serial"]

#: Maximum wait in C before Python handles signals.
_SLICE_NS = 20_000_000
_REGISTERS = (
    "divisor", "ier", "fcr", "lcr", "mcr", "scratch", "modem", "overrun", "tx_pending",
)  # fmt: skip


class Serial:
    """A serial port: the guest's output and input.

    A thread writes the output from a buffer of one mebibyte. If the buffer is full, the
    guest waits briefly, then further output is dropped and counted: no vCPU blocks
    because the output is not read.

    :param fd: descriptor that gets the output, line by line; -1 for none. A duplicate is
        written to until :meth:`close`
    :param log_bytes: how many bytes from the start are kept for :meth:`text`
    :raises HostError: if the descriptor is not open, or there is no memory
    """

    def __init__(self, fd: int = -1, log_bytes: int = 1 << 16) -> None:
        self._log_bytes = log_bytes
        # SAFETY: freed by ffi.gc when this object and every bus that holds it are freed.
        self.core = ffi.gc(lib.kh_serial_new(fd, log_bytes), lib.kh_serial_free)
        if self.core == ffi.NULL:
            raise HostError(f"serial port on descriptor {fd}", ffi.errno)

    def write(self, data: bytes) -> None:
        """Transmit bytes as the guest would."""
        lib.kh_serial_write(self.core, data, len(data))

    def connect(self, vm_fd: int, irq: int) -> None:
        """Connect the interrupt to an input of an in-kernel irqchip; -1: to nothing."""
        lib.kh_serial_set_irq(self.core, vm_fd, irq)

    def set_unbuffered(self, on: bool = True) -> None:
        """Pass each byte on at once instead of line by line: for an interactive console."""
        lib.kh_serial_set_unbuffered(self.core, int(on))

    def receive(self, data: bytes) -> int:
        """Give input to the guest; waits while it does not read.

        :return: bytes taken: fewer only after :meth:`stop_input`
        """
        return int(lib.kh_serial_receive(self.core, data, len(data)))

    def stop_input(self) -> None:
        """Accept no more input; calls that wait in :meth:`receive` return."""
        lib.kh_serial_stop_input(self.core)

    def read(self, offset: int, size: int = 1) -> int:
        """Read a register, as a guest does."""
        return int(lib.kh_serial_in(self.core, offset))

    def write_register(self, offset: int, value: int) -> None:
        """Write a register, as a guest does."""
        lib.kh_serial_out(self.core, offset, value)

    def save(self) -> dict[str, Any]:
        """Return registers and unread input as JSON takes them."""
        state = ffi.new("struct kh_serial_state *")
        waiting = ffi.new("uint8_t[]", lib.KH_SERIAL_INPUT)
        n_bytes = lib.kh_serial_save(self.core, state, waiting)
        registers: dict[str, Any] = {name: int(getattr(state, name)) for name in _REGISTERS}
        return registers | {"input": bytes(ffi.buffer(waiting, n_bytes)).hex()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a state from :meth:`save`."""
        registers = {name: int(state[name]) for name in _REGISTERS}
        waiting = bytes.fromhex(state["input"])
        raw = ffi.new("struct kh_serial_state *", registers)
        lib.kh_serial_load(self.core, raw, waiting, len(waiting))

    def flush(self, stall_s: float = 1.0, total_s: float = 10.0) -> int:
        """Send incomplete lines, and wait until all output is written.

        :param stall_s: maximum time without progress on the descriptor
        :param total_s: maximum total time
        :return: bytes that are not written yet
        """
        lib.kh_serial_flush(self.core)
        deadline = time.monotonic() + total_s
        while lib.kh_serial_drain(self.core, _SLICE_NS):
            blocked_s = lib.kh_serial_output(self.core).blocked_ns / 1e9
            if blocked_s >= stall_s or time.monotonic() >= deadline:
                break
        return int(lib.kh_serial_output(self.core).waiting)

    def close(self) -> None:
        """Stop writing and close the descriptor; unwritten output counts as lost."""
        lib.kh_serial_stop_output(self.core)

    def text(self) -> str:
        """Return what the guest has sent, up to the size of the log."""
        buffer = ffi.new("char[]", self._log_bytes)
        n_bytes = lib.kh_serial_read_log(self.core, buffer, self._log_bytes)
        return bytes(ffi.buffer(buffer, n_bytes)).decode("utf-8", "replace")

    @property
    def n_bytes(self) -> int:
        """Bytes that the guest has sent."""
        return int(lib.kh_serial_counts(self.core).bytes)

    @property
    def lost_bytes(self) -> int:
        """Bytes that were dropped: not read in time, or not writable."""
        return int(lib.kh_serial_output(self.core).dropped)

    @property
    def write_error(self) -> int:
        """Errno of the last failed write; 0: none."""
        return int(lib.kh_serial_output(self.core).error)
