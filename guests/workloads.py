"""Which gfns an epoch of a guest touches, computed on the host from its parameters.

The sources of the guests define these sets; here they are computed again, in
numpy, for tests and measurements. No code is shared with the guests.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

__all__ = [
    "hotcold_gfns",
    "hotcold_owned_pages",
    "hotcold_written_gfns",
    "touch_gfns",
    "zipf_ranks",
    "zipf_sums",
]

Gfns = npt.NDArray[np.int64]

_U64 = np.uint64
#: Spreads ranks over the pages; a prime, so that two ranks never share a page.
_SCATTER = 2654435761
_LOG_ONE = 1 << 24


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 over an array."""
    with np.errstate(over="ignore"):
        x = x + _U64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        return x ^ (x >> _U64(31))


def touch_gfns(
    params: Mapping[str, int], epoch: int, n_vcpus: int = 1, vcpu: int | None = None
) -> Gfns:
    """Return the gfns that ``touch`` touches in an epoch, ascending, each once.

    :param vcpu: only this one's share; None: over all vCPUs
    """
    start, pages = params["gfn_start"], params["pages"]
    share = slice(None) if vcpu is None else slice(vcpu, None, n_vcpus)
    if params["pattern"] == 2:
        base = _mix_one(params["seed"] + epoch)
        steps = _indexes(params["count"])[share]
        with np.errstate(over="ignore"):
            picked = mix(steps + base) % _U64(pages)
        return np.unique(picked.astype(np.int64)) + start
    gfns = np.arange(start, start + pages, params["stride"] or 1, dtype=np.int64)
    if params["pattern"] == 1:
        gfns = gfns[::-1]
    return np.sort(gfns[share])


def hotcold_owned_pages(params: Mapping[str, int], n_vcpus: int) -> int:
    """Return how many pages of the range the vCPUs touch at all."""
    return params["pages"] // n_vcpus * n_vcpus


def hotcold_gfns(
    params: Mapping[str, int], epoch: int, n_vcpus: int = 1, vcpu: int | None = None
) -> Gfns:
    """Return the gfns of the range that ``hotcold`` touches in an epoch.

    Ascending, each once. The guest's list of last writes, which follows the range, is
    not part of it.

    :param vcpu: only this one's share; None: over all vCPUs
    """
    run = params["pages"] // n_vcpus
    parts = []
    for one in range(n_vcpus) if vcpu is None else (vcpu,):
        base = run * one
        if epoch == 0:
            parts.append(np.arange(base, base + run, dtype=np.int64))
        else:
            parts.extend(_hotcold_epoch(params, epoch, base, run))
    return np.unique(np.concatenate(parts)) + params["gfn_start"]


def hotcold_written_gfns(
    params: Mapping[str, int], epoch: int, n_vcpus: int = 1, vcpu: int | None = None
) -> Gfns:
    """Return those of :func:`hotcold_gfns` that the epoch writes."""
    gfns = hotcold_gfns(params, epoch, n_vcpus, vcpu)
    if epoch == 0:
        return gfns
    dice = mix(gfns.astype(np.uint64) ^ _U64(epoch << 32)) % _U64(1000)
    written: Gfns = gfns[dice < params["write_permille"]]
    return written


def _hotcold_epoch(params: Mapping[str, int], epoch: int, base: int, run: int) -> list[Gfns]:
    hot = params["hot"] * run // params["pages"] if params["passes"] else 0
    phase = epoch // params["phase_every"] if params["phase_every"] else 0
    moved = phase * (params["phase_step"] * run // params["pages"])
    parts = [base + (np.arange(hot, dtype=np.int64) + run // 4 + moved) % run]
    with np.errstate(over="ignore"):
        random = _mix_one(params["seed"] + epoch) + _U64(base)
        draws = mix(_indexes(params["cold"] + params["zipf"]) + random)
    cold, popular = np.split(draws, [params["cold"]])
    parts.append((cold % _U64(run)).astype(np.int64) + base)
    if popular.size:
        ranks = zipf_ranks(popular, run, params["zipf_permille"])
        parts.append((ranks * _SCATTER + moved) % run + base)
    slices = params["scan_epochs"]
    step = epoch % params["scan_every"] if params["scan_every"] else slices
    if step < slices:
        first, last = run * step // slices, run * (step + 1) // slices
        parts.append(np.arange(base + first, base + last, dtype=np.int64))
    return parts


def zipf_ranks(draws: npt.NDArray[np.uint64], n_ranks: int, permille: int) -> npt.NDArray[np.int64]:
    """Return the rank that each random number selects, as ``zipf.h`` defines it."""
    sums = zipf_sums(n_ranks, permille)
    ranks: Gfns = np.searchsorted(sums, draws % sums[-1], side="right").astype(np.int64)
    return ranks


@functools.lru_cache(maxsize=8)
def zipf_sums(n_ranks: int, permille: int) -> npt.NDArray[np.uint64]:
    """Return the sums of the weights up to each rank.

    This evaluates the definition in the widest floating point of numpy; the guest uses
    integer arithmetic. Tests compare the two.
    """
    logs = np.log2(np.arange(1, n_ranks + 1).astype(np.longdouble))
    exponents = permille * np.floor(logs * _LOG_ONE).astype(np.int64) // 1000
    weights = np.floor(np.exp2(32 - exponents.astype(np.longdouble) / _LOG_ONE))
    return np.cumsum(weights.astype(np.uint64), dtype=np.uint64)


def _indexes(n: int) -> npt.NDArray[np.uint64]:
    return np.arange(n, dtype=np.uint64)


def _mix_one(x: int) -> np.uint64:
    return np.uint64(mix(np.array([x % 2**64], dtype=np.uint64))[0])
