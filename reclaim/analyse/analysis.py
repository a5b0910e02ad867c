"""Working set, cold pages, promotions and reuse of a recorded VM.

All of these are computed from two histograms per window
(:mod:`kvmhost.reclaim.record.summary`). A record stores them for all its pages; for a part
of the pages they are computed again from the bits. A page is *cold* at a threshold of
``w`` windows if it was not young in the last ``w`` windows; a *promotion* is a cold page
that becomes young. Thresholds and windows are exact for the values in
:data:`~kvmhost.reclaim.record.meta.UPPER` (1 to 64, then eight per octave); others are
rounded to the nearest of these.

Windows have different lengths where somebody else harvested too, or a harvest was late.
Means over windows weigh each by the time that it covers, and rates are per covered time:
nothing is known about the gaps between windows.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import n_words
from kvmhost.errors import LayoutError
from kvmhost.reclaim.record.clock import elapsed_s, interval_s, starts_s, weighted_mean
from kvmhost.reclaim.record.meta import MIN_CHUNK_PAGES, UPPER
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.summary import RunningAges

__all__ = [
    "Histograms",
    "Saving",
    "Threshold",
    "age_s",
    "age_table",
    "histograms",
    "miss_ratio_curve",
    "nearest_window",
    "predict_saving",
    "promotion_curve",
    "working_set",
    "working_set_over",
]

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Histograms:
    """Rows of ``reuse`` and ``ages`` for some windows of a record.

    :param first: number of the first window
    :param n_pages: shape ``(windows,)``: pages that were harvested
    :param starts_s: start of every window from the first of the record, on its time axis
    :param ends_s: end of every window from the first of the record
    :param interval_s: planned length of a window
    """

    first: int
    reuse: Counts
    ages: Counts
    n_pages: Counts
    starts_s: npt.NDArray[np.float64]
    ends_s: npt.NDArray[np.float64]
    interval_s: float
    page_bytes: int

    @property
    def seconds(self) -> npt.NDArray[np.float64]:
        """Shape ``(windows,)``: end of each window."""
        return self.ends_s[self.first :]

    @property
    def lengths_s(self) -> npt.NDArray[np.float64]:
        """Shape ``(windows,)``: the time that each window covers."""
        return (self.ends_s - self.starts_s)[self.first :]

    @property
    def step_s(self) -> float:
        """The usual time from the end of a window to the end of the next one."""
        steps = np.diff(self.ends_s)
        return float(np.median(steps)) if steps.size else self.interval_s

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
        first, reuse, ages, n_pages, starts_s(record)[:end], elapsed_s(record)[:end],
        interval_s(record), record.metadata.page_bytes,
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


def working_set_over(found: Histograms, seconds: float) -> Counts:
    """Return shape ``(windows,)``: pages young in the last ``seconds`` before each end.

    Those are the windows of which at least half lies in that time, and at least one.
    """
    middles = (found.starts_s + found.ends_s) / 2
    oldest = np.searchsorted(middles, found.seconds - seconds, side="left")
    windows = np.arange(found.first, found.first + len(found)) + 1 - oldest
    above = np.clip(np.searchsorted(UPPER, windows), 1, UPPER.size - 1)
    closer = windows - UPPER[above - 1] < UPPER[above] - windows
    buckets = np.maximum(np.where(closer, above - 1, above), 1)
    below = np.cumsum(found.ages[:, 1:], axis=1)
    pages: Counts = below[np.arange(len(found)), buckets - 1]
    return pages


def age_s(found: Histograms, windows: int) -> float:
    """Return how long ago the last ``windows`` windows began, at the end of the last one."""
    if not found.ends_s.size:
        return windows * found.interval_s
    at = max(found.ends_s.size - windows, 0)
    return float(found.ends_s[-1] - found.starts_s[at])


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

    :param seconds: the time that so many windows usually take
    :param cold_pages: mean over the windows, including pages that were never young
    :param never_pages: mean of the pages that were never young
    :param promotions_per_min: cold pages that became young, per minute that is covered
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
    lengths = found.lengths_s
    # above[b]: pages whose interval is larger than UPPER[b - 1].
    reuse_above = np.cumsum(found.reuse[:, :0:-1], axis=1)[:, ::-1]
    ages_above = np.cumsum(found.ages[:, :0:-1], axis=1)[:, ::-1]
    numbers = np.arange(found.first, found.first + len(found))
    for bucket in range(1, UPPER.size - 1):
        windows = int(UPPER[bucket])
        since = int(np.searchsorted(numbers, windows, side="right"))
        if since >= len(found):
            break
        part = lengths[since:]
        minutes = float(part.sum()) / 60 or part.size * found.interval_s / 60
        promoted = reuse_above[since:, bucket].sum() / minutes
        never = weighted_mean(found.ages[since:, 0], part)
        cold = weighted_mean(ages_above[since:, bucket], part) + never
        hot = weighted_mean(found.n_pages[since:], part) - cold
        curve.append(
            Threshold(
                windows=windows,
                seconds=windows * found.step_s,
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
            pages = float(weighted_mean(found.n_pages, found.lengths_s))
            share = threshold.cold_pages / max(pages, 1.0)
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
    distance = np.zeros(UPPER.size - 1)
    if len(found):
        distance = weighted_mean(per_window, found.lengths_s)
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
