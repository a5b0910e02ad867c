"""Per-gfn young bitmaps: one bit per guest page, as in KVM's dirty log.

Bit ``i`` of word ``w`` is page ``64 * w + i`` counted from ``gfn_start``; words
are 64 bits wide and little-endian. Bits at and after ``n_pages`` are 0.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost.errors import LayoutError

__all__ = [
    "Provenance",
    "Words",
    "YoungBitmap",
    "clear_words",
    "n_words",
    "pack",
    "place_words",
    "sub_words",
    "unpack",
]

Words = npt.NDArray[np.uint64]


def n_words(n_pages: int) -> int:
    """Return how many 64-bit words hold ``n_pages`` bits."""
    return (n_pages + 63) // 64


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The origin of a bitmap: tracker, table format, window, and evidence.

    ``window_start_ns`` and ``window_end_ns`` are ``CLOCK_MONOTONIC`` times: the end of the
    harvest before this one (0 if there was none) and of this one. ``evidence`` says by which
    experiment, and with what result, the tracker found that cleared bits are set again on this
    host; it is empty for trackers that need none.
    """

    tracker: str = "unknown"
    table_format: str = "none"
    window_start_ns: int = 0
    window_end_ns: int = 0
    evidence: str = ""

    def joined(self, other: Provenance) -> Provenance:
        """Return where the bits of two bitmaps come from, ``mixed`` where that differs."""
        return Provenance(
            self.tracker if self.tracker == other.tracker else "mixed",
            self.table_format if self.table_format == other.table_format else "mixed",
            min(self.window_start_ns, other.window_start_ns),
            max(self.window_end_ns, other.window_end_ns),
            self.evidence if self.evidence == other.evidence else "mixed",
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class YoungBitmap:
    """Which pages of ``[gfn_start, gfn_start + n_pages)`` were young.

    It is a set of gfns: ``len``, ``in``, iteration, truth and ``& | ^ -`` are those of
    the young gfns, and ``~`` has the others of the range. Operators take two bitmaps of
    one range and raise ``LayoutError`` for different ranges: a bitmap has no information on
    pages outside its range. Two bitmaps are equal if their ranges and young pages are.
    ``np.asarray`` has one boolean for each page of the range.

    :param words: shape ``(ceil(n_pages / 64),)``, ``uint64``
    :param coarse: same shape; bits that come from a leaf larger than one page,
        which do not describe the single page. ``None`` if there are none
    """

    gfn_start: int
    n_pages: int
    words: Words
    coarse: Words | None = None
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        for name in ("words", "coarse"):
            words = getattr(self, name)
            if words is not None and words.shape != (n_words(self.n_pages),):
                raise LayoutError(
                    f"bitmap {name}: shape {words.shape} for {self.n_pages} pages, "
                    f"need ({n_words(self.n_pages)},)"
                )

    def __len__(self) -> int:
        """Return the number of young pages, as of a set; :attr:`n_pages` is the range's."""
        return self.count()

    def __bool__(self) -> bool:
        """Whether any page was young."""
        return bool(self.words.any())

    def __iter__(self) -> Iterator[int]:
        """Yield the young gfns, ascending."""
        return iter(self.gfns().tolist())

    def __contains__(self, gfn: object) -> bool:
        """Whether a page was young; False outside the range."""
        if not isinstance(gfn, int | np.integer) or not 0 <= gfn - self.gfn_start < self.n_pages:
            return False
        word, bit = divmod(int(gfn) - self.gfn_start, 64)
        return bool(int(self.words[word]) >> bit & 1)

    def __getitem__(self, where: slice) -> YoungBitmap:
        """Return a part: ``bitmap[a:b]`` is pages ``[gfn_start + a, gfn_start + b)``.

        :param where: offsets from ``gfn_start``, as a list takes them
        :raises LayoutError: for a step
        :raises TypeError: for a single offset; use ``gfn in bitmap``
        """
        if not isinstance(where, slice):
            raise TypeError(f"a YoungBitmap takes a slice of offsets, not {where!r}; ask: gfn in")
        start, end, step = where.indices(self.n_pages)
        if step != 1:
            raise LayoutError(f"a YoungBitmap takes no step, and here it is {step}")
        count = max(0, end - start)
        coarse = None
        if self.coarse is not None:
            coarse = sub_words(self.coarse, self.n_pages, start, count).copy()
        words = sub_words(self.words, self.n_pages, start, count).copy()
        return YoungBitmap(self.gfn_start + start, count, words, coarse, self.provenance)

    # -- as sets of young pages -------------------------------------------------

    def __and__(self, other: YoungBitmap) -> YoungBitmap:
        """Pages young in both; coarse where either bit is."""
        if not isinstance(other, YoungBitmap):
            return NotImplemented
        both = self.words & other.words
        return self._combined(other, both, both & (self._coarse_words | other._coarse_words))

    def __or__(self, other: YoungBitmap) -> YoungBitmap:
        """Pages young in either; coarse where no bitmap saw the single page."""
        if not isinstance(other, YoungBitmap):
            return NotImplemented
        exact = self.words & ~self._coarse_words | other.words & ~other._coarse_words
        return self._combined(other, self.words | other.words, ~exact)

    def __xor__(self, other: YoungBitmap) -> YoungBitmap:
        """Pages young in just one; coarse where that one's bit is."""
        if not isinstance(other, YoungBitmap):
            return NotImplemented
        coarse = self.words & self._coarse_words | other.words & other._coarse_words
        return self._combined(other, self.words ^ other.words, coarse)

    def __sub__(self, other: YoungBitmap) -> YoungBitmap:
        """Pages young here and not there; coarse where the bit here is."""
        if not isinstance(other, YoungBitmap):
            return NotImplemented
        return self._combined(other, self.words & ~other.words, self._coarse_words)

    def __invert__(self) -> YoungBitmap:
        """Pages of the range that were not young; none of them is coarse."""
        end = np.full(self.words.size, ~np.uint64(0), dtype=np.uint64)
        inverted = sub_words(end & ~self.words, self.words.size * 64, 0, self.n_pages)
        return YoungBitmap(self.gfn_start, self.n_pages, inverted, None, self.provenance)

    @property
    def _coarse_words(self) -> Words:
        return np.zeros_like(self.words) if self.coarse is None else self.coarse

    def _combined(self, other: YoungBitmap, words: Words, coarse: Words) -> YoungBitmap:
        """Return the result of an operator.

        :raises LayoutError: if the two are of different ranges
        """
        if (self.gfn_start, self.n_pages) != (other.gfn_start, other.n_pages):
            raise LayoutError(f"{self!r} and {other!r} are of different ranges")
        kept = None
        if self.coarse is not None or other.coarse is not None:
            kept = words & coarse
        source = self.provenance.joined(other.provenance)
        return YoungBitmap(self.gfn_start, self.n_pages, words, kept, source)

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """Return :meth:`as_bool`, for ``np.asarray``.

        :raises ValueError: for ``copy=False``: bits have to be unpacked
        """
        if copy is False:
            raise ValueError("a YoungBitmap holds bits: an array of its pages is a copy")
        return self.as_bool() if dtype is None else self.as_bool().astype(dtype)

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        end, source = self.gfn_start + self.n_pages, self.provenance
        window_ms = (source.window_end_ns - source.window_start_ns) / 1e6
        rows = {
            "gfns": f"[{self.gfn_start:#x}, {end:#x})",
            "young": f"{self.count()} of {self.n_pages} pages",
            "coarse": f"{int(self.coarse_as_bool().sum())} pages",
            "tracker": source.tracker,
            "table format": source.table_format,
            "window": f"{window_ms:.1f} ms" if source.window_start_ns else "since the start",
        }
        body = "".join(
            f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items()
        )
        return f"<table>{body}</table>"

    @classmethod
    def from_gfns(
        cls, gfn_start: int, n_pages: int, gfns: npt.ArrayLike, **fields: Any
    ) -> YoungBitmap:
        """Build a bitmap from a list of young gfns, in any order.

        :raises LayoutError: if a gfn lies outside the range
        """
        bits = np.zeros(n_words(n_pages) * 64, dtype=bool)
        index = np.asarray(gfns, dtype=np.int64) - gfn_start
        if index.size and (index.min() < 0 or index.max() >= n_pages):
            raise LayoutError(f"gfn outside [{gfn_start:#x}, {gfn_start + n_pages:#x})")
        bits[index] = True
        return cls(gfn_start, n_pages, pack(bits), **fields)

    def as_bool(self) -> npt.NDArray[np.bool_]:
        """Return shape ``(n_pages,)``: True where the page was young."""
        return unpack(self.words, self.n_pages)

    def coarse_as_bool(self) -> npt.NDArray[np.bool_]:
        """Return shape ``(n_pages,)``: True where the bit came from a larger leaf."""
        if self.coarse is None:
            return np.zeros(self.n_pages, dtype=bool)
        return unpack(self.coarse, self.n_pages)

    def gfns(self) -> npt.NDArray[np.int64]:
        """Return the young gfns, ascending."""
        return np.flatnonzero(self.as_bool()).astype(np.int64) + self.gfn_start

    def count(self) -> int:
        """Return the number of young pages."""
        return (
            int(np.bitwise_count(self.words).sum())
            if hasattr(np, "bitwise_count")
            else int(self.as_bool().sum())
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, YoungBitmap):
            return NotImplemented
        return (
            self.gfn_start == other.gfn_start
            and self.n_pages == other.n_pages
            and bool(np.array_equal(self.words, other.words))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"YoungBitmap([{self.gfn_start:#x}, {self.gfn_start + self.n_pages:#x}), "
            f"{self.count()} young, {self.provenance.tracker}/{self.provenance.table_format})"
        )


def pack(bits: npt.NDArray[np.bool_]) -> Words:
    """Pack booleans into little-endian 64-bit words, padded with 0."""
    padded = np.zeros(n_words(bits.size) * 64, dtype=bool)
    padded[: bits.size] = bits
    return np.packbits(padded, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def unpack(words: Words, n_pages: int) -> npt.NDArray[np.bool_]:
    """Unpack words into ``n_pages`` booleans."""
    raw = words.astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(raw, count=n_pages, bitorder="little").astype(bool)


def sub_words(words: Words, n_pages: int, first: int, count: int) -> Words:
    """Return the bits ``[first, first + count)`` of a bitmap as words of their own."""
    if first == 0 and count == n_pages:
        return words
    low, shift = first // 64, np.uint64(first % 64)
    size = n_words(count)
    cut = words[low : low + size] >> shift
    if shift:
        following = words[low + 1 : low + 1 + size]
        cut[: following.size] |= following << np.uint64(64 - int(shift))
    if count % 64:
        cut[-1] &= np.uint64((1 << count % 64) - 1)
    return cut


def place_words(into: Words, first: int, words: Words) -> None:
    """Set the bits of ``words`` in ``into``, from bit ``first`` on; both end in zeros."""
    low, shift = first // 64, np.uint64(first % 64)
    into[low : low + words.size] |= words << shift
    if shift:
        above = into[low + 1 : low + 1 + words.size]
        above |= words[: above.size] >> np.uint64(64 - int(shift))


def clear_words(into: Words, first: int, words: Words) -> None:
    """Clear the bits of ``words`` in ``into``, from bit ``first`` on."""
    there = np.zeros(words.size + 1, dtype=np.uint64)
    place_words(there, first % 64, words)
    part = into[first // 64 : first // 64 + there.size]
    part &= ~there[: part.size]
