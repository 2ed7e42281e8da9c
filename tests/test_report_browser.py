"""The report in a real browser: it sorts, filters, obeys the keyboard, fits a phone, complains and asks of nothing."""

import pytest

from browser import CHROMIUM, Page
from lorasure.report.page import report
from lorasure.report.settings import ReportSettings
from report_folders import make_all

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
    pytest.mark.slow,
]
COLUMN = "[...document.querySelectorAll('.questions tbody tr:not([hidden])')].map(r => r.cells[{0}].textContent)"
HEADING = "document.querySelector('.questions thead').rows[0].cells[{0}]"
OPEN = "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    with Page(report([make_all(folder, text=OPEN)], ReportSettings()), folder / "profile") as opened:
        yield opened


def numbers(page, column):
    return [float(text) for text in page.js(COLUMN.format(column))]


def test_a_click_sorts_by_number_and_again_the_other_way(page):
    before = numbers(page, 4)
    assert before != sorted(before)
    page.js(f"{HEADING.format(4)}.querySelector('button').click()")
    assert numbers(page, 4) == sorted(before)
    assert page.js(f"{HEADING.format(4)}.getAttribute('aria-sort')") == "ascending"
    page.js(f"{HEADING.format(4)}.querySelector('button').click()")
    assert numbers(page, 4) == sorted(before, reverse=True)
    page.js(f"{HEADING.format(0)}.querySelector('button').click()")
    assert numbers(page, 0) == [row for row in range(12) for _ in ("forget", "retain")]


def test_the_keyboard_sorts_too(page):
    page.js(f"{HEADING.format(4)}.querySelector('button').focus()")
    page.press("Tab", 9)
    assert page.js(f"document.activeElement.parentNode === {HEADING.format(5)}")
    page.press("Enter", 13, "\r")
    assert numbers(page, 5) == sorted(numbers(page, 5))
    assert page.js(f"{HEADING.format(5)}.getAttribute('aria-sort')") == "ascending"
    assert page.js(f"{HEADING.format(4)}.getAttribute('aria-sort')") == "none"


def test_searching_and_choosing_a_set(page):
    def choose(kind, event, value):
        page.js(f"(() => {{ const x = document.querySelector('.tools {kind}'); x.value = '{value}';"
                f" x.dispatchEvent(new Event('{event}')); }})()")  # fmt: skip
        return page.js(COLUMN.format(1))

    assert choose("input", "input", "FORGET 11?") == ["forget"]
    assert page.js("document.querySelector('.tools output').textContent") == "1 of 24"
    assert choose("input", "input", "") and choose("select", "change", "retain") == ["retain"] * 12
    assert len(choose("select", "change", "")) == 24


def test_text_that_contains_html_stays_text(page):
    assert page.js("window.harmed") is None and page.js("document.querySelectorAll('.questions img').length") == 0
    assert OPEN in page.js("document.querySelector('.questions td.text').textContent")


def test_dark_light_and_the_button_between(page):
    def background():
        return page.js("getComputedStyle(document.body).backgroundColor")

    shades = {}
    for scheme in ("dark", "light"):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        shades[scheme] = background()
    assert shades == {"dark": "rgb(18, 21, 29)", "light": "rgb(255, 255, 255)"}
    page.js("document.getElementById('theme').click()")
    assert background() == shades["dark"]
    assert page.js("getComputedStyle(document.querySelector('svg text')).fill") != "rgb(0, 0, 0)"
    page.js("document.getElementById('theme').click()")
    assert background() == shades["light"]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out_of_the_window(page, width):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    assert page.js("document.documentElement.scrollWidth") <= width


def test_landmarks_names_and_headings(page):
    nameless = (
        "[...document.querySelectorAll('{0}')].filter(x => !(x.getAttribute('aria-label') || x.labels?.length)).length"
    )
    assert page.js(nameless.format("nav, [role=region], input, select")) == 0
    assert (
        page.js("document.querySelectorAll('main').length") == 1
        and page.js("document.querySelectorAll('h1').length") == 1
    )
    assert page.js(
        "[...document.querySelectorAll('svg')].every(x => document.getElementById(x.id) || x.querySelector('title'))"
    )
    assert page.js("[...document.querySelectorAll('thead th')].every(x => x.scope === 'col' && x.textContent.trim())")


def test_no_complaint_and_no_request(page):
    page.js("document.documentElement.scrollTop = 1e6")
    assert page.complaints() == [] and page.requests() == []


def test_the_browser_helper_sees_complaints_and_requests(tmp_path):
    file = tmp_path / "bad.html"
    file.write_text("<script>console.error('x')</script><script>undefined_name()</script><img src='missing.png'>")
    with Page(file, tmp_path / "profile") as bad:
        assert len(bad.complaints()) >= 2 and any("missing.png" in url for url in bad.requests())
