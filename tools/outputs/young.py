"""Outputs of ``kvmhost young``: of running VMs, and of records."""

from __future__ import annotations

from typing import Literal

from kvmhost.control.schema import Page
from kvmhost.tools.outputs.base import Output

__all__ = [
    "AgeRow",
    "AgesOutput",
    "Covered",
    "DiffOutput",
    "DiffRange",
    "ExportOutput",
    "HistoryRow",
    "HotOutput",
    "HotRow",
    "ImportOutput",
    "LengthRow",
    "PageNow",
    "PlaceOutput",
    "RecordOutput",
    "SavingRow",
    "StretchRow",
    "WindowRow",
    "WorkingSetOutput",
    "YoungPageOutput",
    "YoungSlot",
    "YoungSnapshotOutput",
]


class Covered(Output, frozen=True, kw_only=True):
    """How much of the time was seen: gaps between windows were not."""

    covered_s: float
    """time that the windows cover"""
    covered_share: float
    """the same as a share of the time from the first to the last window"""
    n_gaps: int
    """gaps between windows"""


class YoungSlot(Output, frozen=True, kw_only=True):
    """The part of a memslot that was harvested."""

    slot: int
    """its number"""
    gfn_start: int
    """the first page that was harvested"""
    n_pages: int
    """pages that were harvested"""
    n_young: int
    """young pages among them"""


class YoungSnapshotOutput(Output, frozen=True, kw_only=True):
    """One bitmap."""

    vm: str
    """the VM or process"""
    gfn_start: int
    """the first page that was harvested"""
    n_pages: int
    """pages that were harvested"""
    n_young: int
    """young pages among them"""
    n_resident: int | None
    """resident pages among them; null for a process, of which it is unknown"""
    n_evicted: int | None
    """evicted pages among them; null for a process"""
    not_seen: str
    """what the tracker does not see, such as reads; empty if nothing"""
    coarse: bool
    """whether some bits stand for more than one page"""
    tracker: str
    """where the bits come from"""
    table_format: str
    """format of the table that was walked"""
    window_start_ns: int
    """begin of the window, on the monotonic clock; 0 if it is unknown"""
    window_end_ns: int
    """end of the window, on the monotonic clock"""
    evidence: str
    """how the tracker found that cleared bits are set again on this host; empty if it needs none"""
    harvest_ns: int
    """time spent testing and clearing"""
    rearm_ns: int
    """time spent re-arming"""
    memslots: list[YoungSlot]
    """the memslots in the range"""
    ranges: list[tuple[int, int]]
    """the young pages, as pairs of gfn_start and n_pages"""


class RecordOutput(Output, frozen=True, kw_only=True):
    """The recording of a VM has ended."""

    vm: str
    """the VM"""
    file: str
    """the record"""
    n_windows: int
    """windows that this command wrote"""
    total_windows: int
    """windows that the record has now"""
    late_windows: int
    """windows that began late, because a harvest took longer than the interval"""
    reason: str
    """why it ended"""


class LengthRow(Output, frozen=True, kw_only=True):
    """One length over which the working set is counted."""

    n_windows: int
    """the length"""
    mean_pages: float | None
    """mean of the working set; null without windows"""
    max_pages: int | None
    """largest working set; null without windows"""


class WindowRow(Output, frozen=True, kw_only=True):
    """The working set at the end of a window."""

    window: int
    """its number"""
    elapsed_s: float
    """its end, since the record began"""
    young_pages: list[int]
    """pages young in the last windows, by the lengths in `lengths`"""


class WorkingSetOutput(Covered, frozen=True, kw_only=True):
    """Working sets over several lengths of time."""

    page_bytes: int
    """size of a page"""
    lengths: list[LengthRow]
    """the lengths, each as windows"""
    windows: list[WindowRow]
    """the windows"""


class SavingRow(Output, frozen=True, kw_only=True):
    """The lowest threshold that keeps to the target, and what it saves."""

    cold_after_windows: int
    """pages older than that are cold"""
    saved_pages: float
    """mean of the pages that are cold"""
    saved_share: float
    """the same as a share of all pages"""
    promotions_per_minute: float
    """cold pages that become young"""


class AgeRow(Output, frozen=True, kw_only=True):
    """Pages of one age, and what the age would mean as a threshold."""

    n_windows: int
    """the age"""
    age_s: float
    """the same as time, by the interval of the record"""
    n_pages: int
    """pages that were last young so long ago"""
    colder_pages: int
    """pages that are older"""
    colder_share: float
    """the same as a share of all pages"""
    promotions_per_minute: float | None
    """pages that become young after having been older; null if the windows are too few"""
    promotion_share_per_minute: float | None
    """the same as a share of the working set"""


class AgesOutput(Covered, frozen=True, kw_only=True):
    """Ages of the pages at the end of the windows."""

    page_bytes: int
    """size of a page"""
    n_pages: int
    """all pages"""
    never_young_pages: int
    """pages that were young in no window"""
    target_share_per_minute: float
    """promotions that are acceptable, as a share of the working set"""
    saving: SavingRow | None
    """what the target allows; null if no threshold keeps to it"""
    ages: list[AgeRow]
    """ages, the youngest first"""


class HotRow(Output, frozen=True, kw_only=True):
    """One range of hot pages."""

    gfn_start: int
    """its first page"""
    n_pages: int
    """its length"""
    hot_pages: int
    """pages of it that are hot themselves"""
    young_share: float
    """share of the time that its pages were young, mean over the pages"""


class HotOutput(Covered, frozen=True, kw_only=True):
    """Ranges of pages that are young most of the time."""

    page_bytes: int
    """size of a page"""
    n_windows: int
    """windows that were counted"""
    hot_pages: int
    """hot pages in all ranges"""
    ranges: list[HotRow]
    """the ranges, those with most hot pages first"""


class DiffRange(Output, frozen=True, kw_only=True):
    """Pages that were young on one side only."""

    side: Literal["first", "second"]
    """on which side"""
    gfn_start: int
    """the first page"""
    n_pages: int
    """number of pages"""


class DiffOutput(Output, frozen=True, kw_only=True):
    """Which pages were young on each of two sides."""

    page_bytes: int
    """size of a page"""
    first_pages: int
    """pages young on the first side"""
    second_pages: int
    """pages young on the second side"""
    both_pages: int
    """pages young on both"""
    jaccard_ratio: float
    """pages young on both over pages young on either"""
    ranges: list[DiffRange]
    """pages young on one side only"""


class PlaceOutput(Output, frozen=True, kw_only=True):
    """A guest address in all its forms."""

    gfn: int
    """the page"""
    gpa: int
    """guest physical address"""
    slot: int
    """memslot"""
    slot_offset_bytes: int
    """offset in the memslot"""
    hva: int | None
    """address in the VM process; null if it is unknown"""


class StretchRow(Output, frozen=True, kw_only=True):
    """Windows in which a page was young in all, or in none."""

    young: bool
    """whether it was young"""
    first_window: int
    """the first window"""
    n_windows: int
    """number of windows"""
    start_s: float
    """begin of the first window, since the record began"""
    end_s: float
    """end of the last window, since the record began"""


class HistoryRow(Output, frozen=True, kw_only=True):
    """What a record has on one page."""

    place: PlaceOutput | None
    """where the page lay in the last window; null if it was in no memslot"""
    n_windows: int
    """windows of the record"""
    young_windows: int
    """windows in which it was young"""
    coarse_windows: int
    """those of them in which its bit stood for more than one page"""
    first_young_window: int | None
    """the first window in which it was young; null for never"""
    last_young_window: int | None
    """the last window in which it was young; null for never"""
    age_windows: int | None
    """windows since it was last young, 1 for the last window; null for never"""
    longest_idle_windows: int | None
    """most windows between two in which it was young; null without two"""
    stretches: list[StretchRow]
    """its whole history"""


class PageNow(Output, frozen=True, kw_only=True):
    """What a running VM knows of one page."""

    page: Page
    """its state"""
    young: bool
    """whether it was touched since the tracker's window began"""
    coarse: bool
    """whether its bit stands for more than one page"""
    tracker: str
    """where the bit comes from"""
    table_format: str
    """format of the table that was walked"""
    window_start_ns: int
    """begin of the window, on the monotonic clock; 0 if it is unknown"""


class YoungPageOutput(Output, frozen=True, kw_only=True):
    """One page, in a record or in a running VM."""

    gfn: int
    """the page"""
    history: HistoryRow | None
    """of a record; null for a VM"""
    now: PageNow | None
    """of a VM; null for a record"""


class ExportOutput(Output, frozen=True, kw_only=True):
    """A record was written in another format."""

    file: str
    """what was written"""
    format: str
    """its format"""
    n_windows: int
    """windows in it"""
    n_gfns: int | None
    """gfns in it, of formats that list them once; else null"""


class ImportOutput(Output, frozen=True, kw_only=True):
    """A record was made."""

    file: str
    """the record"""
    format: str
    """the format that was read"""
    n_windows: int
    """windows in it"""
    n_pages: int
    """pages in it"""
    remark: str
    """what could not be taken over; else empty"""
