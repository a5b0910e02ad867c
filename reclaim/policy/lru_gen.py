"""Multi-generational LRU over harvested bitmaps, modelled on the kernel's ``lru_gen``.

Every page is in a generation between ``max_seq``, the youngest, and ``min_seq``. An aging
pass opens a new youngest generation; if more than ``n_generations`` would be open, the
two oldest are merged. Eviction starts at the oldest generation and never takes pages
from the two youngest.

An aging pass promotes a young page according to its history, which covers the last
sixteen windows. A page that was young in one of them only is promoted to the
third-youngest generation: it is not evicted next, but it must be found young again to be
protected. If the pages found young twice would exceed the share of memory that protected
pages may take, more than two windows are required. So neither a scan nor a working set
larger than the memory can fill the protected generations.

The tier of a page follows from the number of windows in which it was young. A controller
protects tiers whose pages refault more than those of the first tier
(:mod:`.lru_gen_tiers`), except for overdue pages, which were not young for twice their
mean interval. Unprotected pages are evicted first: the oldest generation first, within a
generation the pages young in the fewest windows, and in random order among equals.
Pages of protected tiers follow, those young in the fewest windows first.

If the caller can probe (``probes``), an aging sweep visits only tables that were dense in
young entries (:mod:`.lru_gen_filter`). Pages of other tables are tested when they are
selected for eviction: a young page is kept, the 64 pages around it
are tested as well, and a table in which this finds many young pages is swept again.

Source: mm/vmscan.c, mm/workingset.c, Documentation/admin-guide/mm/multigen_lru.rst,
Linux v6.12; that the first access only marks a page is from v6.14.

Departs from the kernel: an array element per page replaces list entries, so that aging
is a few passes over an array. Each harvest opens a generation; the kernel ages when it
runs short of old pages. There is one type of pages. A page of a protected tier is
skipped, not moved to the next generation. The limit on pages in protected generations
adapts to the number of pages to evict. The filter is exact.
"""

from __future__ import annotations

import collections
import enum
import functools

import numpy as np
import numpy.typing as npt

from kvmhost.bitmap import Words, pack, unpack
from kvmhost.errors import LayoutError
from kvmhost.reclaim.policy.base import (
    Everything,
    Gfns,
    HarvestPlan,
    Mask,
    Probe,
    check_mask,
    check_words,
)
from kvmhost.reclaim.policy.lru_gen_filter import (
    TABLE_PAGES,
    TableFilter,
    look_around_windows,
    should_look_around,
    suitable_to_scan,
    young_a_table,
)
from kvmhost.reclaim.policy.lru_gen_tiers import IS_OVERDUE, N_TIERS, TIER_OF, Tiers

__all__ = [
    "DAEMON_CAPS",
    "MAX_GENERATIONS",
    "MIN_GENERATIONS",
    "MM_STATS",
    "PROTECTED",
    "Caps",
    "LruGen",
    "why_not",
]

#: Two of them are protected; as MAX_NR_GENS, Linux v6.12, include/linux/mmzone.h.
MIN_GENERATIONS = 4
MAX_GENERATIONS = 128
#: The youngest generations, which are never evicted; MIN_NR_GENS.
PROTECTED = 2

#: Counters of a sweep, with the kernel's names (include/linux/mmzone.h, before v6.8): pages of
#: the tables that were scanned, the old and the young ones of them; tables, those that passed
#: the filter, and those that pass the next one.
MM_STATS = (
    "MM_LEAF_TOTAL",
    "MM_LEAF_OLD",
    "MM_LEAF_YOUNG",
    "MM_NONLEAF_TOTAL",
    "MM_NONLEAF_FOUND",
    "MM_NONLEAF_ADDED",
)

_WINDOWS = 16
#: The bit of the last pass in a history.
_NOW = 1 << 15
#: A refault after more generations does not count as a mistake (lru_gen_test_recent()).
_RECENT = 32
#: Pages young in fewer windows than this are equal: a scan makes every page young once.
_TELLING = 2
_PROTECTED_KEY = np.uint32(1 << 31)
#: Flag bits of the shadow of an evicted page; the bits below hold its tier.
_GONE = np.uint8(0x80)
_TIER_BITS = np.uint8(0x0F)
#: Limits of the share of pages that the protected generations may hold: highest and lowest.
_MOST_PROTECTED, _LEAST_PROTECTED = 0.5, 1 / 64

_NONE: Gfns = np.empty(0, dtype=np.int64)


class Caps(enum.IntFlag):
    """Components that can be disabled, as in /sys/kernel/mm/lru_gen/enabled.

    ``SPTE_WALK`` is the proposal of 2023: the secondary MMU is tested in batches without
    its lock, not page by page under it.
    """

    CORE = 0x1
    MM_WALK = 0x2
    NONLEAF_YOUNG = 0x4
    SPTE_WALK = 0x8
    ALL = 0xF


#: What a daemon can switch: no tracker reports accessed bits of table entries, and a VM in
#: another process is tested in batches only.
DAEMON_CAPS = Caps.CORE | Caps.MM_WALK | Caps.SPTE_WALK


def why_not(caps: int, probes: bool) -> str:
    """Return why a daemon cannot run with a mask of capabilities; "" if it can.

    :param probes: the policy may test victims; each test costs a request
    """
    if not 0 <= caps <= Caps.ALL:
        return f"capabilities {caps:#x}: need a mask of bits in {int(Caps.ALL):#x}"
    if caps & Caps.NONLEAF_YOUNG:
        return (
            f"capabilities {caps:#x}: 0x4 (non-leaf young) has no effect, since no tracker "
            f"reports accessed bits of table entries; use {caps & ~Caps.NONLEAF_YOUNG:#x}"
        )
    if not caps & Caps.CORE:
        return ""
    if not caps & Caps.SPTE_WALK:
        return (
            f"capabilities {caps:#x}: 0x8 (spte walk) cannot be off, since each test of one page "
            f"would be a request to the VM; use {caps | Caps.SPTE_WALK:#x}"
        )
    if not caps & Caps.MM_WALK and not probes:
        return (
            f"capabilities {caps:#x}: without 0x2 (mm walk) only victims are tested, which needs "
            f"the policy option probes = true"
        )
    return ""


class LruGen:
    """Generations over the pages ``[0, n_pages)`` of one VM.

    Initially all pages are in one generation, which becomes old enough for eviction
    after two aging passes.

    :param n_generations: 4 to 128
    :param seed: of the random order among equals; None: order by gfn
    :param min_ttl_ms: never evict a page that was young within this time
    :param caps: enabled components, see :class:`Caps`; may be changed at any time
    :param probes: the caller passes a probe to :meth:`victims`
    :raises LayoutError: for values outside these ranges, or no pages
    """

    name = "lru_gen"

    def __init__(
        self,
        n_pages: int,
        n_generations: int = 4,
        seed: int | None = 3,
        *,
        min_ttl_ms: int = 0,
        caps: int = Caps.ALL,
        probes: bool = False,
    ) -> None:
        if not MIN_GENERATIONS <= n_generations <= MAX_GENERATIONS:
            raise LayoutError(
                f"{n_generations} generations: need {MIN_GENERATIONS} to {MAX_GENERATIONS}"
            )
        if n_pages <= 0:
            raise LayoutError(f"{n_pages} pages: need one or more")
        self.n_generations, self.min_ttl_ms, self.probes = n_generations, min_ttl_ms, probes
        self.min_seq = self.max_seq = 0
        #: Generations behind the youngest; of an evicted page: when it was evicted.
        self.behind = np.zeros(n_pages, dtype=np.uint8)
        #: One bit per window, the last window in the most significant bit.
        self.history = np.zeros(n_pages, dtype=np.uint16)
        self.shadow = np.zeros(n_pages, dtype=np.uint8)
        self.tiers = Tiers()
        self.filter = TableFilter(n_pages)
        #: Time at which each open generation was opened.
        self.births_ns: dict[int, int] = {0: 0}
        self._pass_times_ns: collections.deque[int] = collections.deque(maxlen=253)
        self._caps = Caps(0)
        self.caps = Caps(caps)
        #: Of the last sweep, by the names of :data:`MM_STATS`.
        self.mm_stats = dict.fromkeys(MM_STATS, 0)
        self._share = _MOST_PROTECTED
        self._enough = 2
        #: Pages that became resident since the last pass; those that became resident before
        #: it, and whose accessed bits were not cleared yet.
        self._arrived: Gfns = _NONE
        self._known_young: Gfns = _NONE
        self._spared: npt.NDArray[np.uint8] | None = None
        self._swept: npt.NDArray[np.bool_] = np.ones(self.filter.n_tables, dtype=bool)
        blocks = np.arange(-(-n_pages // 64), dtype=np.uint32)
        mixed = (blocks + np.uint32(seed or 0)) * np.uint32(2654435761)
        self._lot = mixed >> np.uint32(17) if seed is not None else np.zeros_like(blocks)
        self._counts = dict.fromkeys(
            ("promoted", "refaulted", "evicted", "probed_young", "looked_around", "short"), 0
        )

    @property
    def n_pages(self) -> int:
        """Number of pages that the policy covers."""
        return self.behind.size

    @property
    def caps(self) -> Caps:
        """The enabled components."""
        return self._caps

    @caps.setter
    def caps(self, caps: int) -> None:
        if not 0 <= caps <= Caps.ALL:
            raise LayoutError(f"capabilities {caps:#x}: need a mask of bits in {int(Caps.ALL):#x}")
        self._caps = Caps(caps)

    @property
    def seq(self) -> npt.NDArray[np.int64]:
        """Each page's sequence number: shape ``(n_pages,)``."""
        oldest = self.max_seq - self.min_seq
        return self.max_seq - np.minimum(self.behind, oldest).astype(np.int64)

    # -- aging -----------------------------------------------------------------

    def plan(self, tables_young: Words | None = None) -> HarvestPlan:
        """Request the tables that pass the filter, or all pages.

        Without :attr:`Caps.NONLEAF_YOUNG`, ``tables_young`` is ignored; without
        :attr:`Caps.MM_WALK` nothing is swept, and young pages are found only by the probe
        during eviction.
        """
        batched = bool(self._caps & Caps.SPTE_WALK)
        self._swept = np.ones(self.filter.n_tables, dtype=bool)
        if not self.probes:
            return Everything if batched else HarvestPlan(None, batched=False)
        if not self._caps & Caps.MM_WALK:
            self._swept[:] = False
        else:
            self._swept &= self.filter.tables(self.max_seq + 1)
            if tables_young is not None and self._caps & Caps.NONLEAF_YOUNG:
                self._swept &= unpack(tables_young, self.filter.n_tables)
        if self._swept.all():
            return HarvestPlan(None, batched=batched)
        return HarvestPlan(self.filter.pages(self._swept), batched=batched)

    def full_plan(self) -> HarvestPlan:
        """Request all pages once, in place of :meth:`plan` (``full_scan``)."""
        self._swept = np.ones(self.filter.n_tables, dtype=bool)
        return HarvestPlan(None, batched=bool(self._caps & Caps.SPTE_WALK))

    def age(self, young: Words, now_ns: int) -> None:
        """Open a new youngest generation and move young pages towards it.

        :raises LayoutError: if the bitmap has another size
        """
        check_words(young, self.n_pages)
        if not self._caps & Caps.CORE:
            return
        self._open_generation(now_ns)
        self.history >>= 1
        seen = unpack(young, self.n_pages)
        # Pages that became resident were touched, whether they were swept or not.
        seen[self._arrived] = True
        self._known_young, self._arrived = self._arrived, _NONE
        pages = np.flatnonzero(seen)
        self.history[pages] |= _NOW
        self._enough = self._threshold(_refs(self.history[pages]))
        self._promote(pages)
        self.filter.learn(self.max_seq, self._swept, young)
        self._count_sweep(young)

    def _count_sweep(self, young: Words) -> None:
        """Set :attr:`mm_stats` to what the sweep of this generation scanned and found."""
        n_young = int(young_a_table(young, self.n_pages)[self._swept].sum())
        total = self.filter.n_pages_of(self._swept)
        found, added = int(self._swept.sum()), int(self.filter.tables(self.max_seq + 1).sum())
        values = (total, total - n_young, n_young, self.filter.n_tables, found, added)
        self.mm_stats = dict(zip(MM_STATS, values, strict=True))

    def _open_generation(self, now_ns: int) -> None:
        self.max_seq += 1
        self.births_ns[self.max_seq] = now_ns
        if self.min_ttl_ms:
            self._pass_times_ns.append(now_ns)
        np.add(self.behind, 1, out=self.behind, where=self.behind < 255)
        oldest = self.max_seq - self.n_generations + 1
        if oldest > self.min_seq:
            del self.births_ns[self.min_seq]
            self.min_seq = oldest
        self.tiers.carry_over(self.n_pages)

    def _promote(self, pages: Gfns) -> None:
        """Promote pages young in enough windows to the youngest generation, others to the third."""
        enough = _refs(self.history[pages]) >= self._enough
        third = min(PROTECTED, self.max_seq - self.min_seq)
        self.behind[pages] = np.where(enough, 0, np.minimum(self.behind[pages], third))
        self._counts["promoted"] += int(enough.sum())

    def _threshold(self, refs: npt.NDArray[np.uint8]) -> int:
        """Return the number of windows, 2 or more, in which a protected page was young."""
        resident = self.n_pages - int(np.count_nonzero(self.shadow & _GONE))
        room = int(resident * self._share)
        by_refs = np.bincount(refs, minlength=_WINDOWS + 1)
        at_least = by_refs[::-1].cumsum()[::-1]
        fitting = np.flatnonzero(at_least[2:] <= room)
        return int(fitting[0]) + 2 if fitting.size else _WINDOWS + 1

    def refaulted(self, gfns: Gfns, now_ns: int) -> None:
        """Add resident pages, and count those that were evicted recently."""
        shadow = self.shadow[gfns]
        back = (shadow & _GONE) != 0
        recent = back & (self.behind[gfns] < _RECENT)
        self.tiers.note_refaulted(shadow[recent] & _TIER_BITS)
        self._counts["refaulted"] += int(back.sum())
        self.shadow[gfns] = 0
        self._arrived = gfns
        self.behind[gfns] = 255

    # -- eviction --------------------------------------------------------------

    def victims(self, n: int, candidates: Mask, now_ns: int, probe: Probe | None = None) -> Gfns:
        """Return up to ``n`` candidates in the order that the module describes.

        :raises LayoutError: if the mask has another size
        """
        check_mask(candidates, self.n_pages)
        if n <= 0 or not self._caps & Caps.CORE:
            return _NONE
        chosen = self._choose(n, candidates, now_ns)
        if probe is not None:
            tested: Mask = np.zeros(self.n_pages, dtype=bool)
            while self._find_young(chosen, tested, probe):
                chosen = self._choose(n, candidates, now_ns)
        self._adapt(n, chosen.size, int(candidates.sum()))
        return chosen

    def _choose(self, n: int, candidates: Mask, now_ns: int) -> Gfns:
        # 32 bits, half the width of flatnonzero's result: memory use peaks here.
        pages = np.flatnonzero(candidates & self._old_enough(now_ns)).astype(np.uint32)
        behind = np.minimum(self.behind[pages], self.max_seq - self.min_seq)
        key = self._keys(pages, behind)
        order = _lowest(key, n)
        chosen = pages[order].astype(np.int64)
        if order.size:
            passed = (key >= _PROTECTED_KEY) & (behind >= behind[order].min())
            passed[order] = False
            self._spared = TIER_OF[self.history[pages[passed]]]
        return chosen

    def _keys(
        self, pages: npt.NDArray[np.uint32], behind: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint32]:
        """Return the sort keys of eviction; pages with the lowest keys are evicted first.

        The random order among equals is by blocks of 64: neighbours are evicted together,
        and the same blocks stay resident, so that a repeated scan hits a part of memory.
        """
        known, shift = _key_parts(self.tiers.last_evictable())
        history = self.history[pages]
        key = np.subtract(np.uint32(255), behind, dtype=np.uint32)
        np.left_shift(key, shift[history], out=key)
        key |= known[history]
        key |= self._lot[pages >> np.uint32(6)]
        return key

    def _old_enough(self, now_ns: int) -> Mask:
        """Return the pages outside protected generations that were not young for ``min_ttl_ms``."""
        if self.max_seq - self.min_seq < PROTECTED:
            return np.zeros(self.n_pages, dtype=bool)
        since_ns = now_ns - self.min_ttl_ms * 1_000_000
        recent = sum(time_ns > since_ns for time_ns in self._pass_times_ns)
        if recent > _WINDOWS:
            # A page found young once is promoted to two generations behind the youngest.
            return self.behind >= min(recent + PROTECTED, 255)
        old: Mask = self.behind >= PROTECTED
        return old & (self.history < 1 << (_WINDOWS - recent)) if recent else old

    def _find_young(self, chosen: Gfns, tested: Mask, probe: Probe) -> bool:
        """Test victims before eviction, promote young ones; return whether there were any.

        No page is tested twice. A young victim gains one window in its history and may
        still be the best victim: a page young in two windows must not displace one that
        is young in all.
        """
        fresh = chosen[~tested[chosen]]
        tested[fresh] = True
        if self._caps & Caps.SPTE_WALK:
            young = self._test_batch(fresh, tested, probe)
        else:
            hits = np.array([probe.clear_flush_young(int(g)) for g in fresh], dtype=bool)
            young = fresh[hits & (self.history[fresh] < _NOW)]
        self._counts["probed_young"] += young.size
        self.history[young] |= _NOW
        self._promote(young)
        return bool(young.size)

    def _test_batch(self, fresh: Gfns, tested: Mask, probe: Probe) -> Gfns:
        asked = np.zeros(self.n_pages, dtype=bool)
        asked[fresh] = True
        # Pages that became resident since the last pass are known to be young: only clear.
        asked[self._known_young] = True
        self._known_young = _NONE
        found = unpack(probe.clear_young(pack(asked)), self.n_pages)
        young = np.flatnonzero(found & (self.history < _NOW))
        if not should_look_around(bool(young.size), bool(self._caps & Caps.SPTE_WALK)):
            return young
        return self._look_around(young, asked, tested, probe)

    def _look_around(self, young: Gfns, asked: Mask, tested: Mask, probe: Probe) -> Gfns:
        """Test the pages around each young victim, all windows in one request.

        A table passes the filter of the next sweep if a window in it is dense.
        """
        start, end = look_around_windows(young, 0, self.n_pages)
        edges = np.zeros(self.n_pages + 1, dtype=np.int32)
        np.add.at(edges, start, 1)
        np.add.at(edges, end, -1)
        around = np.cumsum(edges, out=edges)[:-1] > 0
        more = _NONE
        if (around & ~asked).any():
            found = probe.clear_young(pack(around & ~asked))
            more = np.flatnonzero(unpack(found, self.n_pages))
        tested[more] = True
        self._counts["looked_around"] += more.size
        both = np.concatenate((young, more))
        up_to = np.zeros(self.n_pages + 1, dtype=np.int32)
        up_to[both + 1] = 1
        np.cumsum(up_to, out=up_to)
        dense = (end > start) & suitable_to_scan(end - start, up_to[end] - up_to[start])
        self.filter.admit(self.max_seq, np.unique(young[dense] // TABLE_PAGES))
        return both

    def _adapt(self, wanted: int, found: int, n_candidates: int) -> None:
        """Shrink the limit of protected generations if too few victims were found, else grow it.

        A request for more than half of the candidates asks for an ordering rather than for
        free memory, and does not change the limit.
        """
        if found < wanted <= n_candidates / 2:
            self._counts["short"] += wanted - found
            self._share = max(self._share / 2, _LEAST_PROTECTED)
        else:
            self._share = min(self._share * 1.05, _MOST_PROTECTED)

    def evicted(self, gfns: Gfns, now_ns: int) -> None:
        """Store a shadow entry with the page's tier and the generation of its eviction."""
        tiers = TIER_OF[self.history[gfns]]
        self.shadow[gfns] = _GONE | tiers
        self.behind[gfns] = 0
        self.tiers.note_evicted(tiers)
        self._counts["evicted"] += int(gfns.size)
        if self._spared is not None:
            self.tiers.note_protected(self._spared)
            self._spared = None

    def up_to(self, seq: int, candidates: Mask) -> Gfns:
        """Return the candidates in generations up to ``seq``, the oldest first.

        :raises LayoutError: if the mask has another size, or ``seq`` is protected
        """
        check_mask(candidates, self.n_pages)
        if seq + PROTECTED > self.max_seq:
            raise LayoutError(
                f"generation {seq}: the youngest that may go is {self.max_seq - PROTECTED}"
            )
        pages = np.flatnonzero(candidates & (self.behind >= self.max_seq - seq))
        return pages[np.argsort(255 - self.behind[pages], kind="stable")]

    # -- inspection ------------------------------------------------------------

    def sizes(self, pages: Mask) -> list[tuple[int, int]]:
        """Return (sequence number, number of the given pages), the oldest first."""
        check_mask(pages, self.n_pages)
        oldest = self.max_seq - self.min_seq
        counts = np.bincount(np.minimum(self.behind[pages], oldest), minlength=oldest + 1)
        return [(self.max_seq - i, int(counts[i])) for i in range(oldest, -1, -1)]

    def counters(self) -> dict[str, float]:
        """Return sequence numbers, counters and the state of the controllers."""
        shown: dict[str, float] = {"min_seq": self.min_seq, "max_seq": self.max_seq}
        shown.update(self._counts)
        shown["protected_share"] = self._share
        shown["last_evictable_tier"] = self.tiers.last_evictable()
        shown["tables_swept"] = int(self._swept.sum())
        shown.update(self.mm_stats)
        for tier in range(N_TIERS):
            shown[f"tier{tier}_refaulted"] = int(
                self.tiers.avg_refaulted[tier] + self.tiers.refaulted[tier]
            )
            shown[f"tier{tier}_total"] = int(
                self.tiers.avg_total[tier] + self.tiers.evicted[tier] + self.tiers.protected[tier]
            )
        return shown

    def explain(self, gfn: int) -> dict[str, int | float | str]:
        """Return a page's generation, windows and tier.

        :raises LayoutError: if the gfn is out of range
        """
        if not 0 <= gfn < self.n_pages:
            raise LayoutError(f"gfn {gfn:#x} outside [0, {self.n_pages:#x})")
        history, behind = int(self.history[gfn]), int(self.behind[gfn])
        known: dict[str, int | float | str] = {
            "windows": f"{history:016b}",
            "tier": int(TIER_OF[history]),
        }
        if self.shadow[gfn] & _GONE:
            known["generations_since_eviction"] = behind
            known["tier_at_eviction"] = int(self.shadow[gfn] & _TIER_BITS)
        else:
            known["seq"] = self.max_seq - min(behind, self.max_seq - self.min_seq)
            known["protected"] = "yes" if behind < PROTECTED else "no"
        return known


def _refs(history: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Return the number of windows in each history."""
    refs: npt.NDArray[np.uint8] = _REFS[history]
    return refs


_REFS = (
    np.unpackbits(np.arange(1 << _WINDOWS, dtype="<u2").view(np.uint8))
    .reshape(-1, _WINDOWS)
    .sum(axis=1, dtype=np.uint8)
)


@functools.lru_cache(maxsize=N_TIERS)
def _key_parts(last_evictable: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """Return, for each history, its part of the key and the shift of the generation.

    From the most significant bit: protected, windows, generation; unprotected: generation,
    windows. The low 15 bits hold the random order.
    """
    refs = _REFS.astype(np.uint32)
    protected = (last_evictable < TIER_OF) & ~IS_OVERDUE
    known = np.where(
        protected,
        _PROTECTED_KEY | refs << np.uint32(23),
        np.maximum(refs, _TELLING) << np.uint32(15),
    )
    return known, np.where(protected, 15, 23).astype(np.uint8)


def _lowest(key: npt.NDArray[np.uint32], n: int) -> npt.NDArray[np.int64]:
    """Return the indexes of the ``n`` lowest keys, ascending, in a stable order."""
    if 4 * n < key.size:
        limit = _nth_lowest(key, n)
        near = np.flatnonzero(key <= limit)
        return near[np.argsort(key[near], kind="stable")[:n]]
    return np.argsort(key, kind="stable")[:n]


def _nth_lowest(key: npt.NDArray[np.uint32], n: int) -> int:
    """Return the ``n``-th lowest key, counted from 1.

    Counts in two halves of the key, because a partition is slow if most keys are equal.
    """
    top = key >> np.uint32(16)
    up_to = np.cumsum(np.bincount(top))
    half = int(np.searchsorted(up_to, n))
    rest = n - (int(up_to[half - 1]) if half else 0)
    low = np.cumsum(np.bincount(key[top == half] & np.uint32(0xFFFF)))
    return half << 16 | int(np.searchsorted(low, rest))
