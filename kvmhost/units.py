"""Pages, and amounts with units: the one grammar of command lines, files and queries.

========== ===================================== ========================================
type       written                               value
========== ===================================== ========================================
`Bytes`    ``96M``, ``1.5GiB``, ``8192pages``,   bytes; K, M, G, T (also KB, KiB) are
           ``65536``                             powers of 1024, a page is 4096 bytes
`Seconds`  ``500us``, ``50ms``, ``1s``, ``2m``,  seconds; a bare number is seconds, and
           ``1h``, ``0.5``                       ``min`` is ``m``
`Share`    ``12.5%``, ``1/8``, ``0.125``         1 is all; a bare number is never percent
`Mark`     a size or a share                     a bare integer is bytes, ``0.5`` a share
`MaxShare` a share, or ``off``                   ``off`` is infinite
========== ===================================== ========================================

The same text means the same on a command line, in a file of the daemon, in a query of a
control socket and in a parameter of a guest. Reading the output of ``str()`` gives the same
value again. Each value is bounded when it is read, so that arithmetic on it neither
overflows nor becomes infinite: sizes to the 52 bits of a physical address, times to a day,
shares to 10,000 times 100 %.
"""

from __future__ import annotations

import math
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
    "MaxShare",
    "Seconds",
    "Share",
    "read_amount",
    "size_text",
    "write_amount",
]

#: A page of guest memory, and of the x86 host.
PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
#: A huge page: what one entry of a level-2 table maps.
HUGE_PAGE_BYTES = 2 << 20

#: The largest size, time and share that are accepted.
MAX_BYTES = 1 << 52
MAX_SECONDS = 86400
MAX_SHARE = 10_000
#: Maximum length of the text of an amount; parsing digits takes quadratic time.
_MAX_CHARACTERS = 64

_BINARY = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
#: Only an amount with a unit may have decimals: 0.5 is a share.
_SIZE = re.compile(
    r"([0-9]+)(?:\.([0-9]+)(?=\s*[KMGTP]))?\s*(?:([KMGT]?)(?:i?B)?|(pages?))",
    re.ASCII | re.IGNORECASE,
)
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(us|ms|s|min|m|h)?", re.ASCII)
_SECONDS = {"us": "0.000001", "ms": "0.001", "s": "1", "m": "60", "min": "60", "h": "3600"}
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%)?|([0-9]+)/([0-9]+)", re.ASCII)

_SIZES = "256M, 1.5GiB, 8192pages or 65536"
_TIMES = "500ms, 1s, 2m or 1h"
_SHARES = "12.5%, 1/8 or 0.125"


class Bytes(int):
    """A size in bytes."""

    @classmethod
    def parse(cls, given: object) -> Bytes:
        """Read ``96M``, ``1.5GiB``, ``8192pages`` or a number of bytes.

        :raises ValueError: for anything else, and for a part of a byte
        """
        if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
            return cls(_at_most(given, MAX_BYTES, "size", "4096T"))
        match = _match(_SIZE, given)
        if match is None:
            raise _invalid("size", given, _SIZES)
        whole, decimals, letter, pages = match[1], match[2] or "", match[3] or "", match[4]
        bits = PAGE_SHIFT if pages else _BINARY[letter.upper()]
        size, rest = divmod(int(whole + decimals) << bits, 10 ** len(decimals))
        if rest:
            raise ValueError(f"invalid size {_shown(given)}: not a whole number of bytes")
        return cls(_at_most(size, MAX_BYTES, "size", "4096T"))

    def __str__(self) -> str:
        for letter, bits in reversed(_BINARY.items()):
            if self and self % (1 << bits) == 0:
                return f"{self >> bits}{letter}"
        return f"{int(self)}"


class Seconds(float):
    """A span of time in seconds."""

    @classmethod
    def parse(cls, given: object) -> Seconds:
        """Read ``50ms``, or a number of seconds.

        :raises ValueError: for anything else
        """
        match = _match(_TIME, _plain(given))
        if match is None:
            raise _invalid("time", given, _TIMES)
        seconds = Decimal(match[1]) * Decimal(_SECONDS[match[2] or "s"])
        return cls(_at_most(seconds, MAX_SECONDS, "time", "24h"))

    def __str__(self) -> str:
        return f"{Decimal(repr(float(self))).normalize():f}s"


class Share(float):
    """A fraction of a total: 1 is all of it."""

    @classmethod
    def parse(cls, given: object) -> Share:
        """Read ``12.5%``, ``1/8`` or ``0.125``; only the first two may be more than 1.

        :raises ValueError: for anything else
        """
        match = _match(_SHARE, _plain(given))
        if match is None or (match[4] and not int(match[4])):
            raise _invalid("share", given, _SHARES)
        if match[4]:
            return cls(_at_most(_ratio(match[3], match[4]), MAX_SHARE, "share", _MOST_SHARE))
        # In decimals: the written text must read as the same number.
        number = Decimal(match[1])
        if not match[2] and number > 1:
            raise ValueError(
                f"invalid share {_shown(given)}: a bare number is at most 1, which is 100%; "
                f"write {_SHARES}"
            )
        share = number / 100 if match[2] else number
        return cls(_at_most(share, MAX_SHARE, "share", _MOST_SHARE))

    def __str__(self) -> str:
        return f"{(Decimal(repr(float(self))) * 100).normalize():f}%"


class MaxShare(Share):
    """A share that something must not exceed; infinite where there is no bound."""

    @classmethod
    def parse(cls, given: object) -> MaxShare:
        """Read a share, or ``off``.

        :raises ValueError: for anything else
        """
        if given == "off":
            return cls(math.inf)
        if _match(_SHARE, _plain(given)) is None:
            raise _invalid("share", given, f"{_SHARES}, or off")
        return cls(Share.parse(given))

    def __str__(self) -> str:
        return super().__str__() if math.isfinite(self) else "off"


_MOST_SHARE = f"{100 * MAX_SHARE}%"


class Mark:
    """A share of a total, or bytes: exactly one of the two is not None."""

    def __init__(self, *, size: Bytes | None = None, share: Share | None = None) -> None:
        self.size, self.share = size, share

    @classmethod
    def parse(cls, given: object) -> Mark:
        """Read a size or a share: ``80M``, ``90%``, ``1/8``, ``0.5``.

        :raises ValueError: for anything else, and for shares of 0 or more than 100 %
        """
        if isinstance(given, int) or _match(_SIZE, given):
            return cls(size=Bytes.parse(given))
        if _match(_SHARE, _plain(given)) is None:
            raise _invalid("size or share", given, "256M, 1.5GiB, 12.5%, 1/8 or 0.125")
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


def _plain(given: object) -> object:
    """Return the text of a number in decimals, and anything else as it is."""
    if isinstance(given, bool) or not isinstance(given, int | float) or abs(given) > MAX_BYTES:
        return given
    return f"{Decimal(repr(given)):f}"


def _ratio(part: str, whole: str) -> float:
    try:
        return int(part) / int(whole)
    except OverflowError:
        return math.inf


def _invalid(what: str, given: object, accepted: str) -> ValueError:
    return ValueError(f"invalid {what} {_shown(given)}; write {accepted}")


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


def read_amount(kind: type, given: Any) -> Any:
    """Read an amount of a kind: the hook of a msgspec decoder.

    :raises ValueError: if the text is malformed
    """
    if issubclass(kind, _KINDS):
        return kind.parse(given)
    raise NotImplementedError(kind)


def write_amount(amount: Any) -> str:
    """Return the text of an amount: the hook of a msgspec encoder."""
    if isinstance(amount, _KINDS):
        return str(amount)
    raise NotImplementedError(type(amount))


def size_text(n_bytes: float) -> str:
    """Return a size in a suitable unit, such as ``12.3 MiB``, to be read by people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
