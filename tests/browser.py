"""Pages in a real browser: what is wrong with one, at the width of a desk or of a phone, by day or by night."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")

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


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Chromium."""
    from playwright.sync_api import sync_playwright

    sandbox = [] if os.getuid() else ["--no-sandbox"]  # which root has none of
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


def faults_of(browser: Any, file: Path, *, width: int, scheme: str = "light") -> list[str]:
    """Errors of scripts, requests, sideways scrolling, texts too small or on one another, broken images."""
    seen = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    faults: list[str] = []
    requests: list[str] = []
    seen.on("console", lambda message: faults.append(message.text))
    seen.on("pageerror", lambda error: faults.append(str(error)))
    seen.on("request", lambda request: requests.append(request.url))
    seen.goto(file.as_uri())
    for closed in seen.locator("details").all():
        closed.evaluate("element => element.open = true")
    faults += [f"asks for {url}" for url in requests if not url.startswith("data:") and url != file.as_uri()]
    if (wide := seen.evaluate("document.documentElement.scrollWidth")) > width:
        faults.append(f"{wide} pixels wide")
    faults += seen.evaluate(UNREADABLE) + seen.evaluate(OVERLAPPING)
    faults += seen.evaluate(
        "[...document.images].filter(one => !one.complete || !one.naturalWidth).map(one => one.alt)"
    )
    seen.close()
    return faults
