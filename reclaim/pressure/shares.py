"""Share one budget, and one demand, among VMs: by working set and weight.

A budget is distributed in two rounds. First every VM gets memory for its working set,
the pages it touched recently; if the budget is too small for all working sets, they
share it by weight, and memory that one VM does not need is given to the others. The
remainder holds cold pages and leaves room to grow, again by weight. So the working set
of any VM takes precedence over the cold pages of every other, and weights only decide
between VMs in the same situation.

A demand (pages to evict now) is taken from cold pages in proportion to the number of
cold pages divided by weight; working sets lose pages only when no cold pages are left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["Claim", "share_budget", "share_demand"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """The pages and the weight of one VM.

    :param working: touched recently
    :param resident: resident now
    :param size: all of its memory
    :param floor: minimum, for pinned pages
    """

    weight: float
    working: int
    resident: int
    size: int
    floor: int = 1

    @property
    def cold(self) -> int:
        """Resident pages that were not touched recently."""
        return max(0, self.resident - max(self.working, self.floor))


def share_budget(total: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Distribute a budget; the parts sum to the total unless all VMs are fully resident.

    Floors are granted even if they exceed the total.
    """
    parts = {name: min(claim.floor, claim.size) for name, claim in claims.items()}
    left = total - sum(parts.values())
    for need in ("working", "size"):
        caps = {n: max(0, min(getattr(c, need), c.size) - parts[n]) for n, c in claims.items()}
        weights = {n: c.weight for n, c in claims.items()}
        for name, pages in _distribute(left, caps, weights).items():
            parts[name] += pages
            left -= pages
    return parts


def share_demand(pages: int, claims: Mapping[str, Claim]) -> dict[str, int]:
    """Distribute pages to evict; no VM gives more than it has."""
    cold = {name: claim.cold for name, claim in claims.items()}
    # By cold pages over weight: a VM with more cold pages gives more of them.
    parts = _distribute(pages, cold, {n: cold[n] / c.weight for n, c in claims.items()})
    left = pages - sum(parts.values())
    rest = {n: max(0, c.resident - c.floor - parts[n]) for n, c in claims.items()}
    more = _distribute(left, rest, {n: rest[n] / c.weight for n, c in claims.items()})
    return {name: parts[name] + more[name] for name in claims}


def _distribute(
    total: int, caps: Mapping[str, int], weights: Mapping[str, float]
) -> dict[str, int]:
    """Distribute ``total`` by weight up to each cap; the excess goes to the others."""
    parts = dict.fromkeys(caps, 0)
    open_names = [name for name in caps if caps[name] > 0 and weights[name] > 0]
    left = max(0, min(total, sum(caps[name] for name in open_names)))
    while left and open_names:
        weight = sum(weights[name] for name in open_names)
        shares = {name: int(left * weights[name] / weight) for name in open_names}
        full = [name for name in open_names if shares[name] >= caps[name] - parts[name]]
        # If any VM reaches its cap, this round settles only those VMs.
        given = {n: caps[n] - parts[n] for n in full} or _round_up(shares, left, caps, parts)
        for name, pages in given.items():
            parts[name] += pages
            left -= pages
        open_names = [name for name in open_names if name not in full] if full else []
    return parts


def _round_up(
    shares: Mapping[str, int], left: int, caps: Mapping[str, int], parts: Mapping[str, int]
) -> dict[str, int]:
    """Give the pages left over by rounding to the VMs with the largest shares."""
    over = left - sum(shares.values())
    given = dict(shares)
    for name in sorted(shares, key=lambda n: (-shares[n], n)):
        extra = min(over, caps[name] - parts[name] - given[name])
        given[name] += extra
        over -= extra
    return given
