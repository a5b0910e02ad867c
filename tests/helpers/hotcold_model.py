"""What a guest of ``hotcold`` must have in memory after so many epochs, by its parameters.

The pages that each epoch writes come from :mod:`kvmhost.guests.workloads`; what a write
leaves in a page is computed here as ``guests/x86_64/hotcold.c`` defines it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from kvmhost.guests.workloads import hotcold_written_gfns, mix

__all__ = ["expected_pages", "last_writes"]

_U64 = np.uint64
_WORDS = 512
_STEP = _U64(0x9E3779B97F4A7C15)


def last_writes(params: Mapping[str, int], finished: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the epoch of the last write to each page of the range; -1: none.

    :param finished: epochs that each vCPU has finished; it is at its doorbell
    """
    epochs = np.full(params["pages"], -1, dtype=np.int64)
    run = params["pages"] // len(finished)
    for vcpu, n_epochs in enumerate(finished):
        own = epochs[vcpu * run : (vcpu + 1) * run]
        epoch = n_epochs
        while epoch and (own < 0).any():
            epoch -= 1
            gfns = hotcold_written_gfns(params, epoch, len(finished), vcpu)
            pages = gfns - params["gfn_start"]
            epochs[pages[epochs[pages] < 0]] = epoch
    return epochs


def expected_pages(params: Mapping[str, int], finished: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return the contents of the range as words: shape ``(pages, 512)``.

    :param params: with ``words`` of 512: only then every byte is defined
    """
    written = (last_writes(params, finished) + 1).astype(np.uint64)
    gfns = np.arange(params["pages"], dtype=np.uint64) + _U64(params["gfn_start"])
    values = np.where(written > 0, mix(gfns << _U64(24) ^ written) | _U64(1), _U64(0))
    varied = mix(gfns ^ _U64(params["seed"])) % _U64(1000) >= params["same_filled_permille"]
    pages = np.repeat(values[:, None], _WORDS, axis=1)
    words = np.arange(0, _WORDS, 16)
    rows = np.flatnonzero(varied & (written > 0))
    with np.errstate(over="ignore"):
        pages[np.ix_(rows, words)] += (words.astype(np.uint64) + _U64(1)) * _STEP
    return pages
