"""The live view on a VM that is made up: what it draws, its keys, its pace."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until_async

from kvmhost import trackers
from kvmhost.bitmap import Provenance, YoungBitmap, pack
from kvmhost.control.schema import (
    Counters,
    HarvestTotals,
    LeaseInfo,
    MachineCounters,
    MemoryMap,
    MemslotInfo,
    Residency,
    VmState,
)
from kvmhost.errors import ControlError, InUseError, VmGoneError
from kvmhost.process.attach import Attached
from kvmhost.reclaim.watch import data as watchdata
from kvmhost.reclaim.watch.data import Generation, WatchSampler, parse_generations
from kvmhost.reclaim.watch.map import (
    EVENT_MARKS,
    Grid,
    bar,
    counts_of,
    draw_changes,
    draw_density,
    sparkline,
)
from kvmhost.units import size_text
from kvmhost.vm import Harvest

PAGES = 4096


class FakeVm:
    """Answers as a VM's client does; ``young`` is what the next harvest finds."""

    vm = "v"

    def __init__(self):
        self.young = np.zeros(PAGES, dtype=bool)
        self.regions = [(0, 0, 3072), (1, 3584, 512)]
        self.lease = None
        self.gone = False
        self.pid = 77
        self.pager = {"evictions": 100, "fault_ins": 50, "evicted_pages": 256}
        self.harvests = []
        self.others, self.used = False, "auto"
        self.works = {"auto", "guestpt", "pagemap"}
        self.evicted = slice(PAGES // 2, PAGES // 2 + 512)
        #: Events before the view began, and those since, with the number of each reply's first.
        self.log = [("evicted_daemon", 7)]

    def _here(self):
        if self.gone:
            raise VmGoneError("v", "hung up")

    def state(self):
        self._here()
        return VmState(
            name="v", pid=self.pid, engine="kvm", image="/x/hot\x1b[31m.elf", params={},
            running=True, paused=False, status=None, error=None, uptime_s=1.0, vcpus=[],
            exits=0, doorbells=0, mem_bytes=14 << 20, resident_bytes=8 << 20,
            resident_max_bytes=10 << 20, tracker="guestpt", lease=self.lease,
        )  # fmt: skip

    def memory_map(self):
        regions = [
            MemslotInfo(slot, gfn * 4096, n * 4096, gfn, n, 0) for slot, gfn, n in self.regions
        ]
        return MemoryMap(4096, max(r.gfn_start + r.n_pages for r in regions), regions, [])

    def counters(self):
        machine = MachineCounters(0, 0, 1.0, 8 << 20)
        return Counters(machine, HarvestTotals(0, 0, 0, 0, 0), self.pager)

    def residency(self, since):
        bits = [np.zeros(PAGES, dtype=bool) for _ in range(2)]
        bits[0][: PAGES // 2] = True
        bits[1][self.evicted] = True
        resident, evicted = (pack(mask).astype("<u8").tobytes() for mask in bits)
        # Two events a reply, so that a tick takes several.
        told, end = self.log[since : since + 2], min(since + 2, len(self.log))
        gfns = {name: np.array([g for n, g in told if n == name], "<u8") for name, _ in told}
        counts = {name: found.size for name, found in gfns.items()}
        packed = {name: found.tobytes() for name, found in gfns.items()}
        return Residency(resident, evicted, counts, packed, end, 0, len(self.log) - end)

    def harvest(self, *, tracker, view, max_age_s, force):
        self._here()
        if tracker not in self.works:
            raise ControlError(501, f"tracker {tracker} does not work here")
        if self.others and tracker not in ("auto", self.used) and not force:
            raise InUseError(f"tracker {self.used}", "is in use by record")
        self.used = tracker
        self.harvests.append((tracker, view, max_age_s, force))
        source = Provenance("guestpt" if tracker == "auto" else tracker, "npt", 1, 2)
        bitmap = YoungBitmap.from_gfns(
            0, PAGES, np.flatnonzero(self.young).tolist(), provenance=source
        )
        return Harvest(bitmap, 1_500_000, 2_000_000)


@pytest.fixture
def fake():
    return FakeVm()


# -- what is gathered ----------------------------------------------------------


def test_a_tick_counts_ages_working_set_and_rates(fake):
    seconds = iter(range(0, 1000, 2))
    sampler = WatchSampler(fake, clock=lambda: next(seconds))
    fake.young[:100] = True
    sampler.sample()
    fake.young[:] = False
    fake.young[100:130] = True
    fake.pager = {"evictions": 110, "fault_ins": 70, "evicted_pages": 300}
    second = sampler.sample()
    assert (second.evictions, second.faults, second.evicted_pages) == (5.0, 10.0, 300)
    assert second.wss_pages == 130
    assert list(sampler.history) == [100, 130]
    found = {each.label: each.pages for each in second.generations}
    assert (found["1"], found["2"]) == (30, 100)
    assert found["never"] == 3072 + 512 - 130
    assert sum(found.values()) == 3072 + 512
    fake.young[:] = False
    for _ in range(watchdata.RECENT - 1):
        third = sampler.sample()
    assert third.wss_pages == 30
    assert (third.harvest_ms, third.rearm_ms) == (1.5, 2.0)


def test_each_tick_is_a_window_of_its_own_view(fake):
    fake.lease = LeaseInfo("reclaimd", 1, "", 10.0, 1.0, 0.0)
    WatchSampler(fake, view="mine", interval_s=2.0).sample()
    assert fake.harvests == [("auto", "mine", 0.5, False)]


def test_a_tracker_is_forced_once_and_a_refused_one_is_not_kept(fake):
    sampler = WatchSampler(fake, "guestpt")
    sampler.sample()
    fake.others = True
    assert sampler.next_tracker() == "pagemap"
    with pytest.raises(InUseError, match="record"):
        sampler.sample()
    assert sampler.tracker == "guestpt"
    sampler.sample()
    sampler.next_tracker(force=True)
    assert sampler.sample().tracker == "pagemap"
    sampler.sample()
    assert [(tracker, force) for tracker, _, _, force in fake.harvests] == [
        ("guestpt", False), ("guestpt", False), ("pagemap", True), ("pagemap", False),
    ]  # fmt: skip


def test_a_daemons_generations_are_read_the_youngest_first():
    text = "memcg     0 v\n node     0\n          3      12000        100          0\n"
    text += "          4        700         25          5\nodd line\n"
    assert parse_generations(text) == [Generation("4", 30), Generation("3", 100)]
    assert parse_generations("") == []


def test_a_vm_that_began_anew_begins_the_view_anew(fake):
    sampler = WatchSampler(fake)
    fake.young[:100] = True
    sampler.sample()
    fake.pid, fake.regions = 78, [(0, 0, 8192)]
    found = sampler.sample()
    assert (found.tick, sampler.n_pages) == (1, 8192)
    assert found.young.size <= 8192


def test_trackers_go_round(fake):
    sampler = WatchSampler(fake)
    names = [sampler.next_tracker() for _ in range(len(trackers.NAMES) + 1)]
    assert names == [*trackers.NAMES, trackers.NAMES[0]]


# -- the map -------------------------------------------------------------------


@given(
    st.integers(20, 250), st.integers(1, 80), st.integers(1, 1 << 30), st.floats(0, 1),
    st.integers(0, 40),
)  # fmt: skip
def test_cells_fill_the_terminal_and_zoom_to_single_pages(width, height, n_pages, at, zoom):
    whole = Grid.fit(width, height, n_pages)
    assert whole.start == 0
    assert whole.end == n_pages
    grid = Grid.fit(width, height, n_pages, int(at * n_pages), zoom)
    assert grid.cell_pages == max(whole.cell_pages >> zoom, 1)
    assert 0 <= grid.start < grid.end <= n_pages
    assert grid.start % grid.cell_pages == 0
    assert grid.columns + 12 <= max(width, 28)
    assert grid.range_of(0)[0] == grid.start
    last = grid.range_of(grid.n_cells() - 1)
    assert last[0] < last[1] == grid.end


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_counts_are_those_of_each_cells_pages(n_pages, seed, zoom):
    mask = np.random.default_rng(seed).random(n_pages) < 0.3
    grid = Grid.fit(80, 6, n_pages, n_pages // 2, zoom)
    counts = counts_of(mask, grid)
    expected = [int(mask[slice(*grid.range_of(cell))].sum()) for cell in range(grid.n_cells())]
    assert counts.tolist() == expected


def rows_of(text):
    return [line[12:] for line in text.plain.splitlines()]


def test_shades_holes_and_labels():
    mapped = np.ones(1024, dtype=bool)
    mapped[512:528] = False
    young = np.zeros(1024, dtype=bool)
    young[:16], young[16:20], young[32] = True, True, True
    text = draw_density(young, mapped, Grid.fit(44, 2, 1024), cursor=1)
    rows = rows_of(text)
    assert rows == ["█▒░" + "·" * 29, " " + "·" * 31]
    assert [line[:10].strip() for line in text.plain.splitlines()] == ["0x0", "0x200"]
    reverse = [span for span in text.spans if getattr(span.style, "reverse", False)]
    assert text.plain[reverse[0].start : reverse[0].end] == "▒"


def test_cells_without_a_young_page_show_what_most_of_their_pages_are():
    mapped = np.ones(1024, dtype=bool)
    young, resident, evicted = np.zeros((3, 1024), dtype=bool)
    young[16], resident[:72], evicted[72:200] = True, True, True
    mapped[960:976] = False
    text = draw_density(young, mapped, Grid.fit(44, 2, 1024), 0, (resident, evicted))
    # Sixteen pages a cell; the fifth is half resident, half evicted.
    assert rows_of(text)[0] == ":░::" + "o" * 9 + "·" * 19
    assert rows_of(text)[1] == "·" * 28 + " " + "·" * 3


def test_a_sample_has_residency():
    sample = WatchSampler(FakeVm()).sample()
    assert int(sample.resident.sum()) == PAGES // 2
    assert np.flatnonzero(sample.evicted).tolist() == list(range(PAGES // 2, PAGES // 2 + 512))


def test_a_sample_has_what_happened_in_its_tick_and_by_whose_decision(fake):
    sampler = WatchSampler(fake)
    first = sampler.sample()
    assert (first.moved, sum(first.counts.values())) == ({}, 0)
    fake.log += [("evicted_daemon", 7), ("evicted_limit", 9), ("refaulted", 7), ("dropped", 1)]
    fake.log += [("evicted_daemon", 8)]
    second = sampler.sample()
    gfns = {name: np.flatnonzero(mask).tolist() for name, mask in second.moved.items()}
    assert gfns == {"evicted_daemon": [7, 8], "evicted_limit": [9], "refaulted": [7]}
    assert {name: count for name, count in second.counts.items() if count} == {
        "evicted_daemon": 2, "evicted_limit": 1, "refaulted": 1,
    }  # fmt: skip
    assert sampler.sample().moved == {}


def test_cells_with_events_have_a_letter_of_the_cause():
    mapped, none = np.ones(1024, dtype=bool), np.zeros(1024, dtype=bool)
    moved = {name: none.copy() for name in ("evicted_daemon", "evicted_limit", "refaulted")}
    moved["evicted_daemon"][[0, 1, 16, 48]] = True
    moved["evicted_limit"][[2, 33]] = True
    moved["refaulted"][[17, 64]] = True
    text = draw_density(mapped, mapped, Grid.fit(44, 2, 1024), 9, moved=moved)
    assert rows_of(text)[0] == "DxLD^" + "█" * 27
    assert set(EVENT_MARKS) == set(watchdata.SHOWN_EVENTS)
    assert len({mark for mark, _ in EVENT_MARKS.values()}) == len(EVENT_MARKS)


def test_only_the_used_parts_of_a_large_memory_are_chosen(fake):
    fake.regions, fake.evicted = [(0, 0, 1 << 16)], slice(0, 0)
    sampler = WatchSampler(fake)
    assert sampler.used_parts().ranges == ((0, 1 << 16),)  # nothing is known yet
    fake.young[600:700] = True
    sampler.sample()
    assert sampler.used_parts().ranges == ((512, 1024),)
    fake.evicted = slice(PAGES - 1, PAGES)
    sampler.sample()
    assert sampler.used_parts().ranges == ((512, 1024), (PAGES - 512, PAGES))
    fake.young[:], fake.evicted = False, slice(0, 0)
    sampler.sample()
    assert sampler.used_parts().ranges == ((512, 1024), (PAGES - 512, PAGES))


def test_changes_since_a_mark():
    before, now = np.zeros((2, 64), dtype=bool)
    before[[0, 4, 8]] = True
    now[[0, 5, 9, 8, 12]] = True
    grid = Grid(0, 64, 16, 1, 4)
    drawn = rows_of(draw_changes(before, now, np.ones(64, dtype=bool), grid, 15))
    assert drawn == ["=±++" + "·" * 12]
    back = rows_of(draw_changes(now, before, np.ones(64, dtype=bool), grid, 15))
    assert back == ["=±--" + "·" * 12]


def test_little_pictures():
    assert sparkline([0, 4, 8], 10) == "▁▅█"
    assert sparkline([1, 2, 3, 4], 2) == "▇█"
    assert sparkline([0, 0], 9) == "▁▁"
    assert sparkline([], 9) == ""
    assert [bar(share, 4) for share in (0, 0.5, 1, 2)] == ["    ", "██  ", "████", "████"]
    assert [size_text(n) for n in (0, 4096, 3 << 19, 5 << 40)] == [
        "0 B", "4.0 KiB", "1.5 MiB", "5.0 TiB"
    ]  # fmt: skip


# -- the view ------------------------------------------------------------------


@pytest.fixture
def watchapp():
    pytest.importorskip("textual")
    from kvmhost.reclaim.watch import app as watchapp

    return watchapp


def test_a_tick_that_costs_much_makes_ticks_rarer(watchapp):
    times = types.SimpleNamespace(wall=0.0, cpu=0.0)
    pace = watchapp.Pace(1.0, clock=lambda: times.cpu, wall=lambda: times.wall)

    def tick(cost_s):
        times.wall += pace.interval_s
        times.cpu += cost_s
        return pace.next_s()

    assert tick(0.01) == 1.0
    assert pace.share == pytest.approx(0.01)
    used, began = times.cpu, times.wall
    for _ in range(50):
        tick(0.4)
    assert pace.interval_s == pytest.approx(10.0)
    assert (times.cpu - used) / (times.wall - began) < 0.05
    for _ in range(50):
        tick(0.001)
    assert pace.interval_s == 1.0


def screen_text(app):
    """Return what each part shows, as plain text."""
    return {
        name: str(app.screen_stack[0].query_one(f"#{name}").render())
        for name in ("head", "map", "cell", "figures", "keys")
    }


def drive(watchapp, fake, steps, size=(80, 24)):
    """Run the view with a pilot: ``steps(app, pilot)`` after its first tick."""

    async def run():
        app = watchapp.WatchApp(WatchSampler(fake), 0.01)
        async with app.run_test(size=size) as pilot:
            await until_async(
                lambda: app.sample is not None and "0x0" in screen_text(app)["map"], pilot.pause
            )
            await steps(app, pilot)
        return app

    return asyncio.run(run())


@pytest.mark.parametrize("size", [(80, 24), (132, 43), (60, 15)])
def test_everything_fits_the_terminal(watchapp, fake, size):
    fake.young[1024:2048] = True

    async def steps(app, pilot):
        await pilot.press("space")
        await until_async(lambda: "PAUSED" in screen_text(app)["head"], pilot.pause)
        shown = screen_text(app)
        grid = app.grid()
        assert grid.start == 0
        assert grid.end == PAGES
        cells = "".join(rows_of(types.SimpleNamespace(plain=shown["map"])))
        counts = counts_of(fake.young, grid)
        assert [at for at, cell in enumerate(cells) if cell == "█"] == [
            at for at in range(grid.n_cells()) if counts[at] == grid.cell_pages
        ]
        assert r"hot\u001b[31m.elf" in shown["head"]
        assert "limit 10.0 MiB" in shown["head"]
        assert "4.0 MiB" in shown["figures"]
        assert "evictions" in shown["figures"]
        if size[0] >= 80:
            del shown["head"]  # what matters least is cut off there
            lines = [line for part in shown.values() for line in part.splitlines()]
            assert [line for line in lines if len(line) > size[0]] == []

    drive(watchapp, fake, steps, size)


def test_zoom_move_mark_and_help(watchapp, fake):
    fake.young[100:200] = True

    async def steps(app, pilot):
        await pilot.press("down", "right", "right")
        page = app.grid().range_of(app.cursor_cell)[0]
        before = app.grid().cell_pages
        await pilot.press("plus")
        assert app.grid().cell_pages == max(before // 4, 1)
        low, high = app.grid().range_of(app.cursor_cell)
        assert low <= page < high
        for _ in range(6):
            await pilot.press("plus")
        assert app.grid().cell_pages == 1
        low = app.grid().range_of(app.cursor_cell)[0]
        await pilot.press(*["down"] * 20)
        assert app.grid().range_of(app.cursor_cell)[0] > low
        assert f"gfn {app.grid().range_of(app.cursor_cell)[0]:#x} " in screen_text(app)["cell"]
        await pilot.press("0")
        assert app.grid().end - app.grid().start == PAGES
        await pilot.press("m")
        fake.young[:] = False
        fake.young[150:300] = True
        await until_async(lambda: "+100 -50 alike 25 %" in screen_text(app)["cell"], pilot.pause)
        assert "+" in "".join(rows_of(types.SimpleNamespace(plain=screen_text(app)["map"])))
        await pilot.press("m")
        assert "alike" not in screen_text(app)["cell"]
        await pilot.press("question_mark")
        assert len(app.screen_stack) == 2
        await pilot.press("x")
        assert len(app.screen_stack) == 1
        await pilot.press("v")
        assert f"last {watchdata.RECENT}" in screen_text(app)["cell"]
        await pilot.press("q")

    assert drive(watchapp, fake, steps).return_code == 0


def test_events_are_a_layer_beside_who_decided(watchapp, fake):
    fake.young[:] = True

    async def steps(app, pilot):
        await pilot.press("p")
        await until_async(lambda: "PAUSED" in screen_text(app)["head"], pilot.pause)
        fake.log += [("evicted_limit", 0), ("evicted_limit", 1), ("refaulted", 3000)]
        await pilot.press("p")
        await pilot.pause()
        await until_async(lambda: app.sample.moved, pilot.pause)
        sample = app.sample
        await pilot.press("p")
        await until_async(lambda: "PAUSED" in screen_text(app)["head"], pilot.pause)
        app.sample = sample
        app.draw()
        shown = screen_text(app)
        cells = "".join(rows_of(types.SimpleNamespace(plain=shown["map"])))
        assert cells[0] == "L"
        assert cells[3000 // app.grid().cell_pages] == "^"
        assert ", 2 evicted (limit)" in shown["cell"]
        assert "(limit 2 in this tick)" in shown["figures"]
        await pilot.press("e")
        shown = screen_text(app)
        assert "L" not in "".join(rows_of(types.SimpleNamespace(plain=shown["map"])))
        assert "evicted (limit)" not in shown["cell"]

    drive(watchapp, fake, steps)


def test_a_mostly_idle_memory_shows_the_used_parts(watchapp, fake):
    fake.regions, fake.evicted = [(0, 0, 1 << 16)], slice(0, 0)

    async def steps(app, pilot):
        fake.young[600:700] = True
        head = "254.0 MiB unused left out (u)"
        await until_async(lambda: head in screen_text(app)["head"], pilot.pause)
        assert app.grid().n_pages == 512
        assert screen_text(app)["map"].split()[0] == "0x200"
        assert screen_text(app)["cell"].startswith("gfn 0x200 ")
        await pilot.press(*["right"] * 88)
        assert screen_text(app)["cell"].startswith("gfn 0x258 ")  # 600: the first young one
        assert "1 of 1 young" in screen_text(app)["cell"]
        fake.young[3000] = True
        await until_async(lambda: app.grid().n_pages == 1024, pilot.pause)
        assert screen_text(app)["cell"].startswith("gfn 0x258 ")
        await pilot.press("u")
        assert app.grid().n_pages == 1 << 16
        assert "left out" not in screen_text(app)["head"]
        assert (
            app.grid().range_of(app.cursor_cell)[0] <= 600 < app.grid().range_of(app.cursor_cell)[1]
        )
        await pilot.press("u")
        assert app.grid().n_pages == 1024

    drive(watchapp, fake, steps, size=(132, 43))


def test_another_process_has_unknown_residency_and_does_not_come_back(watchapp):
    """Memory of this very process, by a tracker that changes nothing."""
    with memory_of_this_process(1024) as (address, touch):
        touch(range(16))
        source = Attached(os.getpid(), hex(address))

        async def steps(app, pilot):
            shown = screen_text(app)
            assert shown["head"].strip().startswith(f"pid {os.getpid()}  PAUSED  present (host-")
            assert "touches after the first not seen" in shown["head"]
            assert "4.0 MiB, residency unknown" in shown["head"]
            assert "16 of 16 young" in shown["cell"] or "1 of 1 young" in shown["cell"]
            assert "resident" not in shown["cell"]
            assert "evictions -/s" in shown["figures"]
            names = [app.sampler.next_tracker() for _ in range(5)]
            assert sorted(names) == ["idle", "pageout", "present", "soft-dirty", "written"]

        async def run():
            app = watchapp.WatchApp(WatchSampler(source, "present"), 0.01)
            async with app.run_test(size=(132, 24)) as pilot:
                await until_async(lambda: app.sample is not None, pilot.pause)
                await pilot.press("p")
                await until_async(lambda: "PAUSED" in screen_text(app)["head"], pilot.pause)
                await steps(app, pilot)
            assert app.sampler.is_process

        with source:
            asyncio.run(run())


@contextlib.contextmanager
def memory_of_this_process(n_pages):
    """Map a memfd; yield its address, and a function that touches pages."""
    fd = os.memfd_create("watched")
    try:
        os.ftruncate(fd, n_pages * mmap.PAGESIZE)
        with mmap.mmap(fd, n_pages * mmap.PAGESIZE) as memory:

            def touch(pages):
                for page in pages:
                    memory[page * mmap.PAGESIZE] = 1

            view = np.frombuffer(memory, dtype=np.uint8)
            address = view.ctypes.data
            del view
            yield address, touch
    finally:
        os.close(fd)


def test_paused_nothing_is_harvested(watchapp, fake):
    async def steps(app, pilot):
        await pilot.press("p")
        await until_async(lambda: "PAUSED" in screen_text(app)["head"], pilot.pause)
        n = len(fake.harvests)
        for _ in range(3):
            # A round of its loop ends by waiting for the next wake.
            app._wake.set()
            await until_async(lambda: not app._wake.is_set(), pilot.pause)
        assert len(fake.harvests) == n
        await pilot.press("p")
        await until_async(lambda: len(fake.harvests) > n, pilot.pause)

    drive(watchapp, fake, steps)


def test_trackers_that_do_not_work_are_said_and_passed(watchapp, fake, monkeypatch):
    monkeypatch.setattr(watchapp, "_RETRY_S", 0.01)

    async def steps(app, pilot):
        await pilot.press("t")
        await until_async(lambda: "pagemap (npt)" in screen_text(app)["head"], pilot.pause)
        await pilot.press("t")
        await until_async(lambda: "dirty does not work" in screen_text(app)["head"], pilot.pause)
        for _ in range(len(trackers.NAMES) - 2):
            await pilot.press("t")
        await until_async(lambda: "guestpt (npt)" in screen_text(app)["head"], pilot.pause)

    drive(watchapp, fake, steps)


def test_a_vm_that_goes_away_may_come_back(watchapp, fake, monkeypatch):
    monkeypatch.setattr(watchapp, "_RETRY_S", 0.01)

    async def steps(app, pilot):
        fake.gone = True
        await until_async(
            lambda: "waiting for it to return" in screen_text(app)["head"], pilot.pause
        )
        assert "0x0" in screen_text(app)["map"]
        fake.gone, fake.pid = False, 99
        await until_async(lambda: "kvm" in screen_text(app)["head"], pilot.pause)
        assert app.sample.state.pid == 99

    drive(watchapp, fake, steps)


def test_the_help_says_how_much_processor_time_a_view_takes():
    from kvmhost.reclaim.watch.app import MOST_SHARE
    from kvmhost.tools.young.watch import parser

    assert f"at most {100 * MOST_SHARE:g} % of a core" in " ".join(parser().format_help().split())
