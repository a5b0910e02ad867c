"""Outputs of ``kvmhost young stat``, ``compare`` and ``whatif``: summaries of records."""

from __future__ import annotations

from kvmhost.tools.outputs.base import Output
from kvmhost.tools.outputs.young import Covered

__all__ = [
    "CaseRow",
    "CompareOutput",
    "ErrorBarRow",
    "JumpRow",
    "LayoutRow",
    "PhaseRow",
    "RealRunRow",
    "ReuseRow",
    "SessionRow",
    "SlotRow",
    "StatOutput",
    "ViewRow",
    "WhatifOutput",
]


class JumpRow(Output, frozen=True, kw_only=True):
    """The clocks disagree on the time since the window before."""

    window: int
    """the window"""
    monotonic_s: float
    """time by the monotonic clock"""
    wall_s: float
    """time by the wall clock"""


class SessionRow(Output, frozen=True, kw_only=True):
    """Where the bits come from, from one window on."""

    first_window: int
    """the window"""
    tracker: str
    """the tracker"""
    table_format: str
    """format of the table that was walked"""
    facts: dict[str, str]
    """host and guest: kernel, machine, engine, image, VM, writer of the record"""


class SlotRow(Output, frozen=True, kw_only=True):
    """A memslot of the recorded VM."""

    slot: int
    """its number"""
    gfn_start: int
    """its first page"""
    n_pages: int
    """number of pages"""
    hva: int
    """its address in the VM process; 0 if it is unknown"""


class LayoutRow(Output, frozen=True, kw_only=True):
    """The memslots, from one window on."""

    first_window: int
    """the window"""
    memslots: list[SlotRow]
    """the memslots"""


class ReuseRow(Output, frozen=True, kw_only=True):
    """One point of the miss-ratio curve."""

    mean_pages: float
    """size of an LRU memory"""
    miss_ratio: float
    """touches that would miss in it, estimated"""


class PhaseRow(Output, frozen=True, kw_only=True):
    """Windows with a similar access pattern."""

    first_window: int
    """the first window"""
    n_windows: int
    """number of windows"""
    end_s: float
    """end of the last window, since the record began"""
    change_ratio: float
    """difference from the phase before: 0 for none, 1 for a complete one"""
    mean_pages: float
    """young pages per window"""


class StatOutput(Covered, frozen=True, kw_only=True):
    """What a record holds."""

    vm: str
    """the VM that was recorded"""
    created: str
    """when the recording began, in ISO 8601, UTC"""
    n_windows: int
    """number of windows"""
    interval_s: float
    """length of a window, as planned"""
    duration_s: float
    """length of the record"""
    gfn_start: int
    """the first page"""
    n_pages: int
    """number of pages"""
    page_bytes: int
    """size of a page"""
    tracker: str
    """the tracker of the last session"""
    table_format: str
    """the table format of the last session"""
    stored_bytes: int
    """size of the record on disk"""
    bits_ratio: float | None
    """how many times larger one bit per page and window would be; null if nothing is stored"""
    being_written: bool
    """whether a recording is in progress"""
    loss: str
    """what of the record's end is missing; else empty"""
    mean_young_pages: float | None
    """young pages per window; null without windows"""
    max_young_pages: int | None
    """most young pages of a window; null without windows"""
    n_residency_windows: int
    """windows of which residency and events of pages were recorded"""
    resident_pages: int | None
    """pages resident at the end of the last of these windows; null without any"""
    evicted_pages: int | None
    """pages evicted at the end of the last of these windows; null without any"""
    event_pages: dict[str, int]
    """evictions of pages by whose decision, refaults, restores and drops, over all windows"""
    next_window_jaccard_ratio: float | None
    """with --full, how alike neighbouring windows are, from 0 to 1; else null"""
    saved_pages: float | None
    """cold pages at 0.2 % promotions per minute; null if no threshold keeps to them"""
    reuse: list[ReuseRow]
    """the miss-ratio curve"""
    clock_jumps: list[JumpRow]
    """where the clocks disagree"""
    sessions: list[SessionRow]
    """sources of the bits"""
    layouts: list[LayoutRow]
    """memory layouts"""
    phases: list[PhaseRow]
    """phases of the guest"""


class ViewRow(Output, frozen=True, kw_only=True):
    """One view, compared with the reference; pages are summed over the windows."""

    view: str
    """the record or the table format"""
    n_windows: int
    """windows that were compared"""
    reference_pages: int
    """young pages of the reference"""
    young_pages: int
    """young pages of this view"""
    precision_ratio: float
    """reported pages that are young in the reference, over reported pages"""
    recall_ratio: float
    """reported pages that are young in the reference, over those of the reference"""
    jaccard_ratio: float
    """pages young in both over pages young in either"""
    extra_pages: dict[str, int]
    """pages young here and not in the reference, by what explains them"""
    missing_pages: dict[str, int]
    """pages young in the reference and not here, by what explains them"""


class CompareOutput(Output, frozen=True, kw_only=True):
    """Views of the same windows."""

    reference: str
    """the view that the others are compared with"""
    views: list[ViewRow]
    """the others"""


class CaseRow(Output, frozen=True, kw_only=True):
    """One replay."""

    file: str
    """the record"""
    policy: str
    """the policy"""
    options: dict[str, str]
    """its options, as they were given"""
    budget_pages: int
    """resident memory"""
    refaults: int
    """predicted refaults"""
    refaults_per_minute: float
    """the same per minute"""
    low_refaults_per_minute: float | None
    """the least to expect by the error bar; null without one"""
    high_refaults_per_minute: float | None
    """the most to expect by the error bar; null without one"""
    refault_share: float
    """touches that would have waited for a refault"""
    saved_pages: float
    """mean of the pages that were touched and are not resident"""
    saved_share: float
    """the same as a share of the pages touched so far"""
    wrong_share: float
    """evictions that were undone within four windows"""
    covered_share: float
    """share of the time of its windows that they cover; nothing is known about the rest"""


class RealRunRow(Output, frozen=True, kw_only=True):
    """A prediction, and a real run under the same budget."""

    budget_pages: int
    """resident memory"""
    predicted_refaults: int
    """refaults that the replay predicts"""
    real_refaults: int
    """refaults of the real guest"""


class ErrorBarRow(Output, frozen=True, kw_only=True):
    """How far predictions are off on this host."""

    policy: str
    """the policy"""
    engine: str
    """what ran the guests"""
    lowest_ratio: float
    """the smallest of real over predicted refaults"""
    highest_ratio: float
    """the largest of real over predicted refaults"""
    runs: list[RealRunRow]
    """the runs"""


class WhatifOutput(Output, frozen=True, kw_only=True):
    """Records replayed through policies."""

    cases: list[CaseRow]
    """the replays"""
    error_bars: list[ErrorBarRow]
    """one per policy; empty with --no-check"""
