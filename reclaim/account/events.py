"""Events that the daemon reports while it runs; each prints as one line of the log."""

from __future__ import annotations

import dataclasses

__all__ = ["Dropped", "Event", "Notice", "PassReport"]


@dataclasses.dataclass(frozen=True)
class PassReport:
    """Measurements and actions of one pass.

    :param resident_bytes: after the pass
    :param generations: resident pages by sequence number, the oldest first
    :param wanted_pages: pages to evict; ``outcomes["done"]`` of them were evicted
    :param why: name of an :class:`~.decisions.EvictReason`
    :param forced_pages: evicted by the VM's own choice, since the policy protected the rest
    :param refaulted_pages: evicted pages that became resident since the last pass
    :param harvest_ns_per_page: scan and re-arming, measured in the VM
    :param busy_ms: processor time of the daemon in this pass
    :param holding: the daemon holds back, because evicted pages refault
    :param notes: changes made by this pass, as text
    :param loss: share of the vCPUs' time that re-arming cost in the last passes; None: not known
    :param cleared_steady: share of the steady young pages that the harvest cleared
    :param cleared_changing: share of the other young pages
    :param interval_s: time to the next pass
    :param stale_s: how long a page that is no longer touched may look young
    """

    vm: str
    number: int
    resident_bytes: int
    young_pages: int
    generations: list[tuple[int, int]]
    wanted_pages: int
    outcomes: dict[str, int]
    forced_pages: int
    refaulted_pages: int
    harvest_ns_per_page: float
    duration_ms: float
    busy_ms: float
    why: str = ""
    holding: bool = False
    dry_run: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)
    loss: float | None = None
    cleared_steady: float = 1.0
    cleared_changing: float = 1.0
    interval_s: float = 0.0
    stale_s: float = 0.0

    @property
    def evicted_pages(self) -> int:
        """Pages that were evicted; in a dry run, that would have been."""
        return self.outcomes.get("done", 0)

    def line(self) -> str:
        """Return the event as one line of a log."""
        generations = " ".join(f"{seq}:{n}" for seq, n in self.generations)
        others = "".join(
            f" {name} {n}" for name, n in self.outcomes.items() if n and name != "done"
        )
        forced = f", forced {self.forced_pages}" if self.forced_pages else ""
        why = f" ({self.why})" if self.why and self.wanted_pages else ""
        if self.holding:
            why += " while holding back" if self.evicted_pages else ", holding back"
        loss = "" if self.loss is None else f"loss {100 * self.loss:.1f} %, "
        return (
            f"{self.vm} pass {self.number}: resident {self.resident_bytes / 2**20:.1f} MiB, "
            f"young {self.young_pages}, generations {generations}, "
            f"{'would evict' if self.dry_run else 'evicted'} "
            f"{self.evicted_pages} of {self.wanted_pages}{why}{others}{forced}, "
            f"refaulted {self.refaulted_pages}, harvest {self.harvest_ns_per_page:.1f} ns/page, "
            f"{loss}{self.duration_ms:.1f} ms" + "".join(f"; {note}" for note in self.notes)
        )


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A VM that the daemon no longer manages.

    :param failed: the VM refused or never appeared; False if it ended normally
    """

    vm: str
    reason: str
    failed: bool

    def line(self) -> str:
        """Return the event as one line of a log."""
        return f"{self.vm} dropped: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Notice:
    """A message about the daemon as a whole.

    :param failed: the operation failed; the daemon continues unchanged
    """

    text: str
    failed: bool = False

    def line(self) -> str:
        """Return the event as one line of a log."""
        return f"reclaimd: {self.text}"


Event = PassReport | Dropped | Notice
