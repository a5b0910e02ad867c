"""The HTML heatmap in a real browser: what it draws, zooms and says, against the record."""

from __future__ import annotations

import math
import shutil
import tempfile

import numpy as np
import pytest
from waiting import until

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.reclaim.draw.heatmapdata import RecordView, used_view
from kvmhost.reclaim.draw.heatmaphtml import write_html
from kvmhost.reclaim.record.meta import EVENTS, STATES, Memslot
from kvmhost.reclaim.record.reader import YoungRecord
from kvmhost.reclaim.record.residency import WindowResidency
from kvmhost.reclaim.record.writer import RecordWriter

SECOND = 10**9
N_PAGES, N_WINDOWS, GFN = 20_000, 200, 0x400
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1200,800",
)  # fmt: skip
NAME = "</script><b onclick='x'>&amp; vm $1"


def young_at(window):
    """Which pages are young: a block, a diagonal, and one page alone."""
    young = np.zeros(N_PAGES, dtype=bool)
    young[4096:8192] = window % 2 == 0
    young[window * 50 : window * 50 + 50] = True
    young[15_000] = window == 123
    return young


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    slots = [Memslot(0, GFN, 8192, 0x7F0000000000), Memslot(3, GFN + 8192, N_PAGES - 8192)]
    with RecordWriter.create(
        place / "r", N_PAGES, gfn_start=GFN, name=NAME, memslots=slots
    ) as writer:
        for number in range(N_WINDOWS):
            source = Provenance("guestpt", "npt", (number + 5) * SECOND, (number + 6) * SECOND)
            gfns = GFN + np.flatnonzero(young_at(number))
            writer.append(YoungBitmap.from_gfns(GFN, N_PAGES, gfns.tolist(), provenance=source))
    with YoungRecord.open(place / "r") as record, (place / "page.html").open("wb") as file:
        write_html(RecordView(record), file)
    return place / "page.html"


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=driver)
        running = webdriver.Chrome(options=options, service=service)
        yield running
        running.quit()


@pytest.fixture
def shown(browser, page):
    browser.get(page.as_uri())
    settle(browser)
    return browser


def settle(browser):
    """Wait until what is in view has been drawn from its own tiles."""
    until(lambda: script(browser, "return document.getElementById('map').dataset.ready") == "1")


def script(browser, text, *args):
    return browser.execute_script(text, *args)


def element(browser, name):
    return browser.find_element("id", name)


def keys(browser, text):
    element(browser, "map").send_keys(text)
    settle(browser)


def in_view(browser):
    """Return (gfn, gfn end, window, window end) as the range boxes say."""
    gfns = element(browser, "gfns").get_property("value").split(":")
    windows = element(browser, "windows").get_property("value").split(":")
    return (*(int(g, 16) for g in gfns), *(int(w) for w in windows))


def go(browser, gfns, windows):
    for name, text in (("gfns", gfns), ("windows", windows)):
        script(browser, "document.getElementById(arguments[0]).value = arguments[1]", name, text)
    element(browser, "bar").submit()
    settle(browser)


def plot(browser):
    """Return left, top, width and height of the plot inside the canvas, in CSS pixels."""
    width, height = script(
        browser,
        "const b = document.getElementById('map').getBoundingClientRect();"
        "return [Math.floor(b.width), Math.floor(b.height)]",
    )
    return 92, 20, width - 92 - 58, height - 20 - 40


def colour(browser, x, y):
    return tuple(
        script(
            browser,
            "return [...document.getElementById('map').getContext('2d')"
            ".getImageData(arguments[0], arguments[1], 1, 1).data].slice(0, 3)",
            round(x),
            round(y),
        )
    )


def hover(browser, x, y):
    """Put the mouse on a place of the canvas and return what the tooltip says."""
    from selenium.webdriver.common.action_chains import ActionChains

    _, _, width, height = plot(browser)
    middle = (width + 92 + 58) / 2, (height + 20 + 40) / 2
    before = script(browser, "const t = document.getElementById('tip'); t.textContent = ''")
    assert before is None
    ActionChains(browser, duration=0).move_to_element_with_offset(
        element(browser, "map"), round(x - middle[0]), round(y - middle[1])
    ).perform()
    text = until(lambda: element(browser, "tip").text)
    return dict(line.split(None, 1) for line in text.splitlines() if " " in line) | {"all": text}


def test_it_opens_with_everything_in_view_and_without_complaints(shown):
    assert in_view(shown) == (GFN, GFN + N_PAGES, 0, N_WINDOWS)
    assert element(shown, "title").text == NAME + ": pages touched"
    assert element(shown, "notes").text == "residency unknown."
    assert not element(shown, "layers").is_displayed()
    assert "tracker guestpt, format npt" in element(shown, "about").text
    assert [entry for entry in shown.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_keys_zoom_down_to_single_pages_and_the_cells_are_the_records(shown):
    left, top, width, height = plot(shown)
    assert int(script(shown, "return document.getElementById('map').dataset.level")) >= 3
    go(shown, f"{GFN + 15_000 - 40:#x}:{GFN + 15_000 + 40:#x}", "110:130")
    assert script(shown, "return document.getElementById('map').dataset.level") == "0"
    white = colour(shown, left + width * 0.2, top + height * 0.9)
    for window in range(110, 130):
        for page in (14_999, 15_000, 15_001):
            x = left + (window + 0.5 - 110) * width / 20
            y = top + height - (page + 0.5 - 14_960) * height / 80
            expected = bool(young_at(window)[page])
            assert (colour(shown, x, y) != white) == expected, (window, page)
    for _ in range(8):
        keys(shown, "+")
    first, end, low, high = in_view(shown)
    assert end - first <= 9
    assert high - low <= 5
    keys(shown, "0")
    assert in_view(shown) == (GFN, GFN + N_PAGES, 0, N_WINDOWS)


def test_shades_are_the_share_of_young_pages(shown):
    """Half of the windows touch the block: all its cells have one colour at a coarse step."""
    left, top, width, height = plot(shown)
    y = top + height - 6000.5 * height / N_PAGES
    go(shown, "", "")  # refused: nothing changes
    assert "write a range" in element(shown, "complaint").text
    at = [left + (window + 0.5) * width / N_WINDOWS for window in (150, 151, 152, 153)]
    even, odd, even_too, odd_too = (colour(shown, x, y) for x in at)
    assert even == even_too
    assert odd == odd_too == (255, 255, 255)
    assert sum(even) < 250  # dark: all of its pages


def test_the_tooltip_says_what_the_record_says(shown):
    left, top, width, height = plot(shown)
    x, y = left + 123.5 * width / N_WINDOWS, top + height - 15_000.5 * height / N_PAGES
    found = hover(shown, x, y)
    first, end = (int(g, 16) for g in found["gfn"].split()[0].split(":"))
    # A pixel here is for more pages than a cell.
    assert abs(first - GFN - 15_000) < 2 * N_PAGES / height
    young = int(young_at(123)[first - GFN : end - GFN].sum())
    assert found["young"] == f"{young} of {end - first} ({100 * young / (end - first):.2f} %)"
    assert found["window"] == "#123"
    assert found["memslot"].startswith("3, offset 0x")
    assert found["tracker"] == "guestpt (npt)"
    go(shown, f"{GFN + 4090:#x}:{GFN + 4110:#x}", "0:10")
    found = hover(shown, left + 2.5 * width / 10, top + height - 7.5 * height / 20)
    assert found["gfn"] == f"{GFN + 4097:#x}"
    assert found["gpa"] == f"{(GFN + 4097) * 4096:#x}"
    assert found["memslot"] == f"0, offset {4097 * 4096:#x}, hva {0x7F0000000000 + 4097 * 4096:#x}"
    assert found["time"] == "2 s to 3 s"
    assert "\nyoung\n" in found["all"]


def test_the_crosshair_reads_cells_by_keyboard(shown):
    go(shown, f"{GFN + 4096:#x}:{GFN + 4112:#x}", "20:30")
    keys(shown, "c")
    from selenium.webdriver.common.keys import Keys

    def says():
        return until(lambda: element(shown, "tip").text)

    before = says()
    keys(shown, Keys.ARROW_RIGHT)
    after = until(lambda: (text := says()) != before and text)
    assert before.splitlines()[0] == after.splitlines()[0]  # the same gfn
    assert ("\nyoung\n" in before) != ("\nyoung\n" in after)
    keys(shown, Keys.ARROW_UP)
    up = until(lambda: (text := says()) != after and text)
    gfns = [int(text.split()[1], 16) for text in (after, up)]
    assert gfns[1] == gfns[0] + 1
    keys(shown, Keys.ESCAPE)
    assert not element(shown, "tip").is_displayed()


def test_wheel_drag_and_double_click(shown):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    canvas = element(shown, "map")
    origin = ScrollOrigin.from_element(canvas, 100, 50)
    for _ in range(6):
        ActionChains(shown, duration=0).scroll_from_origin(origin, 0, -400).perform()
    settle(shown)
    first, end, low, high = in_view(shown)
    assert (end - first) / N_PAGES == pytest.approx(math.exp(-0.8 * 6), rel=0.2)
    assert high - low < N_WINDOWS / 10
    ActionChains(shown, duration=50).drag_and_drop_by_offset(canvas, 200, 0).perform()
    settle(shown)
    moved = in_view(shown)
    assert moved[:2] == (first, end)
    assert moved[2] < low
    ActionChains(shown).double_click(canvas).perform()
    settle(shown)
    assert in_view(shown) == (GFN, GFN + N_PAGES, 0, N_WINDOWS)


def test_dark_cividis_and_help(shown):
    left, top, _, _ = plot(shown)
    light = colour(shown, left + 30, top + 30)
    element(shown, "theme").click()
    script(
        shown,
        "const p = document.getElementById('palette'); p.value = 'cividis';"
        "p.dispatchEvent(new Event('change'))",
    )
    settle(shown)
    dark = colour(shown, left + 30, top + 30)
    assert sum(light) > 700
    assert sum(dark) < 100
    element(shown, "help").click()
    assert "double click" in element(shown, "keys").text


def test_the_page_asks_nobody_for_anything(shown):
    assert script(shown, "return performance.getEntriesByType('resource').length") == 0


# -- where pages are -----------------------------------------------------------

#: Pages of each window from the third on: the resident ones shrink, the evicted ones grow.
N_SMALL, N_SHORT = 8192, 40


def events_at(window):
    """Which pages are in a state or have an event; residency of the first two is unknown."""
    edge = 800 - 8 * window
    return {
        "resident": range(edge),
        "evicted": range(edge, 800),
        "evicted_daemon": range(edge, edge + 6),
        "evicted_limit": range(edge + 6, edge + 8),
        "refaulted": range(3 * window, 3 * window + 2),
    }


def small_words(gfns):
    return YoungBitmap.from_gfns(0, N_SMALL, list(gfns)).words


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    place = tmp_path_factory.mktemp("layered")
    with RecordWriter.create(place / "r", N_SMALL, name="vm2") as writer:
        for number in range(N_SHORT):
            start = number + 1 + 5 * (number >= 20)
            source = Provenance("dirty", "dirty-log", start * SECOND, (start + 1) * SECOND)
            at = events_at(number)
            residency = WindowResidency(
                {name: small_words(at.get(name, ())) for name in (*STATES, *EVENTS)},
                {name: len(at.get(name, ())) for name in EVENTS},
            )
            young = YoungBitmap.from_gfns(0, N_SMALL, [1000, number], provenance=source)
            writer.append(young, residency=residency if number >= 2 else None)
    with YoungRecord.open(place / "r") as record, (place / "page.html").open("wb") as file:
        write_html(RecordView(record), file)
    return place / "page.html"


def rgb(browser, name):
    """Return a colour of the page's style."""
    text = script(
        browser,
        "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])",
        f"--{name}",
    ).strip()
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def only(browser, *names):
    """Switch on these layers only."""
    for box in browser.find_elements("css selector", "#layers input"):
        if box.is_selected() != (box.get_attribute("id").removeprefix("layer-") in names):
            box.click()
            settle(browser)


def test_cells_show_where_the_pages_are(browser, layered):
    browser.get(layered.as_uri())
    settle(browser)
    only(browser, "states")
    go(browser, "0x2a0:0x300", "0:30")
    left, top, width, height = plot(browser)
    names = {rgb(browser, name): name for name in ("plot", "resident", "evicted")}
    assert len(names) == 3
    for window in (1, 2, 5, 9, 14, 29):
        for page in range(0x2A1, 0x300, 7):
            x = left + (window + 0.5) * width / 30
            y = top + height - (page + 0.5 - 0x2A0) * height / 0x60
            at = events_at(window)
            expected = next((name for name in STATES if page in at[name]), "plot")
            found = names.get(colour(browser, x, y))
            assert found == ("plot" if window < 2 else expected), (window, page)
    only(browser)
    x, y = left + 9.5 * width / 30, top + height - 0.5 * height / 0x60
    assert names[colour(browser, x, y)] == "plot"


def test_evictions_and_refaults_are_layers_of_their_own(browser, layered):
    browser.get(layered.as_uri())
    settle(browser)
    boxes = browser.find_elements("css selector", "#layers label")
    assert [" ".join(box.text.split()) for box in boxes] == [
        "where pages are",
        "▼ evicted by the daemon",
        "▼ evicted at the limit",
        "▲ refaulted",
    ]

    def pixels(name):
        """Count the pixels of the map and of the curve below in the colour of an event."""
        return [
            script(
                browser,
                "const c = document.getElementById(arguments[0]), k = arguments[1];"
                "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
                "let n = 0;"
                "for (let i = 0; i < d.length; i += 4)"
                "  n += d[i] === k[0] && d[i + 1] === k[1] && d[i + 2] === k[2];"
                "return n",
                canvas,
                rgb(browser, name),
            )
            for canvas in ("map", "events")
        ]

    kinds = ("evicted_daemon", "evicted_limit", "refaulted")
    for shown_kind in kinds:
        only(browser, shown_kind)
        for kind in kinds:
            assert all(pixels(kind)) == (kind == shown_kind), (shown_kind, kind)
            assert any(pixels(kind)) == (kind == shown_kind), (shown_kind, kind)


def test_the_tooltip_tells_states_and_events_of_a_cell(browser, layered):
    browser.get(layered.as_uri())
    settle(browser)
    left, top, width, height = plot(browser)
    go(browser, "0x2c0:0x300", "0:20")
    page = 800 - 8 * 9  # evicted by the daemon in window 9
    x, y = left + 9.5 * width / 20, top + height - (page + 0.5 - 0x2C0) * height / 0x40
    found = hover(browser, x, y)
    assert (found["gfn"], found["window"]) == (f"{page:#x}", "#9")
    assert found["state"] == "evicted"
    assert "▼ 1 evicted by the daemon" in found["all"]
    found = hover(browser, left + 0.5 * width / 20, y)
    assert found["state"] == "unknown"
    go(browser, "", "0:40")
    script(browser, "document.getElementById('reset').click()")
    settle(browser)
    found = hover(browser, left + 15.5 * width / 40, top + height - 300.5 * height / N_SMALL)
    first, end = (int(g, 16) for g in found["gfn"].split()[0].split(":"))
    assert found["state"] == f"{end - first} resident, 0 evicted, 0 never touched"


def test_the_working_set_is_above_the_map(browser, layered):
    browser.get(layered.as_uri())
    settle(browser)
    assert element(browser, "notes").text == "reads are not seen; covered 89 % of 45.0 s (1 gap)."
    box = "const b = document.getElementById(arguments[0]).getBoundingClientRect(); return b.top"
    tops = [script(browser, box, name) for name in ("curve", "map", "events")]
    assert tops == sorted(tops)
    drawn = script(
        browser,
        "const c = document.getElementById('curve');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "const found = new Set();"
        "for (let i = 0; i < d.length; i += 4) found.add([d[i], d[i + 1], d[i + 2]].join());"
        "return [...found]",
    )
    for name in ("young", "gap", "soft"):
        assert ",".join(map(str, rgb(browser, name))) in drawn, name


def test_a_page_of_the_used_parts_names_the_gfns_behind_a_cut(browser, tmp_path):
    n_pages = 1 << 16
    with RecordWriter.create(tmp_path / "r", n_pages, gfn_start=0x100) as writer:
        for number in range(30):
            source = Provenance("guestpt", "npt", (number + 1) * SECOND, (number + 2) * SECOND)
            gfns = [0x100 + 600 + number, 0x100 + 50_000 + number]
            writer.append(YoungBitmap.from_gfns(0x100, n_pages, gfns, provenance=source))
    with YoungRecord.open(tmp_path / "r") as record, (tmp_path / "x.html").open("wb") as file:
        write_html(used_view(record), file)
    browser.get((tmp_path / "x.html").as_uri())
    settle(browser)
    assert "left out: 252.0 MiB without a young page (--all shows them)" in (
        element(browser, "notes").text
    )
    shown = (0x100 + 512, 0x100 + 50_176)
    assert in_view(browser) == (*shown, 0, 30)
    left, top, width, height = plot(browser)
    go(browser, f"{0x100 + 49_990:#x}:{0x100 + 50_010:#x}", "0:10")
    found = hover(browser, left + 3.5 * width / 10, top + height - 13.5 * height / 20)
    assert (found["gfn"], found["gpa"]) == (f"{0x100 + 50_003:#x}", f"{(0x100 + 50_003) << 12:#x}")
    assert "\nyoung\n" in found["all"]
    go(browser, "0x2000:0x3000", "0:10")
    assert "leaves them out" in element(browser, "complaint").text


def test_the_command_draws_a_record_and_refuses_what_does_not_fit(page, tmp_path, capsys):
    from kvmhost.errors import LayoutError
    from kvmhost.tools.young.heatmap import main

    record = str(page.parent / "r")
    assert main([record, "-o", str(tmp_path / "x.html"), "--windows=-60:"]) == 0
    assert "60 windows, down to single gfns" in capsys.readouterr().out
    assert main([record, "-o", str(tmp_path / "y.html"), "--range", "0x500:0x510"]) == 0
    for words, text in (
        ([record, "-o", str(tmp_path / "z.html"), "--count", "3"], "apply to running VMs"),
        ([record, "-o", str(tmp_path / "x.gif")], r"\.html"),
        ([record, "-o", str(tmp_path / "x.html"), "--range", "0:1"], "out of range"),
        ([record, "-o", str(tmp_path / "x.html"), "--windows", "5:900"], "windows 0 to 199"),
        (["vm1", "-o", str(tmp_path / "x.html"), "--windows", "0:3"], "needs a record"),
    ):
        with pytest.raises(LayoutError, match=text):
            main(words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.html", "y.html"]
