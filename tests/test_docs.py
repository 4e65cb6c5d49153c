"""The pages in docs/ and the README say what is so: settings as the code has them, links that lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

from instaflow.config import load_experiment, parse_stage
from instaflow.dialect import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_settings_page_is_what_the_schemas_say() -> None:
    page = runpy.run_path(str(ROOT / "docs/settings.py"))["page"]()
    assert page == (ROOT / "docs/settings.md").read_text(), "run: python docs/settings.py > docs/settings.md"
    assert "| `regression_weight` |" in page
    assert [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", page.read_text())
    for path, anchor in links:
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_experiments_and_stages_are_valid(page: Path, tmp_path: Path) -> None:
    for place, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        content = parse_yaml(block, str(page))
        if "run" in content:
            config = tmp_path / f"{place}.yaml"
            config.write_text(block)
            load_experiment(str(config))
        for name, settings in content.items():
            if isinstance(settings, dict) and "kind" in settings:
                parse_stage(name, settings)
