"""What the daemon tells about itself while it runs: one event, one line of the log."""

from __future__ import annotations

import dataclasses

__all__ = ["Dropped", "Event", "Notice", "PassReport"]


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass saw and did.

    :param resident_bytes: after the pass
    :param generations: resident pages by sequence number, the oldest first
    :param wanted_pages: what had to go; evicted are ``outcomes["done"]``
    :param why: what made it so, the name of a :class:`~kvmhost.reclaim.account.decisions.Why`
    :param forced_pages: went by the VM's own choice, since all that was left was protected
    :param refaulted_pages: came back since the last pass after having been evicted
    :param harvest_ns_per_page: scan and re-arming, inside the VM
    :param busy_ms: the daemon's own processor time in this pass
    :param holding: the daemon holds back, because what it evicts comes back
    :param notes: what changed with this pass, for people
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

    @property
    def evicted_pages(self) -> int:
        """Pages that went, or in a dry run would have gone."""
        return self.outcomes.get("done", 0)

    def line(self) -> str:
        """Return it in one line, for a log."""
        generations = " ".join(f"{seq}:{n}" for seq, n in self.generations)
        others = "".join(
            f" {name} {n}" for name, n in self.outcomes.items() if n and name != "done"
        )
        forced = f", forced {self.forced_pages}" if self.forced_pages else ""
        why = f" ({self.why})" if self.why and self.wanted_pages else ""
        return (
            f"{self.vm} pass {self.number}: resident {self.resident_bytes / 2**20:.1f} MiB, "
            f"young {self.young_pages}, generations {generations}, "
            f"{'would evict' if self.dry_run else 'evicted'} "
            f"{self.evicted_pages} of {self.wanted_pages}{why}{others}{forced}, "
            f"refaulted {self.refaulted_pages}, harvest {self.harvest_ns_per_page:.1f} ns/page, "
            f"{self.duration_ms:.1f} ms" + "".join(f"; {note}" for note in self.notes)
        )


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A VM that the daemon no longer looks after.

    :param failed: it refused, or never came; otherwise its time was over
    """

    vm: str
    reason: str
    failed: bool

    def line(self) -> str:
        """Return it in one line, for a log."""
        return f"{self.vm} dropped: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Notice:
    """Something about the daemon as a whole.

    :param failed: it went wrong, and the daemon goes on as before
    """

    text: str
    failed: bool = False

    def line(self) -> str:
        """Return it in one line, for a log."""
        return f"reclaimd: {self.text}"


Event = PassReport | Dropped | Notice
