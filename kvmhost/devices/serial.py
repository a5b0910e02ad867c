"""The transmit half of a 16550 serial port, in C."""

from __future__ import annotations

from kvmhost._ffi import ffi, lib

__all__ = ["Serial"]


class Serial:
    """Where a guest's output goes.

    :param fd: descriptor that gets the output, line by line; -1 for none
    :param log_bytes: how many bytes from the start are kept for :meth:`text`
    """

    def __init__(self, fd: int = -1, log_bytes: int = 1 << 16) -> None:
        self._log_bytes = log_bytes
        # SAFETY: freed by ffi.gc when this object and every bus that holds it are gone.
        self.core = ffi.gc(lib.kh_serial_new(fd, log_bytes), lib.kh_serial_free)
        if self.core == ffi.NULL:
            raise MemoryError(f"serial log of {log_bytes} bytes")

    def write(self, data: bytes) -> None:
        """Transmit bytes, as a guest does."""
        lib.kh_serial_write(self.core, data, len(data))

    def flush(self) -> None:
        """Send what waits for the end of its line."""
        lib.kh_serial_flush(self.core)

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
        """Bytes that the descriptor did not take."""
        return int(lib.kh_serial_counts(self.core).lost)
