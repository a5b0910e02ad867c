"""Compare two views of the same windows, and classify their differences by cause.

The windows of two records are compared in order. A page that is young in only one of
them is attributed to the first cause that applies:

======================  ===============================================================
cause                   the page
======================  ===============================================================
``outside``             was not harvested in the other view
``coarse``              comes from a leaf larger than a page
``tables``              holds the guest's page tables or parameters: a page walk sets the
                        accessed bit in the host's tables but not in the guest's own
``reads``               is missing from a view that tracks only writes
``early``, ``late``     is young in the other view one window later or earlier: an access
                        at the edge of a window, or one that was reported late
``around``              lies in an aligned 64 KiB in which the other view has a young
                        page: fault-around, or a granularity above the page size
``unexplained``         has none of these causes
======================  ===============================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import LayoutError

__all__ = ["CAUSES", "Difference", "TrackerView", "compare_views", "total"]

CAUSES = ("outside", "coarse", "tables", "reads", "early", "late", "around", "unexplained")
_AROUND_PAGES = 16

Bits = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class TrackerView:
    """The windows of one tracker or table format.

    :param only_writes: the tracker does not report reads
    """

    name: str
    windows: Iterable[YoungBitmap]
    only_writes: bool = False


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of one window, or of several. ``extra`` and ``missing`` are by cause.

    :param extra: pages young in this view and not in the reference
    :param missing: pages young in the reference and not in this view
    """

    windows: int
    reference_pages: int
    pages: int
    both_pages: int
    extra: dict[str, int]
    missing: dict[str, int]

    @property
    def precision(self) -> float:
        """Share of the reported pages that are young in the reference."""
        return self.both_pages / self.pages if self.pages else 1.0

    @property
    def recall(self) -> float:
        """Share of the pages young in the reference that were reported."""
        return self.both_pages / self.reference_pages if self.reference_pages else 1.0

    @property
    def jaccard(self) -> float:
        """Pages young in both as a share of pages young in either."""
        either = self.pages + self.reference_pages - self.both_pages
        return self.both_pages / either if either else 1.0


def compare_views(
    reference: TrackerView, other: TrackerView, tables: Sequence[tuple[int, int]] = ()
) -> Iterator[Difference]:
    """Yield the difference of each window that is in both views.

    :param tables: ranges of gfns that hold the guest's page tables and parameters
    :raises LayoutError: if they have no pages in common
    """
    before: tuple[Bits, Bits] | None = None
    held: tuple[YoungBitmap, YoungBitmap] | None = None
    for pair in zip(reference.windows, other.windows, strict=False):
        if held is not None:
            after = _aligned(*pair)[:2]
            yield _difference(*held, before, after, reference, other, tables)
            before = _aligned(*held)[:2]
        held = pair
    if held is not None:
        yield _difference(*held, before, None, reference, other, tables)


def total(parts: Iterable[Difference]) -> Difference:
    """Sum the differences of windows."""
    parts = list(parts)

    def causes(side: str) -> dict[str, int]:
        sums = {cause: sum(getattr(part, side)[cause] for part in parts) for cause in CAUSES}
        return dict(sums)

    return Difference(
        windows=sum(part.windows for part in parts),
        reference_pages=sum(part.reference_pages for part in parts),
        pages=sum(part.pages for part in parts),
        both_pages=sum(part.both_pages for part in parts),
        extra=causes("extra"),
        missing=causes("missing"),
    )


def _aligned(a: YoungBitmap, b: YoungBitmap) -> tuple[Bits, Bits, Bits, Bits, Bits, Bits]:
    """Return, over the pages of both: young bits, harvested pages, coarse bits."""
    start = min(a.gfn_start, b.gfn_start)
    end = max(a.gfn_start + a.n_pages, b.gfn_start + b.n_pages)
    if a.gfn_start + a.n_pages <= b.gfn_start or b.gfn_start + b.n_pages <= a.gfn_start:
        raise LayoutError(f"compare: {a!r} and {b!r} have no pages in common")
    shape = (2, end - start)
    young, seen, coarse = (np.zeros(shape, dtype=bool) for _ in range(3))
    for row, bitmap in enumerate((a, b)):
        part = slice(bitmap.gfn_start - start, bitmap.gfn_start - start + bitmap.n_pages)
        young[row, part] = bitmap.as_bool()
        seen[row, part] = True
        coarse[row, part] = bitmap.coarse_as_bool()
    return young[0], young[1], seen[0], seen[1], coarse[0], coarse[1]


def _difference(
    a: YoungBitmap,
    b: YoungBitmap,
    before: tuple[Bits, Bits] | None,
    after: tuple[Bits, Bits] | None,
    reference: TrackerView,
    other: TrackerView,
    tables: Sequence[tuple[int, int]],
) -> Difference:
    in_a, in_b, seen_a, seen_b, rough_a, rough_b = _aligned(a, b)
    none = np.zeros_like(in_a)
    own, start = none.copy(), min(a.gfn_start, b.gfn_start)
    for first, end in tables:
        own[max(first - start, 0) : max(end - start, 0)] = True

    def beside(pair: tuple[Bits, Bits] | None, which: int) -> Bits:
        if pair is None or pair[which].size != in_a.size:
            return none
        return pair[which]

    def split(
        bits: Bits, them: Bits, seen: Bits, rough: Bits, which: int, blind: bool
    ) -> dict[str, int]:
        rules = {
            "outside": ~seen,
            "coarse": rough,
            "tables": own,
            "reads": np.full_like(none, blind),
            "early": beside(after, which),
            "late": beside(before, which),
            "around": _spread(them),
            "unexplained": np.ones_like(none),
        }
        found = {}
        for cause in CAUSES:
            fits = bits & rules[cause]
            found[cause] = int(fits.sum())
            bits = bits & ~fits
        return found

    return Difference(
        windows=1,
        reference_pages=int(in_a.sum()),
        pages=int(in_b.sum()),
        both_pages=int((in_a & in_b).sum()),
        extra=split(in_b & ~in_a, in_a, seen_a, rough_b, 0, reference.only_writes),
        missing=split(in_a & ~in_b, in_b, seen_b, rough_a, 1, other.only_writes),
    )


def _spread(bits: Bits) -> Bits:
    """Return the pages of every aligned 64 KiB that contains a set bit."""
    padded = np.zeros(-(-bits.size // _AROUND_PAGES) * _AROUND_PAGES, dtype=bool)
    padded[: bits.size] = bits
    blocks = padded.reshape(-1, _AROUND_PAGES).any(axis=1)
    return np.repeat(blocks, _AROUND_PAGES)[: bits.size]
