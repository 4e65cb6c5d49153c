"""The pages as people see them: in a real browser, at the width of a desk and of a phone, by day and by night."""

import os
import shutil
from pathlib import Path

import pytest

from instaflow.evaluation.comparison import compare
from instaflow.evaluation.comparison_page import comparison_page
from instaflow.evaluation.page import page
from tests.evaluation.example import full_report
from tests.evaluation.test_comparison import reports

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")

UNREADABLE = """() => [...document.querySelectorAll("body, body *")].flatMap(element => {
  const own = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
  const box = element.getBoundingClientRect();
  if (!own.length || !box.width || !element.checkVisibility() || element.closest("title, style")) return [];
  const drawn = element.ownerSVGElement;
  const scale = drawn ? drawn.getScreenCTM().a : 1;
  const size = parseFloat(getComputedStyle(element).fontSize) * scale;
  return size < 9 ? [`${size.toFixed(1)} px: ${own[0].data.trim()}`] : [];
})"""
"""Texts that come out smaller than 9 pixels."""

OVERLAPPING = """() => [...document.querySelectorAll("svg")].flatMap(drawn => {
  const texts = [...drawn.querySelectorAll("text")].filter(text => text.checkVisibility() && text.textContent.trim());
  const boxes = texts.map(text => text.getBoundingClientRect());
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
                         Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  return texts.flatMap((text, i) => texts.slice(i + 1).flatMap((other, k) =>
    over(boxes[i], boxes[i + 1 + k]) ? [`${text.textContent} / ${other.textContent}`] : []));
})"""
"""Pairs of a drawing's texts that lie on one another."""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    sandbox = [] if os.getuid() else ["--no-sandbox"]  # which root has none of
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    contents = {"report": page(full_report()), "comparison": comparison_page(compare(reports(), "real"))}
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in contents}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_reads_well_and_asks_for_nothing(browser, pages, name, width, scheme):
    seen = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    faults, requests = [], []
    seen.on("console", lambda message: faults.append(message.text))
    seen.on("pageerror", lambda error: faults.append(str(error)))
    seen.on("request", lambda request: requests.append(request.url))
    seen.goto(pages[name].as_uri())
    for closed in seen.locator("details").all():
        closed.evaluate("element => element.open = true")
    assert not faults
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert seen.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.evaluate(UNREADABLE) == []
    assert seen.evaluate(OVERLAPPING) == []
    broken = seen.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
    assert broken == 0
    seen.close()


def test_the_checks_see_what_is_wrong(browser):
    seen = browser.new_page(viewport={"width": 390, "height": 800})
    drawing = '<svg width="100" height="20"><text y="12">one</text><text x="4" y="12">two</text></svg>'
    seen.set_content(f"<p style='font-size: 6px'>small</p>{drawing}<p style='width: 500px'>wide</p>")
    assert seen.evaluate(UNREADABLE) == ["6.0 px: small"]
    assert seen.evaluate(OVERLAPPING) == ["one / two"]
    assert seen.evaluate("document.documentElement.scrollWidth") > 390
    seen.close()
