"""The page of the demonstration in a real browser: no error, every figure there, nothing that overflows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import quickstart

WIDTHS = (375, 1280)
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """What one smoke run of the demonstration writes."""
    for library in ("sklearn", "tqdm"):
        pytest.importorskip(library, reason="the demonstration takes the extra 'demo'")
    path = tmp_path_factory.mktemp("page") / "new folder" / "page.html"
    quickstart.main(["--smoke", "--output", str(path), "--picture", str(path.parent / "picture.svg")])
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; the distribution's, nothing is downloaded."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="the browser is driven by selenium, of the extra 'dev'"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip(
            "no Chromium with its chromedriver on this machine; on Debian: apt install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as started:
        yield started


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser")  # what an earlier page said
    browser.get(page.as_uri())


def test_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert not any(word in text for word in ("http://", "https://", "<script", "@import", "url(", '<link rel="style'))
    assert "$" not in text  # no placeholder is left
    picture = page.with_name("picture.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg xmlns=")
    assert picture.count("<polyline") > 8


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wrong_or_overflows(browser, page, width, scheme):
    show(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return innerWidth") == width
    root = "document.documentElement"  # whose clientWidth leaves out the scroll bar
    assert browser.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    beyond = browser.execute_script(
        """
        return [...document.querySelectorAll("main *")]
            .filter(e => !e.closest(".table") || e.matches(".table"))
            .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
            .map(e => e.tagName + " " + e.textContent.slice(0, 40));
        """
    )
    assert beyond == []
    # A table that does not fit may be scrolled, but on a wide screen all do.
    if width > 1000:
        wide = "return [...document.querySelectorAll('.table')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert browser.execute_script(wide) == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn_within_its_frame_and_can_be_read(browser, page, width):
    show(browser, page, width, "light")
    figures = browser.execute_script(
        """
        return [...document.querySelectorAll("figure")].map(figure => {
            const frame = figure.querySelector("svg").getBoundingClientRect();
            const texts = [...figure.querySelectorAll("text")];
            return {
                name: figure.querySelector("svg").getAttribute("aria-label"),
                caption: figure.querySelector("figcaption").textContent.length,
                marks: figure.querySelectorAll("polyline, rect").length,
                size: Math.min(frame.width, frame.height),
                outside: texts.filter(t => {
                    const box = t.getBoundingClientRect();
                    return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
                }).map(t => t.textContent),
                smallest: Math.min(...texts.map(t => parseFloat(getComputedStyle(t).fontSize))) * frame.width / 400,
            };
        });
        """
    )
    assert len(figures) == 7
    for figure in figures:
        assert figure["caption"] > 60, figure
        assert figure["marks"] >= 2, figure
        assert figure["size"] > 150, figure
        assert figure["outside"] == [], figure
        assert figure["smallest"] > 9, figure


def test_dark_and_light_differ_and_both_have_contrast(browser, page):
    colours = {}
    for scheme in SCHEMES:
        show(browser, page, 1280, scheme)
        style = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        paper, ink = (sum(map(float, colour[4:-1].split(","))) for colour in browser.execute_script(style))
        assert abs(paper - ink) > 450
        colours[scheme] = paper
    assert colours["light"] > colours["dark"]


def test_an_error_in_the_console_and_an_overflow_would_be_seen(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<body style='margin:0'><div style='width:5000px'>x</div><script>missing()</script></body>")
    show(browser, broken, 375, "light")
    assert "missing is not defined" in browser.get_log("browser")[0]["message"]
    assert browser.execute_script("return document.documentElement.scrollWidth") == 5000
