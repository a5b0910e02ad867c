"""What a daemon has counted over one VM; it only grows while the VM is looked after."""

from __future__ import annotations

import collections
import dataclasses

from kvmhost.control.schema import HarvestCost
from kvmhost.reclaim.account.decisions import Why

__all__ = ["Totals"]


@dataclasses.dataclass
class Totals:
    """Sums since the VM was met, in pages, passes and nanoseconds.

    :param evicted: by reason; in a dry run what would have gone
    :param refused: wanted evictions that the VM did not do, by its outcome
    :param spared: wanted, and not taken, by what kept them
    :param regretted: refaults of pages that the daemon itself had evicted
    """

    passes: int = 0
    skipped: int = 0
    harvested: int = 0
    young: int = 0
    harvest_ns: int = 0
    rearm_ns: int = 0
    busy_ns: int = 0
    refaulted: int = 0
    regretted: int = 0
    evicted: collections.Counter[Why] = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    spared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def note_harvest(self, pages: int, young: int, cost: HarvestCost) -> None:
        """Count one harvest."""
        self.harvested += pages
        self.young += young
        self.harvest_ns += cost.harvest_ns
        self.rearm_ns += cost.rearm_ns

    def note_outcomes(self, why: Why, outcomes: dict[str, int]) -> None:
        """Count what became of a batch."""
        self.evicted[why] += outcomes.get("done", 0)
        for name, pages in outcomes.items():
            if pages and name != "done":
                self.refused[name] += pages
