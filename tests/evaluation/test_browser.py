"""The pages as people see them: in a real browser, at the width of a desk and of a phone, by day and by night."""

import io

import numpy as np
import pytest
from PIL import Image

from instaflow.evaluation.comparison import compare
from instaflow.evaluation.comparison_page import comparison_page
from instaflow.evaluation.page import page
from tests.browser import OVERLAPPING, UNREADABLE, chromium, faults_of, needs_chromium
from tests.evaluation.example import crowded_report, spread_report
from tests.evaluation.test_comparison import reports

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    contents = {
        "report": page(spread_report()),
        "crowded": page(crowded_report()),
        "comparison": comparison_page(compare(reports(), "real")),
    }
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in contents}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["report", "crowded", "comparison"])
def test_a_page_reads_well_and_asks_for_nothing(browser, pages, name, width, scheme):
    assert faults_of(browser, pages[name], width=width, scheme=scheme) == []


SHADE = 4  # pixels at the right edge


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_goes_on_to_the_right_has_a_shade_there(browser, pages, scheme):
    """On a phone, until the table's end is reached; a table that fits in has none."""

    def edge(seen) -> float:
        """The middle brightness of the table's right edge, whatever letters are there."""
        box = seen.locator(".scroll:has(.ranked)").bounding_box()
        clip = {**box, "x": box["x"] + box["width"] - SHADE, "width": SHADE}
        drawn = Image.open(io.BytesIO(seen.screenshot(clip=clip, full_page=True))).convert("L")
        return float(np.median(np.asarray(drawn)))

    panel = {"light": 255, "dark": 33}[scheme]
    seen = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    seen.goto(pages["report"].as_uri())
    assert panel - edge(seen) > 10
    seen.evaluate("document.querySelector('.scroll:has(.ranked)').scrollLeft = 1e6")
    assert abs(panel - edge(seen)) < 2
    seen.set_viewport_size({"width": 1280, "height": 800})
    assert abs(panel - edge(seen)) < 2
    seen.close()


def test_a_model_s_name_stays_in_sight_while_its_figures_scroll(browser, pages):
    seen = browser.new_page(viewport={"width": 390, "height": 800})
    seen.goto(pages["crowded"].as_uri())
    seen.evaluate("document.querySelector('.scroll:has(.ranked)').scrollLeft = 1e6")
    left = seen.locator(".scroll:has(.ranked)").bounding_box()["x"]
    for name in (".ranked td.name", ".ranked .group span"):
        assert all(box.bounding_box()["x"] == pytest.approx(left, abs=1) for box in seen.locator(name).all())
    seen.close()


def test_the_checks_see_what_is_wrong(browser):
    seen = browser.new_page(viewport={"width": 390, "height": 800})
    drawing = '<svg width="100" height="20"><text y="12">one</text><text x="4" y="12">two</text></svg>'
    seen.set_content(f"<p style='font-size: 6px'>small</p>{drawing}")
    assert seen.evaluate(UNREADABLE) == ["6.0 px: small"]
    assert seen.evaluate(OVERLAPPING) == ["one / two"]
    seen.close()


def test_faults_are_told(browser, tmp_path):
    wrong = "<p style='width: 500px'>wide</p><img src='gone.png' alt='gone'><script>nothing()</script>"
    (tmp_path / "wrong.html").write_text(f"<meta name='viewport' content='width=device-width'>{wrong}")
    found = faults_of(browser, tmp_path / "wrong.html", width=390)
    told = ("nothing is not defined", f"asks for {(tmp_path / 'gone.png').as_uri()}", "pixels wide", "gone")
    assert all(any(words in fault for fault in found) for words in told)
