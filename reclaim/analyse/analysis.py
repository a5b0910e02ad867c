"""Working set, cold pages, promotions and reuse of a recorded VM.

All of these are computed from two histograms per window
(:mod:`kvmhost.reclaim.record.summary`). A record stores them for all its pages; for a part
of the pages they are computed again from the bits. A page is *cold* at a threshold of
``w`` windows if it was not young in the last ``w`` windows; a *promotion* is a cold page
that becomes young. Thresholds and windows are exact for the values in
:data:`~kvmhost.reclaim.record.meta.UPPER` (1 to 64, then eight per octave); others are
rounded to the nearest of these.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import n_words
from kvmhost.errors import LayoutError
from kvmhost.reclaim.record.clock import elapsed_s, interval_s
from kvmhost.reclaim.record.meta import MIN_CHUNK_PAGES, UPPER
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.summary import RunningAges

__all__ = [
    "Histograms",
    "Saving",
    "Threshold",
    "age_table",
    "histograms",
    "miss_ratio_curve",
    "nearest_window",
    "predict_saving",
    "promotion_curve",
    "working_set",
]

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Histograms:
    """Rows of ``reuse`` and ``ages`` for some windows of a record.

    :param first: number of the first window
    :param n_pages: shape ``(windows,)``: pages that were harvested
    :param seconds: end of each window, on the record's time axis
    :param interval_s: planned length of a window
    """

    first: int
    reuse: Counts
    ages: Counts
    n_pages: Counts
    seconds: npt.NDArray[np.float64]
    interval_s: float
    page_bytes: int

    def __len__(self) -> int:
        return int(self.reuse.shape[0])

    def __repr__(self) -> str:
        n_pages = int(self.n_pages[-1]) if len(self) else 0
        return (
            f"Histograms(windows [{self.first}, {self.first + len(self)}) of "
            f"{self.interval_s:g} s, {n_pages} pages)"
        )


def histograms(
    record: YoungRecord,
    first: int = 0,
    end: int | None = None,
    gfns: tuple[int, int] | None = None,
) -> Histograms:
    """Return the histograms of windows ``[first, end)``.

    Ages count from the beginning of the record, even if ``first`` is later.

    :param gfns: only pages ``[first gfn, end gfn)``, which reads the bits
    """
    end = len(record) if end is None else end
    if gfns is None:
        reuse = record.histogram("reuse", first, end)
        ages = record.histogram("ages", first, end)
        n_pages = record.column("n_pages")[first:end]
    else:
        reuse, ages, n_pages = _part(record, first, end, gfns)
    return Histograms(
        first, reuse, ages, n_pages, elapsed_s(record)[first:end], interval_s(record),
        record.metadata.page_bytes,
    )  # fmt: skip


def nearest_window(windows: float) -> int:
    """Return the nearest number of windows for which counts are exact."""
    if not windows >= 1:
        raise LayoutError(f"{windows:g} windows: need 1 or more")
    return int(UPPER[1:][np.abs(UPPER[1:] - windows).argmin()])


def working_set(found: Histograms, windows: float) -> Counts:
    """Return shape ``(windows,)``: pages young in the last ``windows`` windows."""
    bucket = int(np.searchsorted(UPPER, nearest_window(windows)))
    pages: Counts = found.ages[:, 1 : bucket + 1].sum(axis=1)
    return pages


def age_table(found: Histograms, at: int = -1) -> Counts:
    """Return shape ``(buckets,)``: pages by age at the end of one of the windows.

    Bucket 0 counts pages that were never young.
    """
    if not len(found):
        return np.zeros(UPPER.size, dtype=np.int64)
    row: Counts = found.ages[at]
    return row


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The effect of treating pages as cold after a number of windows.

    :param cold_pages: mean over the windows, including pages that were never young
    :param never_pages: mean of the pages that were never young
    :param promotions_per_min: cold pages that became young
    :param promotion_rate: promotions per minute, as a share of the working set
    """

    windows: int
    seconds: float
    cold_pages: float
    never_pages: float
    promotions_per_min: float
    promotion_rate: float


def promotion_curve(found: Histograms) -> list[Threshold]:
    """Return the effect of each threshold up to the record's length.

    Only windows that begin late enough for a page to be cold by the threshold are counted;
    in earlier windows long thresholds could not cause promotions.
    """
    curve = []
    minutes = found.interval_s / 60
    # above[b]: pages whose interval is larger than UPPER[b - 1].
    reuse_above = np.cumsum(found.reuse[:, :0:-1], axis=1)[:, ::-1]
    ages_above = np.cumsum(found.ages[:, :0:-1], axis=1)[:, ::-1]
    numbers = np.arange(found.first, found.first + len(found))
    for bucket in range(1, UPPER.size - 1):
        windows = int(UPPER[bucket])
        since = int(np.searchsorted(numbers, windows, side="right"))
        if since >= len(found):
            break
        promoted = reuse_above[since:, bucket].mean() / minutes
        never = found.ages[since:, 0].mean()
        cold = ages_above[since:, bucket].mean() + never
        hot = (found.n_pages[since:]).mean() - cold
        curve.append(
            Threshold(
                windows=windows,
                seconds=windows * found.interval_s,
                cold_pages=float(cold),
                never_pages=float(never),
                promotions_per_min=float(promoted),
                promotion_rate=float(promoted / max(hot, 1.0)),
            )
        )
    return curve


@dataclasses.dataclass(frozen=True)
class Saving:
    """The lowest threshold that meets a promotion target, and the memory it saves.

    :param saved_pages: pages cold by it, including pages that were never young
    """

    target_rate: float
    threshold: Threshold
    saved_pages: float
    saved_share: float


def predict_saving(found: Histograms, target_rate: float = 0.002) -> Saving | None:
    """Return the saving at a promotion target; None if no threshold meets it.

    :param target_rate: promotions per minute, as a share of the working set; 0.2 % is the
        target of software-defined far memory (ASPLOS 2019)
    """
    for threshold in promotion_curve(found):
        if threshold.promotion_rate <= target_rate:
            share = threshold.cold_pages / max(float(found.n_pages.mean()), 1.0)
            return Saving(target_rate, threshold, threshold.cold_pages, share)
    return None


def miss_ratio_curve(found: Histograms) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Estimate reuse distances, and from them the miss ratio of a memory of any size.

    The number of distinct pages touched between two touches of a page that are ``k``
    windows apart is taken to be the mean working set over ``k`` windows (the assumption of
    average eviction times). So reuse times give reuse distances. A bitmap does not
    distinguish touches within one window: sizes below the working set of one window are
    not resolved.

    :return: sizes in pages, ascending, and for each the share of touches (at most one per
        page and window) that would miss in an LRU memory of that size; the first touch of
        a page always misses
    """
    touches = max(int(found.reuse.sum()), 1)
    counts = found.reuse[:, 1:].sum(axis=0)
    per_window = np.cumsum(found.ages[:, 1:], axis=1)
    distance = per_window.mean(axis=0) if len(found) else np.zeros(UPPER.size - 1)
    seen = np.flatnonzero(counts)
    seen = seen[: np.searchsorted(UPPER[1:][seen], max(len(found) + found.first, 1)) + 1]
    sizes = np.concatenate([[0.0], distance[seen]])
    left = np.concatenate([[counts.sum()], counts.sum() - np.cumsum(counts[seen])])
    return sizes, (left + found.reuse[:, 0].sum()) / touches


def _part(
    record: YoungRecord, first: int, end: int, gfns: tuple[int, int]
) -> tuple[Counts, Counts, Counts]:
    """Compute the histograms of a part of the pages from their bits."""
    low, high = gfns
    if not record.gfn_start <= low < high <= record.gfn_end:
        raise LayoutError(
            f"{record.path}: gfns [{low:#x}, {high:#x}) are out of range: "
            f"the record has [{record.gfn_start:#x}, {record.gfn_end:#x})"
        )
    # Whole words are copied; bits outside the range are cleared.
    shift = (low - record.gfn_start) // 64
    words = n_words(high - record.gfn_start) - shift
    mask = np.full(words, ~np.uint64(0))
    mask[0] &= ~np.uint64(0) << np.uint64((low - record.gfn_start) % 64)
    spare = np.uint64(-(high - record.gfn_start) % 64)
    mask[-1] &= ~np.uint64(0) >> spare
    chunk = -(-max(words * 64, MIN_CHUNK_PAGES) // 64) * 64
    ages, rows = RunningAges(chunk), []
    sizes = []
    for bitmap in record.bitmaps(0, end):
        part = bitmap.words[shift : shift + words]
        padded = np.zeros(chunk // 64, dtype=np.uint64)
        padded[: part.size] = part & mask[: part.size]
        looked_at = min(high - record.gfn_start, bitmap.n_pages) - (low - record.gfn_start)
        sizes.append(max(looked_at, 0))
        rows.append(ages.push({0: padded}, sizes[-1]))
    shape = (max(end - first, 0), UPPER.size)
    reuse = np.array([row[0] for row in rows[first:]], dtype=np.int64).reshape(shape)
    aged = np.array([row[1] for row in rows[first:]], dtype=np.int64).reshape(shape)
    return reuse, aged, np.array(sizes[first:], dtype=np.int64)
