"""How several VMs share one budget, and one demand: by weight and by coldness.

A budget is poured in two rounds. First every VM gets memory for its working set, the
pages it touched lately; where that is not enough for all, by weight, and what one VM
does not need goes to the others. What is left over holds cold pages and room to grow,
again by weight. So a page that nobody touches gives way to a page that somebody
touches, in whichever VM, and weights decide among equals only.

A demand, pages that have to go now, is taken from cold pages in proportion to coldness
over weight; working sets are touched only when no cold page is left anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["Claim", "share_budget", "share_demand"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """What one VM is and has, in pages.

    :param working: touched lately
    :param resident: has now
    :param size: all of its memory
    :param floor: never less than this (pinned pages)
    """

    weight: float
    working: int
    resident: int
    size: int
    floor: int = 1

    @property
    def cold(self) -> int:
        """Resident, and not touched lately."""
        return max(0, self.resident - max(self.working, self.floor))


def share_budget(total: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Share out a budget; the parts make up the total, unless all VMs have all they can use.

    Floors are given in any case, even where they exceed the total.
    """
    parts = {name: min(claim.floor, claim.size) for name, claim in claims.items()}
    left = total - sum(parts.values())
    for want in ("working", "size"):
        caps = {n: max(0, min(getattr(c, want), c.size) - parts[n]) for n, c in claims.items()}
        weights = {n: c.weight for n, c in claims.items()}
        for name, pages in _pour(left, caps, weights).items():
            parts[name] += pages
            left -= pages
    return parts


def share_demand(pages: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Share out pages that have to go; nobody gives more than it has."""
    cold = {name: claim.cold for name, claim in claims.items()}
    # Pouring by coldness over weight: as cold pages give way sooner the more there are.
    parts = _pour(pages, cold, {n: cold[n] / c.weight for n, c in claims.items()})
    left = pages - sum(parts.values())
    rest = {n: max(0, c.resident - c.floor - parts[n]) for n, c in claims.items()}
    more = _pour(left, rest, {n: rest[n] / c.weight for n, c in claims.items()})
    return {name: parts[name] + more[name] for name in claims}


def _pour(total: int, caps: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Share ``total`` by weight, nobody beyond its cap; what overflows goes to the others."""
    parts = dict.fromkeys(caps, 0)
    open_names = [name for name in caps if caps[name] > 0 and weights[name] > 0]
    left = max(0, min(total, sum(caps[name] for name in open_names)))
    while left and open_names:
        weight = sum(weights[name] for name in open_names)
        shares = {name: int(left * weights[name] / weight) for name in open_names}
        full = [name for name in open_names if shares[name] >= caps[name] - parts[name]]
        # Where somebody is full, only those are settled in this round.
        given = {n: caps[n] - parts[n] for n in full} or _round_up(shares, left, caps, parts)
        for name, pages in given.items():
            parts[name] += pages
            left -= pages
        open_names = [name for name in open_names if name not in full] if full else []
    return parts


def _round_up(
    shares: Mapping[str, int], left: int, caps: Mapping[str, int], parts: Mapping[str, int]
) -> dict[str, int]:
    """Give the pages that rounding left over to those with the largest shares."""
    over = left - sum(shares.values())
    given = dict(shares)
    for name in sorted(shares, key=lambda n: (-shares[n], n)):
        extra = min(over, caps[name] - parts[name] - given[name])
        given[name] += extra
        over -= extra
    return given
