"""The pages in docs/ as a site: each in the navigation, links that lead somewhere, nothing asked of any network."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from cli import cli
from instaflow.couplings.manifest import Manifest
from instaflow.couplings.shards import Sidecar
from instaflow.evaluation.comparison import compare, comparison_json
from instaflow.evaluation.report import report_json
from instaflow.models.settings import ModelSettings
from tests.evaluation.example import full_report
from tests.evaluation.test_comparison import reports

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), "")
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")


def build(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=tree, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What the site is built from, apart from the tree, and built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("docs", "instaflow"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tree: Path) -> Path:
    return tree / "site"


def pages_of(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for place in entry.values():
            yield from [place] if isinstance(place, str) else pages_of(place)


def test_each_page_stands_in_the_navigation_once() -> None:
    listed = list(pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


class Links(HTMLParser):
    """What a page links to, what it has the browser fetch, and the anchors it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.anchors = {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attributes if value is not None}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if place := found.get("href" if tag in ("a", "link") else "src"):
            (self.links if tag == "a" else self.fetched).add(place)


def test_every_link_leads_to_a_file_and_an_anchor_that_are_there(site: Path) -> None:
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    dead = []
    for page, found in pages.items():
        for place in found.links | found.fetched:
            parts = urlsplit(place)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if parts.scheme:
                dead += [f"{page.name}: {place}"] * (place in found.fetched and parts.scheme != "data")
            elif not target.is_file() or (target in pages and unquote(parts.fragment) not in pages[target].anchors):
                dead.append(f"{page.name}: {place}")
    assert dead == []
    assert len(pages) > 15


def test_no_page_is_an_orphan(site: Path) -> None:
    """From the first page each can be reached by what is written in it, without the navigation."""
    seen, waiting = set(), {DOCS / "index.md"}
    while waiting:
        page = waiting.pop()
        seen.add(page)
        linked = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
        waiting |= {(page.parent / place).resolve() for place in linked} - seen
    assert seen == set(DOCS.rglob("*.md"))


@pytest.mark.parametrize("link", ["nowhere.md", "settings.md#nowhere"])
def test_a_broken_link_ends_the_build(tree: Path, tmp_path: Path, link: str) -> None:
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("site", ".cache"))
    with open(copy / "docs/index.md", "a") as page:
        page.write(f"\n[broken]({link})\n")
    done = build(copy)
    assert done.returncode != 0
    assert "does not exist" in done.stdout + done.stderr


def test_the_python_page_shows_what_it_names(site: Path) -> None:
    named = re.findall(r"^::: (.*)$", (DOCS / "python.md").read_text(), re.MULTILINE)
    assert set(named) <= Links(site / "python.html").anchors
    assert "The point x_t = (1 - t) noise + t data" in (site / "python.html").read_text()


def test_the_commands_page_tells_each_command() -> None:
    listed = (DOCS / "commands.md").read_text().split("```")[1]
    told = {name for line in re.findall(r"^instaflow (\S+)", listed, re.MULTILINE) for name in line.split("|")}
    assert told == {name for name, command in cli.commands.items() if not command.hidden}


def test_the_files_page_names_what_files_hold() -> None:
    held = {
        "report.json": report_json(full_report()),
        "compare.json": comparison_json(compare(reports(), "real")),
        "manifest.json": Manifest.model_fields,
        "sidecar": Sidecar.model_fields,
        "instaflow.json": ModelSettings.__dataclass_fields__,
    }
    told = set(re.findall(r"`(\w+)`", (DOCS / "files.md").read_text()))
    missing = {file: [key for key in keys if key not in told] for file, keys in held.items()}
    assert missing == {file: [] for file in held}


def templates() -> list[str]:
    """Every text in the code that has values in it or none, with … for a value."""
    found = []
    files = [*(ROOT / "instaflow").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py"), ROOT / "cli.py"]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            found.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_errors_page_quotes_errors_of_the_code() -> None:
    told = re.findall(r"^\| `([^`]+)` \| (?!means)", (DOCS / "errors.md").read_text(), re.MULTILINE)
    known = [re.sub("…+", "…", text) for text in templates()]
    assert len(told) > 40
    assert [message for message in told if not any(fits(message, text) for text in known)] == []


def fits(message: str, text: str) -> bool:
    """Whether `message` is `text`, where either may have … for what the other spells out at its ends."""
    return message.strip("… ") in text and len(message.replace("…", "")) > 10


@in_a_browser
def test_the_search_works_from_a_folder_and_no_page_asks_a_network(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked, failed = [], []
    with sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # which root has none of
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        page = chromium.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        for file in site.rglob("*.html"):
            if "results" not in file.parts:
                page.goto(file.as_uri())
        page.goto((site / "index.html").as_uri())
        page.keyboard.press("/")
        page.keyboard.type("manifest.json")
        page.get_by_text("A couple stage", exact=True).first.wait_for(timeout=60_000)
        chromium.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:", "blob:"))] == []
    assert failed == []
