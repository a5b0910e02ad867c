"""The soft engine: vCPUs that run access traces against tables, on C threads.

A vCPU makes one access after another: translate through its TLB or by a walk of the
tables, set accessed and dirty bits atomically as hardware does, and on a fault call the
handler, which takes the MMU lock. No instructions run and no guest memory is read, so
thousands of vCPUs and terabytes of tables fit. A trace is a function of the seed and the
vCPU's number; how the vCPUs interleave is up to the scheduler.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmhost._ffi import check, ffi, lib
from kvmhost.bitmap import YoungBitmap
from kvmhost.errors import KvmHostError, LayoutError
from kvmhost.mmu.table import Mmu
from kvmhost.mmu.tlb import TlbGeometry

__all__ = ["SoftEngine", "SoftRun", "Trace", "VcpuReport"]

_QUANTILES = 4096
_WRITE = np.uint64(1 << 63)


@dataclasses.dataclass(frozen=True)
class Trace:
    """Which pages a vCPU accesses, and in which order. Made by the class methods.

    :param gfn_start: first page; of vCPU ``i``, ``i * n_pages`` further on if ``private``
    :param write_permille: writes per thousand accesses
    :param phased: vCPU ``i`` of ``n`` starts at offset ``i / n`` of the range (strided traces)
    """

    kind: int
    gfn_start: int
    n_pages: int
    stride: int = 1
    write_permille: int = 0
    private: bool = False
    phased: bool = False
    scatter: int = 1
    table: npt.NDArray[np.uint64] | None = None

    @classmethod
    def sequential(cls, gfn_start: int, n_pages: int, **fields: Any) -> Trace:
        """One page after another, round and round."""
        return cls(lib.KH_TRACE_STRIDE, gfn_start, n_pages, **fields)

    @classmethod
    def strided(cls, gfn_start: int, n_pages: int, stride: int, **fields: Any) -> Trace:
        """Every ``stride``-th page, modulo the size."""
        return cls(lib.KH_TRACE_STRIDE, gfn_start, n_pages, stride=stride, **fields)

    @classmethod
    def random(cls, gfn_start: int, n_pages: int, **fields: Any) -> Trace:
        """Uniformly random pages."""
        return cls(lib.KH_TRACE_RANDOM, gfn_start, n_pages, **fields)

    @classmethod
    def zipf(cls, gfn_start: int, n_pages: int, exponent: float = 1.0, **fields: Any) -> Trace:
        """Page of rank ``r`` with probability proportional to ``r ** -exponent``.

        The distribution is cut into 4,096 steps of equal probability, uniform within each;
        ranks are scattered over the pages.
        """
        weights = np.arange(1, n_pages + 1, dtype=np.float64) ** -exponent
        return cls._by_weight(gfn_start, n_pages, weights, **fields)

    @classmethod
    def hot_cold(
        cls, gfn_start: int, n_pages: int, hot_pages: int, hot_share: float = 0.9, **fields: Any
    ) -> Trace:
        """``hot_share`` of the accesses go to the first ``hot_pages`` pages.

        :raises LayoutError: if there are no hot or no cold pages
        """
        if not 0 < hot_pages < n_pages or not 0 <= hot_share <= 1:
            raise LayoutError(f"hot_cold: {hot_pages} hot of {n_pages} pages, share {hot_share}")
        steps = round(hot_share * _QUANTILES)
        hot = np.linspace(0, hot_pages, steps + 1)[: steps or None]
        cold = np.linspace(hot_pages, n_pages, _QUANTILES - steps + 1)
        if not steps:
            hot = hot[:0]
        table = np.floor(np.concatenate([hot, cold])).astype(np.uint64)
        return cls(lib.KH_TRACE_QUANTILE, gfn_start, n_pages, table=table, **fields)

    @classmethod
    def recorded(cls, bitmap: YoungBitmap, **fields: Any) -> Trace:
        """The young pages of a bitmap, ascending, round and round.

        :raises LayoutError: if no page is young
        """
        gfns = bitmap.gfns().astype(np.uint64)
        if not gfns.size:
            raise LayoutError("recorded trace: no page of the bitmap is young")
        return cls(lib.KH_TRACE_LIST, bitmap.gfn_start, bitmap.n_pages, table=gfns, **fields)

    @classmethod
    def _by_weight(
        cls, gfn_start: int, n_pages: int, weights: npt.NDArray[np.float64], **fields: Any
    ) -> Trace:
        share = np.cumsum(weights)
        edges = np.searchsorted(share, np.linspace(0, share[-1], _QUANTILES + 1)[:-1])
        table = np.append(edges, n_pages).astype(np.uint64)
        scatter = next(s for s in range(n_pages // 2 + 1, 2 * n_pages) if math.gcd(s, n_pages) == 1)
        return cls(
            lib.KH_TRACE_QUANTILE, gfn_start, n_pages, table=table, scatter=scatter, **fields
        )


@dataclasses.dataclass(frozen=True)
class VcpuReport:
    """The counters of one vCPU. ``busy_ns`` is the wall time of its own time slices."""

    accesses: int
    tlb_hits: int
    tlb_misses: int
    tlb_flushes: int
    faults: int
    fault_retries: int
    set_young: int
    errors: int
    busy_ns: int
    last_gfn: int


_FIELDS = [field.name for field in dataclasses.fields(VcpuReport)]


class SoftRun:
    """vCPUs that are running. :meth:`wait` must be called once."""

    def __init__(self, run: Any, keep: Any, n_vcpus: int) -> None:
        self._run, self._keep, self._n_vcpus = run, keep, n_vcpus

    def progress(self) -> int:
        """Return how many accesses all vCPUs have made, as of their last turns."""
        return int(lib.kh_soft_progress(self._pointer()))

    def stop(self) -> None:
        """Request the vCPUs to end after their next access."""
        lib.kh_soft_stop(self._pointer())

    def wait(self) -> list[VcpuReport]:
        """Wait for the threads to end; one report a vCPU.

        A signal's exception (say, KeyboardInterrupt) stops the vCPUs first.
        """
        run = self._pointer()
        results = ffi.new("struct kh_soft_result[]", self._n_vcpus)
        try:
            # In slices, so that a signal is handled between them.
            while not lib.kh_soft_wait(run, 100):
                pass
        finally:
            self._run = None
            lib.kh_soft_stop(run)
            self._finish(run, results)
        return [VcpuReport(*(int(getattr(r, name)) for name in _FIELDS)) for r in results]

    def _finish(self, run: Any, results: Any) -> None:
        try:
            check(lib.kh_soft_finish(run, results), "kh_soft_finish")
        finally:
            self._keep.close()

    def _pointer(self) -> Any:
        if self._run is None:
            raise KvmHostError("the vCPUs have been waited for")
        return self._run


class SoftEngine:
    """vCPUs over one table.

    :param table: the tables that they translate through; its memslots resolve faults
    :param tlb: geometry of every vCPU's TLB; None for no TLB at all
    """

    def __init__(self, table: Mmu, tlb: TlbGeometry | None = None, *, as_id: int = 0) -> None:
        self.table = table
        self.tlb = tlb
        self.as_id = as_id

    def start(
        self, trace: Trace, *, n_vcpus: int, n_threads: int = 0, n_accesses: int = 0, seed: int = 1
    ) -> SoftRun:
        """Start the vCPUs.

        :param n_threads: at most one for each vCPU, which is the default
        :param n_accesses: of each vCPU; 0 until stopped
        :raises IoctlError: ``EINVAL`` if the numbers do not fit together
        """
        config = self._config(trace, n_vcpus, n_threads or n_vcpus, n_accesses, seed)
        out = ffi.new("struct kh_soft **")
        keep = self.table.hold()
        try:
            # SAFETY: the table is held until wait(); the trace's array is copied here.
            result = lib.kh_soft_start(out, keep.pointer, config)
            check(result, "kh_soft_start", n_vcpus=n_vcpus, n_threads=n_threads)
        except BaseException:
            keep.close()
            raise
        return SoftRun(out[0], keep, n_vcpus)

    def run(self, trace: Trace, **fields: Any) -> list[VcpuReport]:
        """Start the vCPUs and wait for them to make all their accesses."""
        return self.start(trace, **fields).wait()

    def preview(
        self, trace: Trace, n: int, *, vcpu: int = 0, n_vcpus: int = 1, seed: int = 1
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        """Return the first ``n`` accesses of a vCPU: gfns, and which of them write."""
        config = self._config(trace, n_vcpus, n_vcpus, 0, seed)
        out = np.zeros(n, dtype=np.uint64)
        # SAFETY: `out` lives until the call returns.
        pointer = ffi.cast("uint64_t *", out.ctypes.data)
        check(lib.kh_soft_trace(config, vcpu, pointer, n), "kh_soft_trace", vcpu=vcpu)
        return out & ~_WRITE, (out & _WRITE) != 0

    def _config(
        self, trace: Trace, n_vcpus: int, n_threads: int, n_accesses: int, seed: int
    ) -> Any:
        tlb = self.tlb or TlbGeometry(0, 0, 0, 0)
        flags = (lib.KH_SOFT_PRIVATE if trace.private else 0) | (
            lib.KH_SOFT_PHASED if trace.phased else 0
        )
        return ffi.new(
            "struct kh_soft_config *",
            {
                "n_vcpus": n_vcpus,
                "n_threads": n_threads,
                "trace": trace.kind,
                "flags": flags,
                "seed": seed,
                "gfn_start": trace.gfn_start,
                "n_pages": trace.n_pages,
                "stride": trace.stride,
                "n_accesses": n_accesses,
                "write_permille": trace.write_permille,
                "as_id": self.as_id,
                "tlb_sets": tlb.sets,
                "tlb_ways": tlb.ways,
                "huge_sets": tlb.huge_sets,
                "huge_ways": tlb.huge_ways,
                "scatter": trace.scatter,
                "list_address": 0 if trace.table is None else trace.table.ctypes.data,
                "n_list": 0 if trace.table is None else trace.table.size,
            },
        )
