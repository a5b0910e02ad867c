"""Counters of one VM; monotonic while the daemon manages the VM."""

from __future__ import annotations

import collections
import dataclasses

from kvmhost.reclaim.account.decisions import EvictReason
from kvmhost.vm import Harvest

__all__ = ["Totals"]


@dataclasses.dataclass
class Totals:
    """Sums since the daemon attached to the VM, in pages, passes and nanoseconds.

    :param evicted: by reason; in a dry run the simulated evictions
    :param refused: evictions that the VM refused, by outcome
    :param spared: demanded pages that were not evicted, by cause
    :param refaulted_own: refaults of pages that the daemon itself had evicted
    """

    passes: int = 0
    skipped: int = 0
    harvested: int = 0
    young: int = 0
    harvest_ns: int = 0
    rearm_ns: int = 0
    busy_ns: int = 0
    refaulted: int = 0
    refaulted_own: int = 0
    evicted: collections.Counter[EvictReason] = dataclasses.field(
        default_factory=collections.Counter
    )
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    spared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def note_harvest(self, found: Harvest) -> None:
        """Count one harvest."""
        self.harvested += found.young.n_pages
        self.young += found.n_young
        self.harvest_ns += found.harvest_ns
        self.rearm_ns += found.rearm_ns

    def note_outcomes(self, why: EvictReason, outcomes: dict[str, int]) -> None:
        """Count the outcomes of a batch."""
        self.evicted[why] += outcomes.get("done", 0)
        for name, pages in outcomes.items():
            if pages and name != "done":
                self.refused[name] += pages
