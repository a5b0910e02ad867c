"""The HTML heatmap in a real browser: what it draws, zooms and says, against the record."""

from __future__ import annotations

import math
import shutil
import tempfile

import numpy as np
import pytest
from waiting import until

from kvmhost.bitmap import Provenance, YoungBitmap
from kvmhost.reclaim.draw.heatmapdata import RecordView
from kvmhost.reclaim.draw.heatmaphtml import write_html
from kvmhost.reclaim.record.meta import Memslot
from kvmhost.reclaim.record.reader import YoungRecord
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
    assert not element(shown, "notes").is_displayed()
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
