"""Pages, and amounts with units as written in a configuration and on a command line.

=========== ============================= ===========================================
type        written                       value
=========== ============================= ===========================================
`Bytes`     ``96M``, ``1GiB``, ``4096``   bytes; K, M, G, T are powers of 1024
`Seconds`   ``50ms``, ``1s``, ``2min``    seconds; a bare number only on a command line
`Share`     ``0.2%``, ``90%``, ``1/8``    1 is 100 %
`Mark`      ``90%``, ``80M``              a share of something, or bytes
=========== ============================= ===========================================

Reading the output of ``str()`` gives the same value again. Each value is bounded when it
is read, so that arithmetic on it neither overflows nor becomes infinite:
sizes to the 52 bits of a physical address, times to a day, shares to 10,000 times 100 %.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, TypeVar

__all__ = [
    "MAX_BYTES",
    "MAX_SECONDS",
    "MAX_SHARE",
    "PAGE_BYTES",
    "PAGE_SHIFT",
    "Bytes",
    "Mark",
    "Seconds",
    "Share",
    "read_amount",
    "write_amount",
]

#: A page of guest memory, and of the x86 host.
PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT

#: The largest size, time and share that are accepted.
MAX_BYTES = 1 << 52
MAX_SECONDS = 86400
MAX_SHARE = 10_000
#: Maximum length of the text of an amount; parsing digits takes quadratic time.
_MAX_CHARACTERS = 64

_BINARY = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"([0-9]+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(us|ms|s|min|h)?")
_SECONDS = {"us": "0.000001", "ms": "0.001", "s": "1", "min": "60", "h": "3600"}
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%|([0-9]+)/([0-9]+)")


class Bytes(int):
    """A size in bytes."""

    @classmethod
    def parse(cls, given: object) -> Bytes:
        """Read ``96M`` or a number of bytes.

        :raises ValueError: for anything else
        """
        if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
            return cls(_at_most(given, MAX_BYTES, "size", "4096T"))
        match = _match(_SIZE, given)
        if match is None:
            raise ValueError(f"invalid size {_shown(given)}; write 65536, 256M or 1G")
        size = int(match[1]) << _BINARY[match[2].upper()]
        return cls(_at_most(size, MAX_BYTES, "size", "4096T"))

    def __str__(self) -> str:
        for letter, bits in reversed(_BINARY.items()):
            if self and self % (1 << bits) == 0:
                return f"{self >> bits}{letter}"
        return f"{int(self)}"


class Seconds(float):
    """A span of time in seconds."""

    @classmethod
    def parse(cls, given: object, bare: bool = False) -> Seconds:
        """Read ``50ms``.

        :param bare: take a number without a unit as seconds
        :raises ValueError: for anything else
        """
        match = _match(_TIME, given)
        if match is None or not (match[2] or bare):
            raise ValueError(f"invalid time {_shown(given)}; write 50ms, 1s or 2min")
        seconds = Decimal(match[1]) * Decimal(_SECONDS[match[2] or "s"])
        return cls(_at_most(seconds, MAX_SECONDS, "time", "24h"))

    def __str__(self) -> str:
        return f"{Decimal(repr(float(self))).normalize():f}s"


class Share(float):
    """A fraction of a total: 1 is all of it."""

    @classmethod
    def parse(cls, given: object) -> Share:
        """Read ``0.2%`` or ``1/8``.

        :raises ValueError: for anything else
        """
        match = _match(_SHARE, given)
        if match is None or (match[3] and not int(match[3])):
            raise ValueError(f"invalid share {_shown(given)}; write for example 90% or 1/8")
        # In decimals: the written text must read as the same number.
        share = int(match[2]) / int(match[3]) if match[3] else Decimal(match[1]) / 100
        return cls(_at_most(share, MAX_SHARE, "share", f"{100 * MAX_SHARE}%"))

    def __str__(self) -> str:
        return f"{(Decimal(repr(float(self))) * 100).normalize():f}%"


class Mark:
    """A share of a total, or bytes: exactly one of the two is not None."""

    def __init__(self, *, size: Bytes | None = None, share: Share | None = None) -> None:
        self.size, self.share = size, share

    @classmethod
    def parse(cls, given: object) -> Mark:
        """Read ``90%`` or ``80M``.

        :raises ValueError: for anything else, and for shares of 0 or more than 100 %
        """
        if not (isinstance(given, str) and given.strip().endswith("%")):
            return cls(size=Bytes.parse(given))
        share = Share.parse(given)
        if not 0 < share <= 1:
            raise ValueError(f"{_shown(given)}: need a share above 0 and up to 100%")
        return cls(share=share)

    def of(self, total_bytes: int) -> int:
        """Return it in bytes."""
        return int(total_bytes * self.share) if self.share is not None else int(self.size or 0)

    def __bool__(self) -> bool:
        return bool(self.size or self.share)

    def __str__(self) -> str:
        return str(self.size if self.share is None else self.share)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark) and (self.size, self.share) == (other.size, other.share)

    def __hash__(self) -> int:
        return hash((self.size, self.share))


_N = TypeVar("_N", bound="int | float | Decimal")


def _match(pattern: re.Pattern[str], given: object) -> re.Match[str] | None:
    """Match a text of a bounded length; None for anything else."""
    if not isinstance(given, str) or len(given) > _MAX_CHARACTERS:
        return None
    return pattern.fullmatch(given.strip())


def _at_most(value: _N, most: int, what: str, written: str) -> _N:
    if value > most:
        raise ValueError(f"{what} is too large: at most {written}")
    return value


def _shown(given: object) -> str:
    """Return a value for a message, cut short; the decimals of a large int are never made."""
    if isinstance(given, int) and abs(given) > MAX_BYTES:
        return f"of {given.bit_length()} bits"
    text = given[:_MAX_CHARACTERS] if isinstance(given, str) else given
    shown = repr(text)[: _MAX_CHARACTERS + 2]
    return f"{shown}..." if isinstance(given, str) and len(given) > _MAX_CHARACTERS else shown


_KINDS = (Bytes, Seconds, Share, Mark)


def read_amount(kind: type, given: Any, bare: bool = False) -> Any:
    """Read an amount of a kind: the hook of a msgspec decoder.

    :raises ValueError: if the text is malformed
    """
    if kind is Seconds:
        return Seconds.parse(given, bare)
    if kind in _KINDS:
        return kind.parse(given)
    raise NotImplementedError(kind)


def write_amount(amount: Any) -> str:
    """Return the text of an amount: the hook of a msgspec encoder."""
    if isinstance(amount, _KINDS):
        return str(amount)
    raise NotImplementedError(type(amount))
